"""The choice of the rows that count: those of the last complete evaluation of each set, at logit scales that are used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qatlab.results.rowfile import FIT, Row
from qatlab.results.stages import ADAPTED, FP32, PROBE, QUANTIZED, TRAINED

# The stages that a run is scored in, one after the other. All other stages are scored together with the last one of
# these.
_STAGES = (FP32, QUANTIZED, ADAPTED, TRAINED)


def definition_of(row: Row) -> str:
    """Return the definition of the set in a row, without the basis that a view adds to it."""
    return str(row["definition"].partition("+")[0])


def basis_of(row: Row) -> str:
    """Return the basis of a row (``View.basis``): the definition of a refit's data, the hash of an export, "" for neither."""
    return str(row["definition"].partition("+")[2])


def refit_name(row: Row) -> str:
    """Return the name in scales.json of the fit that a row with the score FIT describes."""
    return "/".join(filter(None, [row["stage"], row["definition"]]))


def at_bound(row: Row) -> bool:
    """Return whether a row describes a fit of the logit scale that ended at its bound; such a scale is not used."""
    return row["score"] == FIT and bool(row["metrics"].get("at_bound"))


def used(rows: Iterable[Row]) -> list[Row]:
    """Return ``rows`` without those that earlier releases have scored at a logit scale which ended at its bound."""
    rows = list(rows)
    unused = {(row.get("run_id"), row["stage"], row["definition"]) for row in rows if at_bound(row)}
    return [
        row for row in rows if row["score"] == FIT or (row.get("run_id"), row["stage"], basis_of(row)) not in unused
    ]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of the last complete evaluation of every set, in their order; ``rows`` are in the order of writing.

    Rows of one run, set and prompts belong to the same evaluation if their definition is the same, a hash of the
    images, the classes and the evaluations. An evaluation is complete if it has rows of the run's last stage, or of a
    stage that is scored together with it (temperature, integer); a process that was killed may have left only rows of
    FP32. Without a complete evaluation the last one counts. Of several refits or exports in it, the last of each stage
    counts. Probes are chosen apart, in the same way.
    """
    rows = used(rows)
    last_stage = _last_stages(rows)
    # {group: {definition: its stages}}; the definition of the row that was written last is the last key.
    stages: dict[Any, dict[str, set[str]]] = {}
    bases: dict[Any, str] = {}
    for row in rows:
        of_group, definition = stages.setdefault(_group(row), {}), definition_of(row)
        of_group[definition] = of_group.pop(definition, set()) | {row["stage"]}
        bases[_group(row), definition, row["stage"]] = basis_of(row)
    chosen = {}
    for group, found in stages.items():
        complete = [d for d, of in found.items() if last_stage.get(group[0]) in of or of - set(_STAGES)]
        chosen[group] = (complete or list(found))[-1]
    kept = []
    for row in rows:
        group, definition = _group(row), definition_of(row)
        if chosen[group] == definition and bases[group, definition, row["stage"]] == basis_of(row):
            kept.append(row)
    return kept


def _group(row: Row) -> tuple[Any, ...]:
    return row.get("run_id"), row["dataset"], row.get("prompts"), row["stage"] == PROBE


def _last_stages(rows: Sequence[Row]) -> dict[Any, str]:
    """Return {run id: the last of _STAGES of which the run has rows}."""
    found: dict[Any, str] = {}
    for stage in _STAGES:
        found |= {row.get("run_id"): stage for row in rows if row["stage"] == stage}
    return found
