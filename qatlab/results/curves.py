"""The curves of a run: metrics.csv, which merges the curves of all processes that worked on the run."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl

from qatlab.core.damage import whole
from qatlab.core.files import atomic


def read_curves(path: Path) -> pl.DataFrame:
    """Return a frame of the curves in a CSV file, all columns numeric; raises ValueError for a file of other content."""
    with path.open("rb") as file:  # polars would take a * in a file name as a pattern, so it gets the open file
        curves = pl.read_csv(file, infer_schema_length=None)
    if "step" not in curves.columns:
        raise ValueError("it has no column step")
    texts = [name for name, kind in curves.schema.items() if not kind.is_numeric()]
    # polars reads "NaN" as a number but "nan", which Python writes, as text: such columns are cast to numbers.
    numbers = curves.with_columns(pl.col(texts).cast(pl.Float64, strict=False))
    for name in texts:
        if numbers[name].null_count() > curves[name].null_count():
            raise ValueError(f"its column {name} holds something else than numbers")
    return numbers


def merge_curves(folder: Path) -> Path | None:
    """Return the path of metrics.csv, after the curves of all processes of the run were merged into it; None without curves.

    It has one line per step. Where several processes have a value of a step, the value of the latest process is kept.
    The files of single processes, in curves/, are removed afterwards, because metrics.csv then holds all their values.
    """
    path = folder / "metrics.csv"
    # Files are ordered by their number and not by their time, because the clocks of two nodes differ.
    parts: dict[int, Path] = {}
    for part in (folder / "curves").glob("version_*/metrics.csv"):
        number = part.parent.name.removeprefix("version_")
        if number.isdecimal() and part.stat().st_size:  # a process that was stopped at once leaves an empty file
            parts[int(number)] = part
    # The metrics.csv of an earlier call comes first, because its values are of earlier processes.
    files = [*([path] if path.exists() else []), *(parts[number] for number in sorted(parts))]
    frames = [frame for file in files if (frame := whole(file, read_curves)) is not None]
    if not frames:
        return None
    if parts:
        curves = pl.concat(frames, how="diagonal_relaxed").group_by("step").agg(pl.all().drop_nulls().last())
        with atomic(path) as temporary:
            curves.sort("step").write_csv(temporary)
        _remove(folder / "curves")
    return path


def _remove(curves: Path) -> None:
    """Remove the folder curves/, except folders in it that hold other files too, such as files set aside as damaged."""
    for version in curves.glob("version_*"):
        if {path.name for path in version.iterdir()} <= {"metrics.csv", "hparams.yaml"}:
            shutil.rmtree(version)
    if not any(curves.iterdir()):
        curves.rmdir()
