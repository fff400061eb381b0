"""Refit of the logit scale (temperature scaling) after quantization, on images that are never scored."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from qatlab.core.domains import OneOf, checked
from qatlab.metrics.temperature import Fit, fit_logit_scale
from qatlab.results.rowfile import DEFINITION_VERSION, FIT, Row

Origin = Literal["calibration", "proxy"]


class Temperature:
    """Fits the logit scale that the last stage is scored with a second time.

    ``source="calibration"`` uses the suite's labelled calibration split; ``source="proxy"`` keeps to strict zero-shot:
    the student's logits on caption images are matched to the unquantized encoder's, and no label is used. Raises
    UserError for another source. Source: Guo et al. 2017, with the logit scale as the inverse temperature.
    """

    @checked
    def __init__(self, source: Annotated[str, OneOf("calibration", "proxy")] = "calibration") -> None:
        self.source = source

    @property
    def stage(self) -> str:
        """Return the stage that the refitted model's rows carry."""
        return "temperature" if self.source == "calibration" else "temperature_proxy"

    def fit(self, cosines: Tensor, targets: Tensor, current: float) -> Fit:
        """Return the fit on ``cosines`` (N, C) to ``targets``, which are labels (N,) or probabilities (N, C).

        ``current`` is the logit scale before the fit.
        """
        return fit_logit_scale(cosines, targets, current=current)

    def row(self, fit: Fit, definition: str) -> Row:
        """Return the row of a fit on the images of ``definition``: the scale, the NLL before and after, ``at_bound``.

        A scale at its bound (at_bound = 1) is not used, because the images do not determine the scale.
        """
        # A fit belongs to no set of the suite, so "dataset" and "reference" name the origin of its images.
        return {
            "stage": self.stage,
            "logit_scale": fit.logit_scale,
            "dataset": self.source,
            "role": "calibration",
            "reference": self.source,
            "definition": definition,
            "definition_version": DEFINITION_VERSION,
            "score": FIT,
            "n": fit.images,
            "temperature": None,
            "metrics": {"nll_before": fit.nll_before, "nll": fit.nll_after, "at_bound": float(fit.at_bound)},
            "intervals": {},
            "paired": {},
        }
