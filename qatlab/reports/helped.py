"""A sentence for every ID set on whether a refit of the temperature helped."""

from __future__ import annotations

from collections.abc import Sequence

from qatlab.reports.difference import interval, shown, signed
from qatlab.results.rowfile import Row
from qatlab.results.stages import PROBE

# {metric: (name, unit factor, digits, unit)}: an ECE is told in percentage points, an NLL in nats.
_UNITS = {"ece": ("ECE", 100, 1, " points"), "nll": ("NLL", 1, 3, "")}
_VERDICTS = {"better": "shown to help", "worse": "shown to harm", "": "not shown to help"}


def refit_lines(rows: Sequence[Row]) -> list[str]:
    """Return a line for every ID set under a refitted scale, and a line for every cross-fit that ended at a bound.

    "id: the temperature refit changed ECE by −0.5 points [−1.3, +0.4], not shown to help; NLL by ...". The brackets
    hold the 95 % interval of the difference on the same images. Rows without intervals (suite.resamples=0) give no
    line.
    """
    # With a single run the name of the set is enough to tell the lines apart.
    several = len({row.get("run_id") for row in rows}) > 1
    lines = []
    for row in rows:
        named = f"{row['recipe']} {row['run_id']}, {row['dataset']}" if several else row["dataset"]
        # Only rows of a refitted scale have "refit": there qatlab.callbacks.Calibration has stored how they differ from
        # the scale before the refit.
        if row["role"] == "id" and row.get("refit"):
            changes = "; ".join(_change(metric, row) for metric in _UNITS)
            lines.append(f"{named}: the temperature refit changed {changes}")
        if row["stage"] != PROBE and row["score"] == "refit_temperature" and row["metrics"].get("at_bound"):
            lines.append(
                f"{named}, {row['stage']}: {100 * row['metrics']['at_bound']:.0f} % of the images keep the model's temperature in "
                "the cross-fitted rows, for that of their fold ended at its bound"
            )
    return lines


def _change(metric: str, row: Row) -> str:
    """Return in words how a metric changed under the refit, with its interval and a verdict."""
    found, (name, factor, digits, unit) = row["refit"][metric], _UNITS[metric]
    value = signed(found["value"], factor, digits)
    return f"{name} by {value}{unit} {interval(found, factor, digits)}, {_VERDICTS[shown(found, less_is_better=True)]}"
