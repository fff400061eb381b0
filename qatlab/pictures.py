"""The pictures of a run, and their numbers as CSV, from its stored predictions: reliability, and the shift between bins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from qatlab.cache import atomic
from qatlab.metrics.bins import reliability_bins
from qatlab.metrics.shift import bin_shift
from qatlab.plots import bin_shift_plot, reliability_diagram
from qatlab.table import TITLES

if TYPE_CHECKING:
    from qatlab.evaluation import Source

Scored = tuple[np.ndarray, np.ndarray]


def draw_calibration(folder: Path, source: Source) -> dict[str, Path]:
    """Return {what: path} of reliability.png and bin_shift.png of an ID set, a CSV of the same name beside each.

    The second needs FP32 and another stage. Nothing is drawn of a set without predictions in ``folder``.
    """
    stages = {stage: scored for stage in TITLES if (scored := _stored(folder, stage, source)) is not None}
    if not stages:
        return {}
    drawn = {"reliability": folder / "reliability.png"}
    reliability_diagram([(TITLES[stage], *scored) for stage, scored in stages.items()], drawn["reliability"])
    bins = [
        pl.DataFrame({"stage": stage, "bin": np.arange(15), **reliability_bins(*scored)._asdict()})
        for stage, scored in stages.items()
    ]
    _write(pl.concat(bins), folder / "reliability.csv")
    if "fp32" in stages and len(stages) > 1:
        shifts = bin_shift(stages["fp32"][0], stages)
        drawn["bin shift"] = folder / "bin_shift.png"
        bin_shift_plot({TITLES[stage]: shift for stage, shift in shifts.items()}, drawn["bin shift"])
        of_bins = [
            pl.DataFrame(
                {
                    "stage": stage,
                    "fp32_bin": np.arange(len(shift.images)),
                    **{name: getattr(shift, name) for name in ("images", "confidence", "accuracy")},
                    **{f"in_bin_{i}": shift.moved[:, i] for i in range(len(shift.images))},
                }
            )
            for stage, shift in shifts.items()
        ]
        _write(pl.concat(of_bins), folder / "bin_shift.csv")
    return drawn


def _stored(folder: Path, stage: str, source: Source) -> Scored | None:
    """Return confidence and correct (N,) of a set's images in their order, None where there are none."""
    path = folder / "predictions" / f"{stage}.parquet"
    if not path.exists():
        return None
    frame = pl.read_parquet(path).filter(
        (pl.col("dataset") == source.name) & pl.col("definition").str.starts_with(source.definition)
    )
    frame = frame.filter(pl.col("definition") == frame["definition"][-1]) if len(frame) else frame
    if not len(frame):  # a stage that was scored on another suite only has nothing to show
        return None
    frame = frame.sort("index")
    return frame["confidence"].to_numpy(writable=True), frame["correct"].to_numpy(writable=True)


def _write(frame: pl.DataFrame, path: Path) -> None:
    with atomic(path) as temporary:
        frame.write_csv(temporary)
