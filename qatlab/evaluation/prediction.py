"""One embedded batch, the input of every evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qatlab.core.errors import UserError
from qatlab.metrics.calibration import ZeroShot, score_zero_shot
from qatlab.metrics.ood import ScoreShapeError, score_images
from qatlab.metrics.sigmoid import score_sigmoid
from qatlab.suites.heads import Head
from qatlab.suites.source import Source, View
from qatlab.suites.suite import EvaluationSet


@dataclass(frozen=True)
class Prediction:
    """One embedded batch of one set, with the views under which it is read.

    ``features`` (B, D) float32 unit vectors; ``cosines`` (B, C) float32 before any temperature, C the classes of the
    ID reference; ``labels`` (B,) int64, -1 where the set has none; ``index`` (B,) int64, the position in the set, which
    makes the numbers independent of how ranks and workers share the images. ``ood_cosines`` (B, C) are the cosines of
    OOD scores that have prompts of their own. ``rows`` are the places of the classes that accuracy is measured on,
    where the set has only some of the classes. ``inputs`` are further inputs of ``qatlab.metrics.ood.score_images``.
    """

    source: Source
    features: Tensor
    cosines: Tensor
    labels: Tensor
    index: Tensor
    views: Sequence[View]
    ood_cosines: Tensor | None = None
    rows: Sequence[int] | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def classified(self) -> tuple[Tensor, Tensor]:
        """Return cosines (B, C') and labels (B,) among the classes that accuracy is measured on."""
        if self.rows is None:
            return self.cosines, self.labels
        rows = torch.tensor(self.rows, device=self.cosines.device)
        # Labels count all classes of the reference. ``rows`` is sorted, so searchsorted gives the position of a label's
        # class among the chosen classes.
        return self.cosines[:, rows], torch.searchsorted(rows, self.labels)

    def zero_shot(self, view: View) -> ZeroShot:
        """Return the ZeroShot of a view, (B,) each: what accuracy and calibration need of every image and its label."""
        return zero_shot(*self.classified(), view)

    def ood_scores(self, names: Sequence[str], view: View, temperature: float) -> dict[str, Tensor]:
        """Return {name: (B,) float64} of the named OOD scores under a view, ``temperature`` being MCM's."""
        cosines = self.cosines if self.ood_cosines is None else self.ood_cosines
        try:
            scores = score_images(names, cosines, view.logit_scale, temperature, features=self.features, **self.inputs)
        except ScoreShapeError as error:
            raise UserError(f"{error}: a score is a number for every image, of shape (N,).") from error
        for name, values in scores.items():
            # Of a function of the user's own nothing is known. The others' cosines were looked at where they were made.
            if "." in name and not bool(values.isfinite().all()):
                raise UserError(
                    f"the score {name} gives NaN or infinite values: it has to give a number for every image."
                )
        return scores


def zero_shot(cosines: Tensor, labels: Tensor, view: View) -> ZeroShot:
    """Return the ZeroShot of ``cosines`` (N, C) and ``labels`` (N,) by a softmax over classes, or by the view's sigmoids."""
    if view.logit_bias is None:
        return score_zero_shot(cosines, labels, view.logit_scale)
    return score_sigmoid(cosines, labels, view.logit_scale, view.logit_bias)


def predicted(
    entry: EvaluationSet,
    features: Tensor,
    labels: Tensor,
    index: Tensor,
    views: Sequence[View],
    heads: Mapping[str, Head],
    ood_heads: Mapping[str, Head],
    **inputs: Any,
) -> Prediction:
    """Return the Prediction of a batch of a set from its unit ``features`` (B, D) and the zero-shot heads.

    ``labels`` and ``index`` are (B,) int64. ``inputs`` are inputs of OOD scores besides the features.
    """
    reference = entry.source.reference
    # OOD scores have heads only where their prompts differ.
    # Elsewhere ``ood_cosines`` stays None and ``cosines`` are used.
    cosines = {
        name: features @ of[reference].classes.features.to(features.device).T
        for name, of in (("cosines", heads), ("ood_cosines", ood_heads))
        if reference in of
    }
    return Prediction(
        entry.source, features, labels=labels, index=index, views=views, rows=entry.rows, inputs=inputs, **cosines
    )
