"""The results as a file for other programs: every number as CSV or Parquet, the closing table as LaTeX or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from qatlab.cache import atomic
from qatlab.errors import UserError, nearest
from qatlab.evaluation import Row
from qatlab.results import frame
from qatlab.table import table_lines

SUFFIXES = {"csv": "csv", "parquet": "parquet", "latex": "tex", "markdown": "md"}


def check_format(form: str | None) -> None:
    """Raise UserError for a format that there is none of."""
    if form is not None and form not in SUFFIXES:
        raise UserError(f"format={form} is unknown{nearest(form, SUFFIXES)}; there are {', '.join(SUFFIXES)}.")


def export(rows: Sequence[Row], form: str, folder: Path) -> Path:
    """Return the file ``table.<suffix>`` in ``folder`` that holds the rows in a format of SUFFIXES."""
    path = folder / f"table.{SUFFIXES[form]}"
    with atomic(path) as temporary:
        if form == "csv":
            frame(rows).write_csv(temporary)
        elif form == "parquet":
            frame(rows).write_parquet(temporary)
        else:
            columns, lines = table_lines(rows)
            cells = [[line.dataset, line.label, *(cell.text for cell in line.cells)] for line in lines]
            headers = ["set", "metric", *(column.replace("\n", " ") for column in columns)]
            style = "latex_booktabs" if form == "latex" else "github"
            if style == "github":  # a bar would end the cell
                cells = [[cell.replace("|", "/") for cell in line] for line in cells]
            temporary.write_text(tabulate(cells, headers, tablefmt=style, disable_numparse=True) + "\n")
    return path
