"""Options of runs whose scores nobody looks at: there is little to score, and a small run takes two thirds of its time."""

from __future__ import annotations

from collections.abc import Sequence

BRIEF = ["suite.images=8", "suite.resamples=2", "callbacks.refits=null", "~suite.sets.noise"]


def with_options(base: Sequence[str], *overrides: str) -> list[str]:
    """The options of ``base`` with others in their place or beside them: Hydra refuses an option that is given twice."""
    given = {override.split("=")[0] for override in overrides}
    return [*(option for option in base if option.split("=")[0] not in given), *overrides]
