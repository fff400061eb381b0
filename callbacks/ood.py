"""How well scores on the cosines tell the images of other sets from those of the ID reference."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from qatlab.errors import UserError, nearest
from qatlab.evaluation import Evaluation, Prediction, Row, Source, View, row
from qatlab.metrics.bootstrap import bootstrap_detection
from qatlab.metrics.detection import detection
from qatlab.metrics.ood import ALL_SCORES, inputs_of
from qatlab.metrics.paired import Difference, delong, paired_bootstrap
from qatlab.metrics.resampling import percentile_interval

OUTSIDE = ("near_ood", "far_ood", "shifted")
"""The roles of the sets that are told from their ID reference; a covariate shift too, though not to be rejected."""

Columns = dict[str, np.ndarray]


def checked_scores(scores: Sequence[str] | str, owner: str) -> list[str]:
    """Return the score names as a list, all of them for "all"; UserError on an unknown one, saying which option it came from."""
    names = list(ALL_SCORES) if scores == "all" else [scores] if isinstance(scores, str) else list(scores)
    for name in names:
        if name not in ALL_SCORES:
            known = [*ALL_SCORES, "all"]
            raise UserError(f"{owner} contains {name!r}, which is none of {', '.join(known)}{nearest(name, known)}.")
    return names


def usable(scores: Sequence[str], available: Collection[str]) -> list[str]:
    """Return the names of those ``scores`` whose inputs are ``available``."""
    return [name for name in scores if inputs_of([name]) <= set(available)]


def checked_temperature(temperature: float, owner: str) -> float:
    """Return the temperature; UserError unless it is positive, saying which option it came from."""
    if not temperature > 0:
        raise UserError(f"{owner} is {temperature}; a temperature is a positive number (MCM's own is 1).")
    return temperature


class OOD(Evaluation):
    """One row per view, OOD or shifted set and score: AUROC, AUPR and both FPR@95 against the set's ID reference.

    ``scores`` are names in ``qatlab.metrics.ood.ALL_SCORES`` or "all"; those whose inputs a reference lacks are left out
    there. ``mcm_temperature`` is MCM's τ. A score that does not use the logit scale gives the same numbers under every
    view. Intervals are bootstrapped; the differences from FP32 are DeLong's for AUROC, else a paired bootstrap's.
    """

    roles = OUTSIDE

    def __init__(
        self, scores: Sequence[str] | str = ("msp", "energy", "max_logit", "mcm"), mcm_temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.scores = checked_scores(scores, "callbacks.ood.scores")
        self.mcm_temperature = checked_temperature(mcm_temperature, "callbacks.ood.mcm_temperature")

    def reset(self) -> None:
        """Forget everything seen; UserError when an OOD set's reference is not part of the pass."""
        self.reference = {source: self._reference(source) for source in self.of.sources if source.role in OUTSIDE}
        needed = {*self.reference, *self.reference.values()}
        self.seen = {
            (view, source): self.table(self._usable(source))
            for view in self.of.views
            for source in self.of.sources
            if source in needed
        }

    def update(self, prediction: Prediction) -> None:
        """Score one batch of an OOD set or of a reference under the views that it is for."""
        for view in prediction.views:
            if (table := self.seen.get((view, prediction.source))) is not None:
                table.update(
                    prediction.index,
                    **prediction.ood_scores(self._usable(prediction.source), view, self.mcm_temperature),
                )

    def compute(self) -> list[Row]:
        """Return the rows, one per view, set and score."""
        columns = {key: table.compute() for key, table in self.seen.items()}
        rows, of_baseline = [], {}
        for view in self.of.views:
            for outside, inside in self.reference.items():
                sides = columns[view, inside], columns[view, outside]
                replicates = self._replicates(sides, outside)
                if view == self.of.baseline:
                    of_baseline[outside] = sides, replicates
                for score in self._usable(outside):
                    paired = {}
                    if outside in of_baseline and view != self.of.baseline and self.of.resamples:
                        before, of_before = of_baseline[outside]
                        paired = _paired(score, before, sides, of_before[score], replicates[score])
                    rows.append(self._row(view, outside, score, sides, replicates.get(score, {}), paired))
        return rows

    def _row(
        self,
        view: View,
        outside: Source,
        score: str,
        sides: tuple[Columns, Columns],
        replicates: Columns,
        paired: Mapping[str, Difference],
    ) -> Row:
        measured = detection(*(side[score] for side in sides))
        intervals = {name: percentile_interval(values) for name, values in replicates.items()}
        temperature = self.mcm_temperature if score in ("mcm", "gl_mcm") else None
        return row(view, outside, score, len(sides[1]["index"]), measured, intervals, paired, temperature)

    def _replicates(self, sides: tuple[Columns, Columns], outside: Source) -> dict[str, Columns]:
        names = self._usable(outside)
        if not (self.of.resamples and names):
            return {}
        id_scores, ood_scores = ({name: side[name] for name in names} for side in sides)
        return bootstrap_detection(id_scores, ood_scores, resamples=self.of.resamples)

    def _usable(self, source: Source) -> list[str]:
        return usable(self.scores, self.of.available[source.reference])

    def _reference(self, outside: Source) -> Source:
        inside = {source.name: source for source in self.of.sources if source.role == "id"}
        if outside.reference not in inside:
            raise UserError(
                f"The {outside.role} set {outside.name!r} has the ID reference {outside.reference!r}, which is not an "
                f"id set of this pass ({', '.join(inside) or 'there are none'}){nearest(outside.reference, inside)}. "
                "Add that set to the suite or change the reference."
            )
        return inside[outside.reference]


def _paired(
    score: str,
    before: tuple[Columns, Columns],
    after: tuple[Columns, Columns],
    of_before: Columns,
    of_after: Columns,
) -> dict[str, Difference]:
    old, new = ((sides[0][score], sides[1][score]) for sides in (before, after))
    measured = detection(*old)
    values = {name: value - measured[name] for name, value in detection(*new).items()}
    found = {name: paired_bootstrap(value, of_before[name], of_after[name]) for name, value in values.items()}
    # DeLong's variance needs two images on each side.
    return found | ({"auroc": delong(old, new)} if min(map(len, new)) > 1 else {})
