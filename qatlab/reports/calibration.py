"""Two pictures of a run's stored predictions, with their numbers as CSV: reliability, and the shift between bins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from qatlab.core.checksums import read_table
from qatlab.core.damage import whole
from qatlab.core.files import atomic
from qatlab.core.hashing import digest
from qatlab.metrics.bins import reliability_bins
from qatlab.metrics.shift import Shift, bin_shift
from qatlab.reports.plots import bin_shift_plot, reliability_diagram
from qatlab.results.stages import FP32, TITLES

Scored = tuple[np.ndarray, np.ndarray]


class Pictures(NamedTuple):
    """The files of the two pictures of an ID set; a CSV of the same name lies beside each."""

    reliability: Path
    bin_shift: Path


def pictures(folder: Path, dataset: str, first: bool) -> Pictures:
    """Return the paths of the pictures of an ID set; all sets but the ``first`` have their name in the file names."""
    # Any text may name a set. Characters that do not suit a file name are replaced, and a hash then keeps two names
    # apart that would become equal.
    plain = re.sub(r"[^\w.+-]", "_", dataset)
    own = "" if first else f"_{plain}" if plain == dataset else f"_{plain}-{digest(dataset)[:4]}"
    return Pictures(folder / f"reliability{own}.png", folder / f"bin_shift{own}.png")


def draw_calibration(
    folder: Path, dataset: str, definitions: Mapping[str, str], run: str, files: Pictures
) -> list[Path]:
    """Return the pictures of an ID set that were drawn to ``files``, each with a CSV of its numbers beside it.

    The title has the name of the set and the name of the ``run``. ``definitions`` {stage: definition of the set's rows}
    says which stored predictions are drawn. The bin-shift picture needs FP32 and at least one other stage. Without
    predictions of the set in ``folder`` the list is empty and nothing is written.
    """
    stages: dict[str, Scored] = {}
    for stage in TITLES:  # TITLES gives the order of the panels and of the lines
        if stage in definitions:
            scored = _stored(folder, stage, dataset, definitions[stage])
            if scored is not None:
                stages[stage] = scored
    if not stages:
        return []
    title = f"{dataset}, {run}"
    panels = [(TITLES[stage], *scored) for stage, scored in stages.items()]
    reliability_diagram(panels, files.reliability, title=title)
    tables = []
    for stage, scored in stages.items():
        bins = reliability_bins(*scored)
        tables.append(pl.DataFrame({"stage": stage, "bin": np.arange(len(bins.images)), **bins._asdict()}))
    _write(pl.concat(tables), files.reliability.with_suffix(".csv"))
    # The second picture follows images from their bin in FP32 to their bin in another stage, so it needs two stages.
    if FP32 in stages and len(stages) > 1:
        shifts = bin_shift(stages[FP32][0], stages)
        bin_shift_plot({TITLES[stage]: shift for stage, shift in shifts.items()}, files.bin_shift, title=title)
        tables = [_shift_table(stage, shift) for stage, shift in shifts.items()]
        _write(pl.concat(tables), files.bin_shift.with_suffix(".csv"))
        return [files.reliability, files.bin_shift]
    return [files.reliability]


def _shift_table(stage: str, shift: Shift) -> pl.DataFrame:
    """Return a table with a line for each FP32 bin: its number of images, and what the ``stage`` makes of these images.

    ``confidence`` and ``accuracy`` are means under the stage; ``in_bin_<i>`` counts the images that are in bin i there.
    """
    bins = np.arange(len(shift.images))
    columns = {"stage": stage, "fp32_bin": bins, "images": shift.images}
    columns |= {"confidence": shift.confidence, "accuracy": shift.accuracy}
    columns |= {f"in_bin_{i}": shift.moved[:, i] for i in bins}
    return pl.DataFrame(columns)


def _stored(folder: Path, stage: str, dataset: str, definition: str) -> Scored | None:
    """Return confidence and correct, both (N,), of a set's images by index; None without stored predictions of the set."""
    stored = whole(folder / "predictions" / f"{stage}.parquet", read_table)
    if stored is None:
        return None
    frame = stored.filter((pl.col("dataset") == dataset) & (pl.col("definition") == definition))
    if not len(frame):  # an evaluation on another suite may have left a file that holds only other sets
        return None
    frame = frame.sort("index")  # bin_shift pairs the images of two stages by their position
    return frame["confidence"].to_numpy(writable=True), frame["correct"].to_numpy(writable=True)


def _write(frame: pl.DataFrame, path: Path) -> None:
    """Write a table as CSV; a write that fails leaves the old file as it was."""
    with atomic(path) as temporary:
        frame.write_csv(temporary)
