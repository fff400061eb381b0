"""How well scores on the cosines separate the images of other sets from those of the ID reference."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated

import numpy as np

from qatlab.config.blocks import imported, signature_of
from qatlab.core.domains import Dotted, OneOf, Positive, Some, checked
from qatlab.core.errors import UserError, nearest
from qatlab.evaluation.evaluation import Evaluation, Pass, row
from qatlab.evaluation.prediction import Prediction
from qatlab.metrics.bootstrap import bootstrap_detection
from qatlab.metrics.detection import detection
from qatlab.metrics.ood import ALL_SCORES, INPUTS, has_temperature, inputs_of
from qatlab.metrics.paired import Difference, delong, paired_bootstrap
from qatlab.metrics.resampling import percentile_interval
from qatlab.results.rowfile import Row
from qatlab.suites.source import Source, View

OUTSIDE = ("near_ood", "far_ood", "shifted")
"""The roles of the sets that are compared with their ID reference. A shifted set is compared too, although a model
should not reject its images.
"""

Columns = dict[str, np.ndarray]
_Score = Annotated[str, OneOf(*ALL_SCORES)] | Dotted
Scores = Annotated[str, OneOf("all", *ALL_SCORES)] | Dotted | Annotated[Sequence[_Score], Some()]


def named_scores(scores: Sequence[str] | str, owner: str) -> list[str]:
    """Return the score names as a list, all of qatlab's for "all".

    A name with a dot, "my.scores.mine", is a function of the user's own, which is imported here: raises UserError, naming the
    option ``owner``, where that cannot be a score.
    """
    if not isinstance(scores, (str, Sequence)):
        raise UserError(f"{owner} is {scores}: it takes a list of scores, such as [msp,energy], or all.")
    names = list(ALL_SCORES) if scores == "all" else [scores] if isinstance(scores, str) else list(scores)
    for name in names:
        if "." in name:
            _check_own(name, owner)
    return names


def _check_own(name: str, owner: str) -> None:
    """Raise UserError for the full name of a score that cannot be imported, or that asks for what no score is given."""
    parameters = signature_of(owner, name, imported(owner, name)).parameters
    lacking = [
        key for key, parameter in parameters.items() if key not in INPUTS and parameter.default is parameter.empty
    ]
    if lacking or not set(parameters) & set(INPUTS):
        asked = f"asks for {lacking[0]}, which no score is given" if lacking else "asks for nothing"
        raise UserError(f"{owner}: {name} {asked}; its parameters name what it needs of {', '.join(INPUTS)}.")


def usable(scores: Sequence[str], available: Collection[str]) -> list[str]:
    """Return the names of those ``scores`` whose inputs are ``available``."""
    return [name for name in scores if inputs_of([name]) <= set(available)]


class OOD(Evaluation):
    """One row per view, OOD or shifted set and score: AUROC, AUPR and both FPR@95 against the set's ID reference.

    ``scores`` are names in ``qatlab.metrics.ood.ALL_SCORES``, full names of functions of the user's own
    ("my.scores.mine"), or "all" of the former; a set has no rows of the scores whose inputs its reference lacks.
    ``mcm_temperature`` is MCM's τ. A score that does not use the logit scale gives the same numbers under every view.
    Intervals are bootstrapped; the differences from FP32 are DeLong's for AUROC, else a paired bootstrap's.
    """

    roles = OUTSIDE

    @checked
    def __init__(self, scores: Scores = ("msp", "energy", "max_logit", "mcm"), mcm_temperature: Positive = 1.0) -> None:
        super().__init__()
        self.scores = named_scores(scores, "callbacks.ood.scores")
        self.mcm_temperature = mcm_temperature

    def reset(self) -> None:
        """Forget everything seen; UserError when an OOD set's reference is not part of the pass."""
        self.reference = {source: self._reference(source) for source in self.of.sources if source.role in OUTSIDE}
        # Only OOD sets and their references need a table of scores; other ID sets are compared with nothing.
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

    def expected(self, of: Pass, images: Mapping[Source, int]) -> Iterator[tuple[View, Source, str]]:
        """Yield the row of each view, set and score."""
        for view in of.views:
            for source in of.sources:
                if source.role in OUTSIDE:
                    for score in usable(self.scores, of.available[source.reference]):
                        yield view, source, score

    def compute(self) -> list[Row]:
        """Return the rows, one per view, set and score."""
        columns = {key: table.compute() for key, table in self.seen.items()}
        rows, of_baseline = [], {}
        for view in self.of.views:
            for outside, inside in self.reference.items():
                sides = columns[view, inside], columns[view, outside]
                replicates = self._replicates(sides, outside)
                # FP32's view is the first, and the views after it are compared with it.
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
        temperature = self.mcm_temperature if has_temperature(score) else None
        return row(view, outside, score, len(sides[1]["index"]), measured, intervals, paired, temperature)

    def _replicates(self, sides: tuple[Columns, Columns], outside: Source) -> dict[str, Columns]:
        """Return {score: {metric: (resamples,)}} of an OOD set's scores, or {} without resamples."""
        names = self._usable(outside)
        if not (self.of.resamples and names):
            return {}
        # All scores are resampled together, because one set of draws serves them all.
        inside, out = sides
        id_scores = {name: inside[name] for name in names}
        ood_scores = {name: out[name] for name in names}
        return bootstrap_detection(id_scores, ood_scores, resamples=self.of.resamples)

    def _usable(self, source: Source) -> list[str]:
        """Return the names of the scores whose inputs the ID reference of ``source`` has."""
        return usable(self.scores, self.of.available[source.reference])

    def _reference(self, outside: Source) -> Source:
        """Return the ID set that ``outside`` is compared with; raises UserError where the pass lacks the set."""
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
    """Return {metric: after - before} of a score; ``before`` and ``after`` are the columns of the ID and OOD set."""
    old, new = ((sides[0][score], sides[1][score]) for sides in (before, after))
    measured = detection(*old)
    values = {name: value - measured[name] for name, value in detection(*new).items()}
    found = {name: paired_bootstrap(value, of_before[name], of_after[name]) for name, value in values.items()}
    # DeLong's test of paired AUROCs replaces the bootstrap's test; its variance needs two images on each side.
    return found | ({"auroc": delong(old, new)} if min(map(len, new)) > 1 else {})
