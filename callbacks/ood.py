"""How well scores on the cosines tell the images of other sets from those of the ID reference."""

from __future__ import annotations

from collections.abc import Sequence

from qatlab.errors import UserError, nearest
from qatlab.evaluation import Evaluation, Prediction, Row, Source, row
from qatlab.metrics.ood import SCORES, auroc, fpr95_id_pos, fpr95_ood_pos, score_images

OUTSIDE = ("near_ood", "far_ood")
"""The roles of the sets that a detector should reject."""


def checked_scores(scores: Sequence[str], owner: str) -> list[str]:
    """Return the score names as a list; UserError on one that does not exist, saying which option it came from."""
    for name in scores:
        if name not in SCORES:
            raise UserError(f"{owner} contains {name!r}, which is none of {', '.join(SCORES)}{nearest(name, SCORES)}.")
    return list(scores)


def checked_temperature(temperature: float, owner: str) -> float:
    """Return the temperature; UserError unless it is positive, saying which option it came from."""
    if not temperature > 0:
        raise UserError(f"{owner} is {temperature}; a temperature is a positive number (MCM's own is 1).")
    return temperature


class OOD(Evaluation):
    """One row per view, OOD set and score: auroc, fpr95_id_pos and fpr95_ood_pos against the set's ID reference.

    ``scores`` are names in ``qatlab.metrics.ood.SCORES``, ``mcm_temperature`` is MCM's τ. A score that does not use the
    logit scale gives the same numbers under every view.
    """

    roles = OUTSIDE

    def __init__(
        self, scores: Sequence[str] = ("msp", "energy", "max_logit", "mcm"), mcm_temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.scores = checked_scores(scores, "callbacks.ood.scores")
        self.mcm_temperature = checked_temperature(mcm_temperature, "callbacks.ood.mcm_temperature")

    def reset(self) -> None:
        """Forget everything seen; UserError when an OOD set's reference is not part of the pass."""
        self.reference = {source: self._reference(source) for source in self.sources if source.role in OUTSIDE}
        needed = {*self.reference, *self.reference.values()}
        self.seen = self.tables([source for source in self.sources if source in needed], self.scores)

    def update(self, prediction: Prediction) -> None:
        """Score one batch of an OOD set or of a reference under every view."""
        for view in self.views:
            table = self.seen.get((view, prediction.source))
            if table is not None:
                scored = score_images(self.scores, prediction.cosines, view.logit_scale, self.mcm_temperature)
                table.update(prediction.index, **scored)

    def compute(self) -> list[Row]:
        """Return the rows, one per view, OOD set and score."""
        columns = {key: table.compute() for key, table in self.seen.items()}
        return [
            row(view, source, score, len(columns[view, source]["index"]), metrics)
            for view in self.views
            for source, reference in self.reference.items()
            for score in self.scores
            for metrics in [_detection(columns[view, reference][score], columns[view, source][score])]
        ]

    def _reference(self, outside: Source) -> Source:
        inside = {source.name: source for source in self.sources if source.role == "id"}
        if outside.reference not in inside:
            raise UserError(
                f"The {outside.role} set {outside.name!r} has the ID reference {outside.reference!r}, which is not an "
                f"id set of this pass ({', '.join(inside) or 'there are none'}){nearest(outside.reference, inside)}. "
                "Add that set to the suite or change the reference."
            )
        return inside[outside.reference]


def _detection(inside: object, outside: object) -> dict[str, float]:
    measures = (auroc, fpr95_id_pos, fpr95_ood_pos)
    return {measure.__name__: measure(inside, outside) for measure in measures}
