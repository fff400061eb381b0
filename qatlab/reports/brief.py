"""The table in at most 20 lines: the first ID set, means over the other sets by role, and a user's own evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from qatlab.reports.columns import Column, Grid, grid
from qatlab.reports.table import (
    ACCEPTED,
    KNOWN,
    UNITS,
    Cell,
    Line,
    Spec,
    adjusted,
    cell,
    coverage_lines,
    difference_of,
    own_specs,
    printed,
    set_lines,
    sigmoid_lines,
    tests,
)
from qatlab.reports.titles import SCORES, measure
from qatlab.results.rowfile import Row

LINES = 20
"""The largest number of lines: a screen shows them together with the text above and below the table."""
DETECTION = ("auroc", "fpr95_id_pos")
# The short table shows one OOD score: the first of these that was computed. MCM comes first, because an export uses MCM
# by default to decide which images it accepts.
_SCORES = ("mcm", *SCORES)
_OUTSIDE = {"near_ood": "near-OOD sets", "far_ood": "far-OOD sets"}


@dataclass(frozen=True)
class Brief:
    """The short table: its ``lines``, the titles of its ``columns``, and the number of lines of the full table ``left`` out."""

    columns: list[str]
    lines: list[Line]
    left: int


@dataclass(frozen=True)
class _Wanted:
    """A line that the table should have: the mean over the sets called ``names`` of the metric in ``spec``."""

    title: str
    names: list[str]
    spec: Spec


def brief_table(rows: Sequence[Row], title: str, first: str | None = None) -> Table:
    """Return the short table for the terminal.

    ``first`` is the name of the ID set that has lines of its own, by default the first ID set among ``rows``.
    """
    brief = brief_lines(rows, first)
    caption = [
        f"{UNITS} {ACCEPTED}. {tests(rows)}; a mean over sets has no test.",
        *sigmoid_lines(rows),
        *coverage_lines(rows),
    ]
    if brief.left:
        caption.append(f"{brief.left} lines of single sets and scores are not shown: table=full has them")
    return printed(brief.columns, brief.lines, title, caption)


def brief_lines(rows: Sequence[Row], first: str | None = None) -> Brief:
    """Return the short table: top-1, ECE and NLL of the first ID set, means over the other sets, and a user's evaluations."""
    of, chances = grid(rows), adjusted(rows)
    every = [line for name in of.roles for line in set_lines(of, name, chances)]
    lines = []
    for wanted in (*_of_roles(of, first), *_of_own(of)):
        names = [name for name in wanted.names if _is_there(of, name, wanted.spec)]
        if len(names) == 1:  # a single set keeps its name and its tests, which a mean does not have
            cells = [cell(of, column, names[0], wanted.spec, chances) for column in of.columns]
            lines.append(Line(names[0], wanted.spec.label, cells))
        elif names:
            cells = [_mean(of, column, names, wanted.spec) for column in of.columns]
            lines.append(Line(f"mean of {len(names)} {wanted.title}", wanted.spec.label, cells))
    lines = lines[:LINES]
    shown = {(line.dataset, line.label) for line in lines}
    left = sum((line.dataset, line.label) not in shown for line in every)
    return Brief([named.title for named in of.columns.values()], lines, left)


def _of_roles(of: Grid, first: str | None) -> Iterator[_Wanted]:
    """Yield the lines of qatlab's own evaluations."""
    inside = _with_role(of, "id")
    first = first or next((of.datasets[name] for name in inside), None)
    # A set that was scored on several selections of its images has a name for each selection.
    for name in [name for name in inside if of.datasets[name] == first]:
        yield from (_Wanted("", [name], _zero_shot(metric)) for metric in ("top1", "ece", "nll"))
    others = [name for name in inside if of.datasets[name] != first]
    for title, names in (("other ID sets", others), ("shifted sets", _with_role(of, "shifted"))):
        yield from (_Wanted(title, names, _zero_shot(metric)) for metric in ("top1", "ece"))
    for role, title in _OUTSIDE.items():
        names = _with_role(of, role)
        known = {score for name in names for score in of.scores(name)}
        score = next((score for score in _SCORES if score in known), None)
        if score is not None:
            yield from (_Wanted(title, names, spec) for spec in _detection(score, SCORES[score]))
    drop = Spec("one_vs_all", ("drop",), "spurious gap: drop %")
    yield _Wanted("spurious pairs", _with_role(of, "counter"), drop)


def _of_own(of: Grid) -> Iterator[_Wanted]:
    """Yield the lines of a user's own evaluations: OOD scores as means over near and far sets, all others set by set."""
    averaged = set()
    for role, title in _OUTSIDE.items():
        names = _with_role(of, role)
        for score in dict.fromkeys(score for name in names for score in of.scores(name)):
            specs = _detection(score, score)
            if score not in KNOWN and any(_has(of, column, name, specs[0]) for column in of.columns for name in names):
                averaged.add(score)
                yield from (_Wanted(title, names, spec) for spec in specs)
    for name in of.roles:
        yield from (_Wanted("", [name], spec) for spec in own_specs(of, name) if spec.score not in averaged)


def _with_role(of: Grid, role: str) -> list[str]:
    return [name for name, known in of.roles.items() if known == role]


def _zero_shot(metric: str) -> Spec:
    return Spec("zero_shot", (metric,), measure(metric).title)


def _detection(score: str, name: str) -> list[Spec]:
    return [Spec(score, (metric,), f"{measure(metric).title}, {name}") for metric in DETECTION]


def _is_there(of: Grid, name: str, spec: Spec) -> bool:
    """Return whether any column has a value for the line ``spec`` of the set ``name``."""
    return any(_has(of, column, name, spec) for column in of.columns)


def _has(of: Grid, column: Column, name: str, spec: Spec) -> bool:
    row = of.row(column, name, spec.score)
    return row is not None and set(spec.metrics) <= set(row["metrics"])


def _mean(of: Grid, column: Column, names: Sequence[str], spec: Spec) -> Cell:
    """Return the mean over some sets and its difference from FP32; an empty cell where the column lacks one of the sets."""
    # A mean over fewer sets could not be compared with the means in the other columns.
    if not all(_has(of, column, name, spec) for name in names):
        return Cell()
    (metric,), written = spec.metrics, measure(spec.metrics[0])
    values: list[Any] = [of.rows[column, name, spec.score]["metrics"][metric] for name in names]
    text = written.text(float(np.mean(values)))
    differences = [difference_of(of, column, name, spec.score, metric) for name in names]
    known = [difference for difference in differences if difference is not None]
    if len(known) == len(names):
        text += f" ({written.text(float(np.mean(known)), '+')})"
    # The mean has no interval: rows have intervals of single sets, and two sets may hold the same images, so that the
    # intervals cannot be combined as if the sets were independent.
    return Cell(f"{text} ")
