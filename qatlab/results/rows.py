"""The rows of runs as a polars frame."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from qatlab.config import EMBEDDED
from qatlab.core.files import user_path
from qatlab.results.contexts import CONTEXT
from qatlab.results.latest import latest
from qatlab.results.rowfile import DEFINITION_VERSION, Row, RowFile

_NESTED = {"metrics", "intervals", "paired", "refit", "config", "versions", CONTEXT}
PART = 2048  # number of rows that are in memory as Python objects together, before they become columns
_ASIDE = re.compile(r"\.\d{8}-\d{6}$")  # matches the end of the name of a run folder that force=true has renamed


def read_rows(path: Path) -> list[Row]:
    """Return the complete rows of one results.jsonl; damaged lines and rows that lost their context are left out."""
    return RowFile(path).rows


def newest(rows: Iterable[Row]) -> list[Row]:
    """Return ``rows`` without those for which the same run has rows of the same set in a newer ``definition_version``."""
    rows, known = list(rows), dict[tuple[Any, ...], int]()
    for row in rows:
        known[_scored(row)] = max(known.get(_scored(row), 0), definition_version(row))
    return [row for row in rows if definition_version(row) == known[_scored(row)]]


def definition_version(row: Row) -> int:
    """Return the version of a row's definition; rows of rendered sets, whose definition never changed, count as the newest."""
    path = (row.get("config") or {}).get(f"suite.sets.{row['dataset']}.path")
    rendered = isinstance(path, str) and path.startswith(EMBEDDED)
    return DEFINITION_VERSION if rendered else int(row.get("definition_version", 1))


def _scored(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("run_id", "stage", "step", "dataset"))


def read(folders: Iterable[str | Path] | str | Path = "runs", *, every: bool = False) -> pl.DataFrame:
    """Return the rows below one folder or several as one polars frame, with the columns that ``frame`` describes.

    These are the rows of the last complete evaluation of every set (``qatlab.results.latest``), and of these the rows
    of the newest ``definition_version`` that a run has of a set. With ``every`` they are all rows that were ever
    stored, also those on other images of a set. The options are left out; read ``config.yaml`` beside the rows for
    them. A run folder that ``force=true`` has renamed counts only where it is named itself.
    """
    roots = [folders] if isinstance(folders, (str, Path)) else list(folders)
    files = sorted({file for root in roots for file in _result_files(user_path(root))})
    with _without_collector():
        return frame(row for file in files for row in _rows_of(file, every))


@contextmanager
def _without_collector() -> Iterator[None]:
    """Switch Python's garbage collector off inside this context: rows make no cycles, and it takes a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _rows_of(file: Path, every: bool) -> list[Row]:
    stored = RowFile(file)
    if stored.damaged:
        warnings.warn(f"{file}: damaged lines are left out, the first is {stored.damaged[0]}", stacklevel=2)
    if stored.bare_lines:
        warnings.warn(
            f"{file}: contexts.jsonl beside it is missing or damaged, and {len(stored.bare_lines)} rows lack what stands "
            f"there (model, weights, seed, commit), the first in line {stored.bare_lines[0]}",
            stacklevel=2,
        )
    return stored.every if every else newest(latest(stored.every))


def frame(rows: Iterable[Row]) -> pl.DataFrame:
    """Return rows as a polars frame, a line per row; a metric m has columns for its value, interval and differences.

    These are m, m_low and m_high; the difference from FP32 in m_difference, m_difference_low, m_difference_high and
    m_p, the p-value without correction for several sets. Where the temperature was refitted, m_refit, m_refit_low,
    m_refit_high and m_refit_p are the difference that the refit made.
    """
    rows = iter(rows)
    parts = [_part(part) for part in iter(lambda: list(islice(rows, PART)), [])]
    if not parts:
        return pl.DataFrame()
    return pl.concat(parts, how="diagonal_relaxed")


def _part(rows: Sequence[Row]) -> pl.DataFrame:
    """Return a frame of rows, in their order.

    Rows with the same names of entries are turned into columns together, because a step for each single value would
    take most of the time.
    """
    alike: dict[tuple[str, ...], list[int]] = {}
    wide = [_wide(row) for row in rows]
    for place, row in enumerate(wide):
        alike.setdefault(tuple(row), []).append(place)
    columns: dict[str, list[Any]] = {}
    order: list[int] = []
    for names, places in alike.items():
        here = slice(len(order), len(order) + len(places))
        order += places
        values = zip(*(wide[place].values() for place in places), strict=True)
        for name, column in zip(names, values, strict=True):
            if name not in columns:
                columns[name] = [None] * len(rows)
            columns[name][here] = column
    found = pl.DataFrame([pl.Series(name, values, strict=False) for name, values in columns.items()])
    return found[pl.Series(order).arg_sort()]


def _wide(row: Row) -> Row:
    wide = row | row["metrics"]
    for name in _NESTED & wide.keys():
        del wide[name]
    for name, (low, high) in row.get("intervals", {}).items():
        wide[f"{name}_low"], wide[f"{name}_high"] = low, high
    for name, found in row.get("paired", {}).items():
        _put_difference(wide, f"{name}_difference", f"{name}_p", found)
    for name, found in row.get("refit", {}).items():
        _put_difference(wide, f"{name}_refit", f"{name}_refit_p", found)
    return wide


def _put_difference(wide: Row, name: str, chance: str, found: dict[str, float]) -> None:
    wide[name], wide[f"{name}_low"], wide[f"{name}_high"] = found["value"], found["low"], found["high"]
    wide[chance] = found["p_value"]


def _result_files(root: Path) -> Iterable[Path]:
    for file in root.rglob("results.jsonl"):
        if not any(_ASIDE.search(part) for part in file.relative_to(root).parts):
            yield file
