"""The tables of a paper as LaTeX or Markdown: a line per set, model and stage, a column per metric with its interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from qatlab.reports.columns import Column, Grid, grid
from qatlab.reports.headline import headlines
from qatlab.reports.markdown import literal
from qatlab.reports.table import DETECTION, KNOWN, LEVEL, adjusted, coverage_lines, sigmoid_lines, test_of, tests
from qatlab.reports.titles import MEASURES, SCORES, measure
from qatlab.results.rowfile import Row
from qatlab.results.stages import FP32

_RECALIBRATED = {
    "refit_none": "no refit",
    "refit_temperature": "temperature",
    "refit_vector": "vector scaling",
    "refit_isotonic": "isotonic",
}
_SPURIOUS = {"one_vs_all": "1 vs all", "one_vs_20": "1 vs 20"}
_BRACKETS = "In brackets 95 % intervals; in %, NLL in nats."


@dataclass(frozen=True)
class _Part:
    """One table: the rows of the ``scores`` {name in a row: title}, with a column for each of the ``metrics`` in any row."""

    title: str
    scores: dict[str, str]
    metrics: Sequence[str]


def written(rows: Sequence[Row], form: str) -> str:
    """Return the tables of stored rows: labelled sets, cross-fitted refits, OOD detection, spurious cues, own evaluations.

    ``form`` is "latex" or "markdown". The headlines of the runs stand above the tables. Below the tables stand
    sentences on the marks and on the share of products that is rounded.
    """
    of, chances = grid(rows), adjusted(rows)
    notes = [f"{_BRACKETS} {tests(rows)}.", *sigmoid_lines(rows), *coverage_lines(rows)]
    texts = [_sentences(headlines(rows), form)]
    for part in _parts(of):
        headers, lines = _table(of, part, chances)
        if lines:
            texts.append(_tabular(part.title, headers, lines, form))
    return "\n\n".join([*texts, _sentences(notes, form)]) + "\n"


def _parts(of: Grid) -> Iterator[_Part]:
    """Yield the tables: first those of qatlab's evaluations, then one for each evaluation that a user added."""
    own: dict[str, dict[str, None]] = {}  # {score or evaluation of the user: its metrics}
    for (_, _, score), row in of.rows.items():
        if score not in KNOWN:
            own.setdefault(score, {}).update(dict.fromkeys(row["metrics"]))
    detecting = {score: score for score, metrics in own.items() if set(metrics) >= set(DETECTION)}
    yield _Part("Accuracy and calibration", {"zero_shot": ""}, ["top1", "ece", "nll", "confidence_gap", *_added(of)])
    yield _Part("Calibration after a cross-fitted refit", _RECALIBRATED, ["ece"])
    yield _Part("OOD detection", SCORES | detecting, DETECTION)
    yield _Part("Spurious cues", _SPURIOUS, ["drop", "rsg", "vulnerability"])
    for score, metrics in own.items():
        if score not in detecting:
            yield _Part(score, {score: ""}, list(metrics))


def _added(of: Grid) -> list[str]:
    """Return the metrics that a user's evaluation has added to zero_shot rows."""
    found: dict[str, None] = {}
    for (_, _, score), row in of.rows.items():
        if score == "zero_shot":
            found |= dict.fromkeys(metric for metric in row["metrics"] if metric not in MEASURES)
    return list(found)


def _table(of: Grid, part: _Part, chances: dict[tuple[Any, ...], float]) -> tuple[list[str], list[list[str]]]:
    """Return the column titles and the lines of a table, ordered by set, then score, then column; both empty without rows."""
    found: list[tuple[str, str, Column, Row]] = []
    for name in of.roles:
        for score in of.scores(name):
            for column in of.columns:
                row = of.row(column, name, score)
                if score in part.scores and row is not None:
                    found.append((name, score, column, row))
    measured = {metric for *_, row in found for metric in row["metrics"]}
    metrics = [metric for metric in part.metrics if metric in measured]
    if not metrics:
        return [], []
    several = len(part.scores) > 1
    heads = ["set", "n", *(["score"] if several else []), "model", "bits", "stage"]
    lines = []
    for name, score, column, row in found:
        named = of.columns[column]
        first = [name, str(row["n"]), *([part.scores[score]] if several else [])]
        cells = [_value(row, metric, chances) for metric in metrics]
        # Rows of earlier releases do not have the bits of their layers: only the 32 bits of FP32 are then known.
        of_column = "32" if column.stage == FP32 else named.bits
        lines.append([*first, named.model, of_column, named.stage.replace("\n", ", "), *cells])
    return [*heads, *(measure(metric).title for metric in metrics)], lines


def _value(row: Row, metric: str, chances: dict[tuple[Any, ...], float]) -> str:
    """Return "91.6 [89.0, 93.9]*": a metric, its interval, and a star where it differs from FP32 by the corrected test."""
    if metric not in row["metrics"]:
        return ""
    shown, between = measure(metric), row.get("intervals", {}).get(metric)
    text = shown.text(row["metrics"][metric])
    if between:
        text += f" [{shown.text(between[0])}, {shown.text(between[1])}]"
    return f"{text}*" if chances.get(test_of(row, metric), 1) < LEVEL else text


def _tabular(title: str, headers: Sequence[str], lines: Sequence[Sequence[str]], form: str) -> str:
    """Return one table with its title: a heading in Markdown, and in LaTeX a comment, because there a caption has the title."""
    # disable_numparse: tabulate would write "0.30" as 0.3.
    if form == "latex":
        flat = [list(map(_flat, line)) for line in lines]
        return f"% {_flat(title)}\n" + tabulate(flat, headers, tablefmt="latex_booktabs", disable_numparse=True)
    escaped = [list(map(literal, line)) for line in lines]
    return f"### {literal(title)}\n\n" + tabulate(
        escaped, list(map(literal, headers)), tablefmt="github", disable_numparse=True
    )


def _sentences(sentences: Sequence[str], form: str) -> str:
    """Return the sentences: a paragraph each in Markdown, and in LaTeX comments, because they belong in a caption there."""
    if form == "latex":
        return "\n".join(f"% {_flat(line)}" for line in sentences)
    return "\n\n".join(map(literal, sentences))


def _flat(text: str) -> str:
    """Return a text on one line: after a line break in a name the rest would not belong to the LaTeX comment any more."""
    return " ".join(text.split())
