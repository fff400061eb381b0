"""What recalibration could do for a model: temperature, vector and isotonic refits, none scored on what it was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatlab.callbacks.calibration import Replicates, classification, classification_replicates, paired_with
from qatlab.errors import UserError, nearest
from qatlab.evaluation import Evaluation, Prediction, Row, Source, View, row
from qatlab.metrics.calibration import score_zero_shot
from qatlab.metrics.paired import Difference
from qatlab.metrics.refits import folds, refit_isotonic, refit_temperature, refit_vector
from qatlab.metrics.resampling import percentile_interval

FOLDS = 5
KINDS = ("temperature", "vector", "isotonic")

Columns = dict[str, np.ndarray]


class Refits(Evaluation):
    """One row per view, ID set and refit, cross-fitted in five folds on at most ``images`` of the set.

    refit_none, for comparison, and those of refit_temperature, refit_vector and refit_isotonic that ``kinds`` names. They
    have the metrics of a zero-shot row but ece_classwise, with their intervals and the differences from FP32 under the
    same refit; refit_isotonic, which maps the confidence only, has top1 and ece. Vector scaling with 1000 classes takes
    minutes and five images of each class. Views with a logit scale of their own fit (a temperature refit), sets of fewer
    than five images and probes have no rows. Raises UserError for an unknown kind and for fewer than five images.
    """

    roles = ("id",)

    def __init__(self, kinds: Sequence[str] = ("temperature", "isotonic"), images: int = 5000) -> None:
        super().__init__()
        for kind in kinds:
            if kind not in KINDS:
                raise UserError(
                    f"callbacks.refits.kinds contains {kind!r}, which is none of {', '.join(KINDS)}{nearest(kind, KINDS)}."
                )
        if images < FOLDS:
            raise UserError(
                f"callbacks.refits.images is {images}; cross-fitting in {FOLDS} folds takes at least {FOLDS} images."
            )
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
            if not view.fitted:
                self.seen.setdefault((view, prediction.source), []).append(batch)

    def compute(self) -> list[Row]:
        """Return the rows."""
        rows = []
        of_baseline: dict[tuple[Source, str], tuple[Columns, Replicates]] = {}
        for (view, source), batches in self.seen.items():
            index, cosines, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            if len(labels) < FOLDS:
                continue
            drawn = np.sort(np.random.default_rng(0).permutation(len(labels))[: self.images])
            chosen = index.argsort()[drawn]
            for name, columns in _refitted(self.kinds, cosines[chosen], labels[chosen], view.logit_scale).items():
                replicates = classification_replicates(columns, self.of.resamples) if self.of.resamples else {}
                paired: dict[str, Difference] = {}
                if view == self.of.baseline:
                    of_baseline[source, name] = columns, replicates
                elif replicates and (source, name) in of_baseline:
                    paired = paired_with(*of_baseline[source, name], columns, replicates)
                intervals = {metric: percentile_interval(values) for metric, values in replicates.items()}
                metrics = classification(columns)
                if name == "refit_isotonic":
                    metrics, intervals, paired = map(_mapped, (metrics, intervals, paired))
                rows.append(row(view, source, name, len(drawn), metrics, intervals, paired))
        return rows


def _refitted(kinds: Sequence[str], cosines: Tensor, labels: Tensor, logit_scale: float) -> dict[str, Columns]:
    """Return the columns of each refit; isotonic's nll and brier are those from before it."""
    fold = folds(len(labels), FOLDS)
    before = score_zero_shot(cosines, labels, logit_scale)
    found = {"refit_none": before}
    if "temperature" in kinds:
        found["refit_temperature"] = refit_temperature(cosines, labels, fold)
    if "vector" in kinds:
        found["refit_vector"] = refit_vector(cosines, labels, logit_scale, fold)
    if "isotonic" in kinds:
        isotonic = refit_isotonic(before.confidence, before.correct, fold)
        found["refit_isotonic"] = before._replace(confidence=torch.from_numpy(isotonic))
    truth = {"label": labels.numpy()}
    return {
        name: {column: values.double().numpy() for column, values in scored._asdict().items()} | truth
        for name, scored in found.items()
    }


def _mapped(of_metrics: dict[str, Any]) -> dict[str, Any]:
    """Return what a map of the confidence alone has: it leaves no probabilities of the other classes."""
    return {metric: of_metrics[metric] for metric in ("top1", "ece") if metric in of_metrics}
