"""Refit of the logit scale (temperature scaling) after quantization, on images that are never scored."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from qatlab.errors import UserError
from qatlab.evaluation import Row
from qatlab.metrics.temperature import Fit, fit_logit_scale

Origin = Literal["calibration", "proxy"]


class Temperature:
    """Fits the logit scale that the last stage is scored with a second time.

    ``source="calibration"`` uses the suite's labelled calibration split; ``source="proxy"`` keeps to strict zero-shot: the
    student's logits on caption images are matched to the unquantized encoder's, and no label is used. Raises UserError
    for another source. Source: Guo et al. 2017, with the logit scale as the inverse temperature.
    """

    def __init__(self, source: Origin = "calibration") -> None:
        if source not in ("calibration", "proxy"):
            raise UserError(f"callbacks.temperature.source={source} is unknown; there are calibration, proxy.")
        self.source = source

    @property
    def stage(self) -> str:
        """Return the stage that the refitted model's rows carry."""
        return "temperature" if self.source == "calibration" else "temperature_proxy"

    def fit(self, cosines: Tensor, targets: Tensor, current: float) -> Fit:
        """Return the fit on ``cosines`` (N, C) with labels (N,) or target probabilities (N, C)."""
        return fit_logit_scale(cosines, targets, current=current)

    def row(self, fit: Fit, definition: str) -> Row:
        """Return the row of a fit on the images of ``definition``: the scale, and their NLL before and after."""
        return {
            "stage": self.stage,
            "logit_scale": fit.logit_scale,
            "dataset": self.source,
            "role": "calibration",
            "reference": self.source,
            "definition": definition,
            "score": "logit_scale_fit",
            "n": fit.images,
            "temperature": None,
            "metrics": {"nll_before": fit.nll_before, "nll": fit.nll_after, "at_bound": float(fit.at_bound)},
            "intervals": {},
            "paired": {},
        }
