"""The closing table: a line per set and metric, a column per stage with FP32 first, and differences from FP32 with tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from qatlab.metrics.paired import holm
from qatlab.quant.inspect.coverage import SHARES, statement
from qatlab.reports.columns import Grid, grid
from qatlab.reports.difference import LEVEL
from qatlab.reports.titles import MEASURES, SCORES, measure
from qatlab.results.rowfile import Row

UNITS = "All in %, NLL in nats; (difference from the same model's FP32 on the same images)."
ACCEPTED = "FPR@95 ID+: OOD images accepted when 95 % of ID is"
CONVENTIONS = f"OOD scores: AUROC | {ACCEPTED} | FPR@95 OOD+: ID images rejected when 95 % of OOD is."
TESTED = "* differs from FP32, p < 0.05 after Holm's correction over the sets"
UNTESTED = "Differences are plain: rows without resamples (suite.resamples=0) have no intervals and no tests"
SIGMOID = (
    "zeroshot=sigmoid: ECE, NLL and confidence are of a sigmoid for each class by itself, not of a softmax over classes"
)
DETECTION = ("auroc", "fpr95_id_pos", "fpr95_ood_pos")


@dataclass(frozen=True)
class Spec:
    """A line of a set in the table: the ``metrics`` of a ``score`` that are written in one cell, and the line's ``label``."""

    score: str
    metrics: tuple[str, ...]
    label: str


_ZERO_SHOT = [Spec("zero_shot", (metric,), MEASURES[metric].title) for metric in ("top1", "ece")]
_DETECTION = [Spec(score, DETECTION, f"OOD, {name}") for score, name in SCORES.items()]
_LINES: dict[str, list[Spec]] = {
    "id": [
        *_ZERO_SHOT,
        Spec("zero_shot", ("nll",), "NLL"),
        Spec("zero_shot", ("confidence_gap",), "confidence - accuracy %"),
        Spec("refit_temperature", ("ece",), "ECE %, temperature cross-fitted"),
        Spec("refit_vector", ("ece",), "ECE %, vector scaling cross-fitted"),
        Spec("refit_isotonic", ("ece",), "ECE %, isotonic cross-fitted"),
    ],
    "shifted": [*_ZERO_SHOT, Spec("msp", ("auroc",), "AUROC as OOD, MSP")],
    "common": [*_ZERO_SHOT],
    "counter": [
        *_ZERO_SHOT,
        Spec("one_vs_all", ("drop", "rsg"), "drop | RSG %"),
        Spec("one_vs_20", ("drop", "rsg"), "1 vs 20: drop | RSG %"),
        Spec("one_vs_all", ("vulnerability",), "added vulnerability %"),
    ],
    "near_ood": _DETECTION,
    "far_ood": _DETECTION,
}
# The scores of qatlab's own evaluations. A row with another score comes from a score or an evaluation that a user
# added.
_OWN = {"zero_shot", "refit_none", "refit_temperature", "refit_vector", "refit_isotonic", "one_vs_all", "one_vs_20"}
KNOWN = {*_OWN, *SCORES}


@dataclass(frozen=True)
class Cell:
    """The ``text`` of a cell, and its ``verdict``: +1 for significantly better than FP32, -1 for worse, 0 for neither."""

    text: str = ""
    verdict: int = 0


@dataclass(frozen=True)
class Line:
    """One line of a table: the name of the set, the label of the metrics, and a cell for each column."""

    dataset: str
    label: str
    cells: list[Cell]


def printed(columns: Sequence[str], lines: Sequence[Line], title: str, caption: Sequence[str]) -> Table:
    """Return the lines as a table for the terminal; ``columns`` are its titles, and ``caption`` the lines below it."""
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    table.caption = "\n".join(caption)
    for name in ("set", "metric"):
        table.add_column(name)
    for name in columns:
        table.add_column(name, justify="right")
    before = None  # the set of the line above: the name of a set stands in its first line only, below a rule
    for line in lines:
        if before not in (None, line.dataset):
            table.add_section()
        cells = [Text(cell.text, {1: "green", -1: "red", 0: ""}[cell.verdict]) for cell in line.cells]
        table.add_row(line.dataset if line.dataset != before else "", line.label, *cells)
        before = line.dataset
    return table


def full_table(rows: Sequence[Row], title: str) -> Table:
    """Return the table of every set and score for the terminal; several runs are columns of one table."""
    columns, lines = table_lines(rows)
    return printed(
        columns, lines, title, [f"{UNITS} {CONVENTIONS} {tests(rows)}.", *sigmoid_lines(rows), *coverage_lines(rows)]
    )


def table_lines(rows: Sequence[Row]) -> tuple[list[str], list[Line]]:
    """Return (titles of the columns, lines) of the full table: a column for FP32 per model, and one per run and stage.

    A set that was scored on several selections of its images has lines for each selection. Probes are left out.
    """
    of, chances = grid(rows), adjusted(rows)
    lines = [line for name in of.roles for line in set_lines(of, name, chances)]
    return [named.title for named in of.columns.values()], lines


def set_lines(of: Grid, name: str, chances: dict[tuple[Any, ...], float]) -> Iterator[Line]:
    """Yield the lines of one set that have a value in any column."""
    for spec in specs(of, name):
        cells = [cell(of, column, name, spec, chances) for column in of.columns]
        if any(cell.text for cell in cells):
            yield Line(name, spec.label, cells)


def specs(of: Grid, name: str) -> list[Spec]:
    """Return the lines of a set: first the lines of its role, then the lines of a user's own scores and evaluations."""
    return [*_LINES[of.roles[name]], *own_specs(of, name)]


def own_specs(of: Grid, name: str) -> Iterator[Spec]:
    """Yield the lines of a set for the scores and metrics in its rows that are not qatlab's own but a user's."""
    for score in of.scores(name):
        metrics: dict[str, None] = {}
        for column in of.columns:
            metrics |= dict.fromkeys((of.row(column, name, score) or {"metrics": {}})["metrics"])
        if score in KNOWN:
            yield from (Spec(score, (metric,), f"{score}, {metric}") for metric in metrics if metric not in MEASURES)
        elif set(metrics) >= set(DETECTION):
            yield Spec(score, DETECTION, f"OOD, {score}")
        else:
            yield from (Spec(score, (metric,), f"{score}, {measure(metric).title}") for metric in metrics)


def coverage_lines(rows: Sequence[Row]) -> list[str]:
    """Return a line per quantized run on how much of its products is rounded; rows of earlier releases give none."""
    runs = {row.get("run_id"): row for row in rows if row.get(SHARES[0]) is not None}
    several = len(runs) > 1
    return [f"{row['recipe']} {run}: {statement(row)}" if several else statement(row) for run, row in runs.items()]


def sigmoid_lines(rows: Sequence[Row]) -> list[str]:
    """Return a line that says so where confidences are sigmoids (suite.zeroshot=sigmoid), [] where all are of a softmax."""
    return [SIGMOID] if any(row.get("zeroshot") == "sigmoid" for row in rows) else []


def tests(rows: Sequence[Row]) -> str:
    """Return the sentence that explains the star, or for rows without tests the sentence that there are no tests."""
    return TESTED if any(row.get("paired") for row in rows) else UNTESTED


def adjusted(rows: Sequence[Row]) -> dict[tuple[Any, ...], float]:
    """Return the p-values of the paired tests, corrected over the sets: {``test_of(row, metric)``: p}. Source: Holm 1979.

    The tests of one metric of one score under one stage of a run, over all sets of ``rows``, are corrected together.
    """
    # A reader searches the table for a set on which a metric differs. The more sets it has, the more differ by chance.
    families: dict[tuple[Any, ...], dict[tuple[Any, ...], float]] = {}
    for row in rows:
        for metric, difference in row.get("paired", {}).items():
            family = row.get("run_id"), row["stage"], row["score"], metric
            families.setdefault(family, {})[test_of(row, metric)] = difference["p_value"]
    corrected: dict[tuple[Any, ...], float] = {}
    for of_family in families.values():
        corrected |= {key: float(p) for key, p in zip(of_family, holm(list(of_family.values())), strict=True)}
    return corrected


def test_of(row: Row, metric: str) -> tuple[Any, ...]:
    """Return the key that ``adjusted`` uses for the paired test of a metric of a row."""
    return row.get("run_id"), row["stage"], row["dataset"], row["definition"], row["score"], metric


def cell(of: Grid, column: Any, name: str, spec: Spec, chances: dict[tuple[Any, ...], float]) -> Cell:
    """Return the cell of the line ``spec`` of a set in a column, empty where its row lacks one of the metrics."""
    row = of.row(column, name, spec.score)
    if row is None or not set(spec.metrics) <= set(row["metrics"]):
        return Cell()
    # A cell of several metrics has a colour only where all its significant differences point the same way.
    parts, verdicts, several = [], set(), len(spec.metrics) > 1
    for metric in spec.metrics:
        written, difference = measure(metric), difference_of(of, column, name, spec.score, metric)
        text, mark = written.text(row["metrics"][metric]), ""
        if difference is not None and not several:  # several metrics side by side leave no room for differences
            text += f" ({written.text(difference, '+')})"
        if chances.get(test_of(row, metric), 1) < LEVEL:
            mark = "*"
            verdicts.add(1 if (row["paired"][metric]["value"] < 0) == written.less_is_better else -1)
        # A space replaces a missing mark, so that the digits of a column stay below each other.
        parts.append(f"{text}{mark:1}".rjust(7 if several else 0))
    return Cell("|".join(parts), verdicts.pop() if len(verdicts) == 1 else 0)


def difference_of(of: Grid, column: Any, name: str, score: str, metric: str) -> float | None:
    """Return the difference of a metric from FP32 on the same images; None where it is unknown.

    It is the difference that was tested, or for rows without tests the plain difference of two rows.
    """
    row, before = of.row(column, name, score), of.fp32(column)
    if row is None or before is None:
        return None
    if row.get("paired"):
        return float(row["paired"][metric]["value"]) if metric in row["paired"] else None
    # Rows of suite.resamples=0 have no tests. The same name of a set means the same images in every column of a model.
    fp32 = of.row(before, name, score)
    if fp32 is None or metric not in fp32["metrics"] or metric not in row["metrics"] or fp32["n"] != row["n"]:
        return None
    return float(row["metrics"][metric] - fp32["metrics"][metric])
