"""The closing report of a run: the table in the terminal, the pictures in its folder, and the paths of all files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qatlab.core.console import console
from qatlab.reports.brief import brief_table
from qatlab.reports.calibration import draw_calibration, pictures
from qatlab.reports.columns import grid
from qatlab.reports.curves import draw_curves
from qatlab.reports.files import export, path_of
from qatlab.reports.headline import headlines
from qatlab.reports.helped import refit_lines
from qatlab.reports.next_step import next_line
from qatlab.reports.summary import RunSummary, Summary
from qatlab.reports.table import full_table
from qatlab.results.curves import merge_curves
from qatlab.results.rowfile import Row


def show(summary: Summary) -> None:
    """Print headlines and table of the runs on one suite, draw their pictures, and print the paths of their files."""
    out = console(soft_wrap=True, highlight=False)
    for one in summary.runs:
        if not one.computed:
            out.print(f"{one.run.folder} was finished before: its stored results (force=true computes them anew)")
    rows, title = _rows(summary), " | ".join(_name(one) for one in summary.runs)
    for line in headlines(rows, _first(summary)):
        out.print(line, soft_wrap=True)
    out.print(full_table(rows, title) if summary.full else brief_table(rows, title, _first(summary)))
    lines = [*refit_lines(rows), *(one.skipped for one in summary.runs if one.skipped)]
    if summary.work:
        lines.append(summary.work)
    for line in [*lines, *summary.notes]:
        out.print(line, soft_wrap=True)
    for what, path in _files(summary):
        show_path(what, path)


def show_next(rows: Sequence[Row]) -> None:
    """Print the command to try after a run with these rows, if there is one."""
    if (line := next_line(rows)) is not None:
        console(soft_wrap=True, highlight=False).print(line, soft_wrap=True)


def _name(of: RunSummary) -> str:
    return f"{of.recipe} {of.run.id}"


def _model(of: RunSummary) -> str:
    """Return the name of a run's model with the bits of its last stage, as the titles of table columns have them."""
    named = list(grid(of.rows).columns.values())
    return f"{named[-1].model} {named[-1].bits}".rstrip() if named else ""  # a run without evaluations has no rows


def _first(summary: Summary) -> str | None:
    """Return the name of the suite's first ID set; all runs of a summary have the same suite."""
    return next(iter(summary.runs[0].id_sets), None)


def _rows(summary: Summary) -> list[Row]:
    """Return the rows of all runs, run after run."""
    return [row for one in summary.runs for row in one.rows]


def show_path(what: str, path: Path, remark: str = "") -> None:
    """Print a line with the name of a file or folder, its path and a remark."""
    console(soft_wrap=True, highlight=False).print(f"{what:22} {path}{remark}")


def _files(summary: Summary) -> list[tuple[str, Path]]:
    """Draw the pictures, write the file of all rows, and return (name, path) of every file of the runs."""
    found: list[tuple[str, Path]] = []
    rows = _rows(summary)
    for one in summary.runs:
        run, table = one.run, None
        # One file holds the rows of all runs. Without file= it goes to the folder of the first run, because several
        # runs have no common folder.
        if summary.format and rows and one is summary.runs[0]:
            if not summary.file:
                run.require_writable(f"format={summary.format} makes a file in it (file=PATH makes it elsewhere)")
            table = export(rows, summary.format, path_of(summary.format, summary.file, run.folder))
        drawn = _drawn(one)
        # A trained run also keeps its weights from before the training: the first file of this list that exists is
        # shown.
        models = [run.folder / name for name in ("model.safetensors", "quantized.safetensors")]
        paths = {
            "rows": run.results,
            "table": table,
            "per-image predictions": run.folder / "predictions",
            "layers": run.folder / "layers.csv",
            "curves": drawn.pop("curves"),  # the curves are listed with the other tables, in front of the pictures
            "model": next((path for path in models if path.exists()), None),
            **drawn,
        }
        found += [(what, path) for what, path in paths.items() if path and path.exists()]
    return found


def _drawn(of: RunSummary) -> dict[str, Path | None]:
    """Return {name: path} of the curves and pictures of a run; None for one that could not be drawn.

    Pictures are drawn anew, except in a folder that cannot be written to, whose files are returned as they are.
    """
    folder, found = of.run.folder, dict[str, Path | None]()
    curves = folder / "metrics.csv" if of.run.read_only else merge_curves(folder)
    picture = folder / "curves.png" if of.run.read_only else curves and draw_curves(curves, folder / "curves.png")
    for name in of.id_sets:
        files = pictures(folder, name, name == of.id_sets[0])
        drawn = list(files)
        if not of.run.read_only:
            # The stored predictions may include other images under the same name: the rows say which ones to draw.
            definitions = {row["stage"]: row["definition"] for row in of.rows if row["dataset"] == name}
            drawn = draw_calibration(folder, name, definitions, f"{_name(of)}, {_model(of)}", files)
        of_set = "" if len(of.id_sets) == 1 else f" of {name}"
        for what, file in zip(("reliability", "bin shift"), files, strict=True):
            found[f"{what}{of_set}"] = file if file in drawn else None
    return {"curves": curves, **found, "curves drawn": picture}
