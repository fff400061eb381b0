"""The results as a file: every number as CSV or Parquet, or the tables of a paper as LaTeX or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qatlab.config import Config
from qatlab.core.errors import UserError, nearest
from qatlab.core.files import atomic, user_path
from qatlab.reports.written import written
from qatlab.results.rowfile import Row
from qatlab.results.rows import frame

SUFFIXES = {"csv": "csv", "parquet": "parquet", "latex": "tex", "markdown": "md"}


def check_shown(config: Config) -> None:
    """Raise UserError for an unknown ``format=``, and for a ``file=`` that has no format or is a folder."""
    if config.format is not None and config.format not in SUFFIXES:
        raise UserError(
            f"format={config.format} is unknown{nearest(config.format, SUFFIXES)}; there are {', '.join(SUFFIXES)}."
        )
    if config.file is not None and config.format is None:
        raise UserError(f"file={config.file} says where the results are written: add format={'|'.join(SUFFIXES)}.")
    if config.file is not None and user_path(config.file).is_dir():
        raise UserError(f"file={config.file} is a folder: name the file in it, such as {config.file}/table.tex.")


def path_of(form: str, file: str | None, folder: Path) -> Path:
    """Return the path of the file of results: ``file``, or without it ``table.<suffix>`` in ``folder``."""
    return user_path(file) if file else folder / f"table.{SUFFIXES[form]}"


def export(rows: Sequence[Row], form: str, path: Path) -> Path:
    """Return ``path`` after the rows were written there in a format of SUFFIXES; missing folders above it are made."""
    with atomic(path) as temporary:
        if form == "csv":
            frame(rows).write_csv(temporary)
        elif form == "parquet":
            frame(rows).write_parquet(temporary)
        else:
            temporary.write_text(written(rows, form), encoding="utf-8")
    return path
