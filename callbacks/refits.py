"""What recalibration could do for a model: temperature, vector and isotonic refits, scored by cross-fitting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from qatlab.callbacks.calibration import Replicates, classification, classification_replicates, paired_with
from qatlab.core.domains import AtLeast, OneOf, Some, checked
from qatlab.evaluation.evaluation import Evaluation, Pass, row
from qatlab.evaluation.prediction import Prediction, zero_shot
from qatlab.metrics.paired import Difference
from qatlab.metrics.refits import folds, refit_isotonic, refit_temperature, refit_vector
from qatlab.metrics.resampling import percentile_interval
from qatlab.results.rowfile import Row
from qatlab.suites.source import Source, View

FOLDS = 5  # an image is scored by a fit on the four folds that do not hold the image
KINDS = ("temperature", "vector", "isotonic")

Columns = dict[str, np.ndarray]


class Refits(Evaluation):
    """One row per view, ID set and refit, cross-fitted in five folds on at most ``images`` of the set.

    The refits are refit_none, for comparison, and those of refit_temperature, refit_vector and refit_isotonic that
    ``kinds`` names. A row has the metrics of a zero-shot row but ece_classwise, with intervals and the differences from
    FP32 under the same refit; refit_isotonic, which maps the confidence only, has top1 and ece. refit_temperature also
    has ``at_bound``, the share of images that keep the view's logit scale because the fit on the other folds ended at
    its bound. Vector scaling needs minutes for 1000 classes, and five images of each class. Views with a refitted logit
    scale, sets of fewer than five images and probes have no rows. Raises UserError for an unknown kind and for fewer
    than five images.
    """

    roles = ("id",)

    @checked
    def __init__(
        self,
        kinds: Annotated[Sequence[Annotated[str, OneOf(*KINDS)]], Some()] = ("temperature", "isotonic"),
        images: Annotated[int, AtLeast(FOLDS)] = 5000,
    ) -> None:
        super().__init__()
        self.kinds, self.images = kinds, images

    def reset(self) -> None:
        """Forget everything seen."""
        self.seen: dict[tuple[View, Source], list[tuple[Tensor, Tensor, Tensor]]] = {}

    def update(self, prediction: Prediction) -> None:
        """Keep one batch of an ID set."""
        if prediction.source.role != "id" or self.of.shared:
            return
        batch = prediction.index.cpu(), prediction.cosines.cpu(), prediction.labels.cpu()
        for view in prediction.views:
            # A view with a refitted scale has the same cosines, so its cross-fits would be the same too.
            if not view.fitted:
                self.seen.setdefault((view, prediction.source), []).append(batch)

    def expected(self, of: Pass, images: Mapping[Source, int]) -> Iterator[tuple[View, Source, str]]:
        """Yield the row of each view without a fitted scale, ID set of enough images, and refit."""
        names = ["refit_none", *(f"refit_{kind}" for kind in self.kinds)]
        sources = [source for source in of.sources if source.role == "id" and images[source] >= FOLDS]
        for view in of.views:
            if not view.fitted:
                for source in sources:
                    yield from ((view, source, name) for name in names)

    def compute(self) -> list[Row]:
        """Return the rows, one per view, ID set and refit."""
        rows = []
        of_baseline: dict[tuple[Source, str], tuple[Columns, Replicates]] = {}
        for (view, source), batches in self.seen.items():
            index, cosines, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            if len(labels) < FOLDS:
                continue
            # argsort first puts the images into the set's order, so
            # that every run draws the same images whatever its batches.
            drawn = np.sort(np.random.default_rng(0).permutation(len(labels))[: self.images])
            chosen = index.argsort()[drawn]
            refitted, kept = _refitted(self.kinds, cosines[chosen], labels[chosen], view)
            for name, columns in refitted.items():
                replicates = classification_replicates(columns, self.of.resamples) if self.of.resamples else {}
                paired: dict[str, Difference] = {}
                if view == self.of.baseline:
                    of_baseline[source, name] = columns, replicates
                elif replicates and (source, name) in of_baseline:
                    paired = paired_with(*of_baseline[source, name], columns, replicates)
                intervals = {metric: percentile_interval(values) for metric, values in replicates.items()}
                metrics = classification(columns)
                if name == "refit_isotonic":  # an isotonic map gives no probabilities of other classes
                    metrics, intervals, paired = map(_mapped, (metrics, intervals, paired))
                if name == "refit_temperature":
                    metrics["at_bound"] = kept
                rows.append(row(view, source, name, len(drawn), metrics, intervals, paired))
        return rows


def _refitted(kinds: Sequence[str], cosines: Tensor, labels: Tensor, view: View) -> tuple[dict[str, Columns], float]:
    """Return the columns of each refit, and the share of images whose fit ended at its bound.

    Such images keep the view's logit scale. nll and brier of refit_isotonic are those before the refit.
    """
    fold, kept = folds(len(labels), FOLDS), np.zeros(len(labels), bool)
    before = zero_shot(cosines, labels, view)
    found = {"refit_none": before}
    if "temperature" in kinds:
        found["refit_temperature"], kept = refit_temperature(cosines, labels, view.logit_scale, fold)
    if "vector" in kinds:
        found["refit_vector"] = refit_vector(cosines, labels, view.logit_scale, fold)
    if "isotonic" in kinds:
        # Isotonic regression maps the confidence of the unfitted model and leaves the predicted classes as they are.
        isotonic = refit_isotonic(before.confidence, before.correct, fold)
        found["refit_isotonic"] = before._replace(confidence=torch.from_numpy(isotonic))
    truth = {"label": labels.numpy()}
    columns: dict[str, Columns] = {}
    for name, scored in found.items():
        columns[name] = {column: values.double().numpy() for column, values in scored._asdict().items()} | truth
    return columns, float(kept.mean())


def _mapped(of_metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics that need the confidence alone, because an isotonic map gives no other probabilities."""
    return {metric: of_metrics[metric] for metric in ("top1", "ece") if metric in of_metrics}
