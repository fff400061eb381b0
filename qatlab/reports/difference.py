"""Rules that say what a difference with its 95 % interval shows, and how such a difference is written."""

from __future__ import annotations

from typing import Any

LEVEL = 0.05
"""The largest p-value, corrected over the sets, at which a difference counts as shown."""
UNCHANGED = 0.005
"""Half a percentage point: a metric counts as unchanged where the whole interval of its difference is at most this far
from 0."""


def shown(found: dict[str, float], less_is_better: bool) -> str:
    """Return "better" or "worse" where the value and its whole interval have the same sign, else "".

    ``found`` holds ``value``, and ``low`` and ``high``, the bounds of its interval.
    """
    # A bootstrap interval may leave out the value itself, because resampling raises an ECE: so the value is tested too.
    if found["value"] < 0 and found["high"] < 0:
        return "better" if less_is_better else "worse"
    if found["value"] > 0 and found["low"] > 0:
        return "worse" if less_is_better else "better"
    return ""


def verdict(found: dict[str, float], less_is_better: bool, images: int, chance: float) -> str:
    """Return "unchanged", "better" or "worse" for a difference of fractions; "" where the images show none of these.

    ``chance`` is the p-value of the test of this difference, corrected over the sets. A difference without a star in
    the table (p ≥ LEVEL) is never called better or worse.

    A difference is "unchanged" where its value and its whole interval are within half a point of 0. The interval may
    then still leave 0 out: such a difference exists, but it is known to be small.
    """
    # Where no image changed, no resample changes either, and the interval has no width. Such an interval says too
    # little: if none of n images changed, up to 3/n of all images may still change (the rule of three, Hanley &
    # Lippman-Hand 1983).
    seen = found["low"] < found["high"] or 3 / images <= UNCHANGED
    if seen and all(abs(found[key]) <= UNCHANGED for key in ("value", "low", "high")):
        return "unchanged"
    return shown(found, less_is_better) if chance < LEVEL else ""


def signed(value: float, factor: float = 100, digits: int = 1) -> str:
    """Return ``factor`` times a number with its sign; zero after rounding has a plus, and the minus is U+2212, as wide as it."""
    text = f"{factor * value:+.{digits}f}"
    return text.replace("-", "+" if not text.strip("-0.") else "−")


def interval(found: dict[str, Any], factor: float = 100, digits: int = 1) -> str:
    """Return "[−0.9, +0.5]", the interval of a difference."""
    low, high = (signed(found[key], factor, digits) for key in ("low", "high"))
    return f"[{low}, {high}]"
