"""The first thing a reader should know about a run: one sentence, made from its rows by rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qatlab.reports.difference import interval, signed, verdict
from qatlab.reports.table import adjusted, test_of
from qatlab.reports.titles import bits
from qatlab.results.rowfile import Row
from qatlab.results.stages import QUANTIZED, TITLES

_REFITTED = ("temperature", "temperature_proxy")  # stages that change no answer: refit_lines tells what a refit changed
_METRICS = {"top1": "accuracy", "ece": "ECE"}


def headlines(rows: Sequence[Row], first: str | None = None) -> list[str]:
    """Return a line per run: how its last stage differs from FP32 on the first ID set, and what this difference shows.

    "W8A8: accuracy −0.2 points [−0.9, +0.5] on id (n = 512), ECE +0.3 [−0.4, +1.0]: no difference shown". The brackets
    hold 95 % intervals of the paired differences. The verdict comes from ``difference.verdict`` and agrees with the
    stars of the table. For a model in full precision the line has its accuracy and ECE; for rows without intervals
    (suite.resamples=0) it has plain differences and no verdict. ``first`` is the name of the ID set, by default the
    first ID set of the rows.
    """
    runs = list(dict.fromkeys(row.get("run_id") for row in rows))
    lines, chances = [], adjusted(rows)
    for run_id in runs:
        of_run = [row for row in rows if row.get("run_id") == run_id]
        row = last_row(of_run, first)
        if row is not None:
            named = f"{row['recipe']} {run_id}, " if len(runs) > 1 else ""
            lines.append(f"{named}{_headline(row, last_row(of_run, first, 'fp32'), verdicts(row, chances))}")
    return lines


def last_row(rows: Sequence[Row], first: str | None = None, stage: str | None = None) -> Row | None:
    """Return the zero_shot row of the ID set ``first`` under ``stage``, by default the run's last stage; None without one.

    By default ``first`` is the first ID set of the rows. Refits of the temperature do not count as a last stage.
    """
    inside = [row for row in rows if row["role"] == "id" and row["score"] == "zero_shot" and row["stage"] in TITLES]
    first = first or next((row["dataset"] for row in inside), None)
    stages = [stage] if stage else [known for known in TITLES if known not in _REFITTED]
    found = [row for row in inside if row["dataset"] == first and row["stage"] in stages]
    # A stage may have been scored several times. max takes the first of equals, so the rows are reversed: the last
    # counts.
    return max(reversed(found), key=lambda row: stages.index(row["stage"]), default=None)


def verdicts(row: Row, chances: Mapping[tuple[Any, ...], float]) -> dict[str, str]:
    """Return {metric: "unchanged", "better", "worse" or ""} of a row that was compared with FP32, {} of any other row.

    ``chances`` are the p-values that ``adjusted`` returns for all rows of the table; they are corrected over its sets.
    """
    paired, found = row.get("paired", {}), dict[str, str]()
    for metric in _METRICS:
        if metric in paired:
            found[metric] = verdict(paired[metric], metric == "ece", row["n"], chances[test_of(row, metric)])
    return found


def _headline(row: Row, fp32: Row | None, shown: dict[str, str]) -> str:
    # "W8A8" already says that a model is quantized. Rows of earlier releases have no bits, and need the word.
    stage = "" if row["stage"] == QUANTIZED and bits(row) else TITLES[row["stage"]]
    model = ", ".join(filter(None, [bits(row), stage]))
    found, on = row.get("paired", {}), f"on {row['dataset']} (n = {row['n']})"
    if set(_METRICS) <= set(found):
        top1, ece = (f"{signed(found[name]['value'])}{{}} {interval(found[name])}" for name in _METRICS)
        return f"{model}: accuracy {top1.format(' points')} {on}, ECE {ece.format('')}: {_in_words(shown)}"
    if fp32 is not None and fp32 is not row:
        top1, ece = (signed(row["metrics"][name] - fp32["metrics"][name]) for name in _METRICS)
        return (
            f"{model}: accuracy {top1} points {on}, ECE {ece}: plain differences, which show nothing by themselves "
            "(no intervals: suite.resamples=0)"
        )
    top1, ece = (_value(row, name) for name in _METRICS)
    return f"{model}: accuracy {top1} {on}, ECE {ece}"


def _value(row: Row, metric: str) -> str:
    """Return a metric in per cent, with its interval if the row has one."""
    value, between = f"{100 * row['metrics'][metric]:.1f} %", row.get("intervals", {}).get(metric)
    return f"{value} [{100 * between[0]:.1f}, {100 * between[1]:.1f}]" if between else value


def _in_words(found: dict[str, str]) -> str:
    """Return the verdicts of accuracy and ECE in words; two equal verdicts are written once."""
    top1, ece = found["top1"], found["ece"]
    if top1 == ece:
        return top1 or "no difference shown"
    return ", ".join(f"{name} {found[metric] or 'not shown to differ'}" for metric, name in _METRICS.items())
