"""Refit of the logit scale (temperature scaling) after quantization, on images that are never scored."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from qatlab.errors import UserError
from qatlab.evaluation import Columns, Evaluation, Prediction, Row
from qatlab.metrics.temperature import Fit, fit_logit_scale

Origin = Literal["calibration", "proxy"]


class Temperature(Evaluation):
    """Fits the logit scale that the last stage is scored with a second time.

    ``source="calibration"`` uses the suite's labelled calibration split; ``source="proxy"`` keeps to strict zero-shot: the
    student's logits on caption images are matched to the unquantized encoder's, and no label is used. Raises UserError
    for another source. Source: Guo et al. 2017, with the logit scale as the inverse temperature.
    """

    roles = ()

    def __init__(self, source: Origin = "calibration") -> None:
        super().__init__()
        if source not in ("calibration", "proxy"):
            raise UserError(f"callbacks.temperature.source={source} is unknown; there are calibration, proxy.")
        self.source = source

    @property
    def stage(self) -> str:
        """Return the stage that the refitted model's rows carry."""
        return "temperature" if self.source == "calibration" else "temperature_proxy"

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Forget the last pass and read how many classes the heads have."""
        self.widths = {"cosines": max(len(head.names) for head in pl_module.classes.values())}
        super().on_validation_start(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take the batches of the calibration split, the ones that no other evaluation gets."""
        if outputs.source.role == "calibration":
            self.update(outputs)

    def reset(self) -> None:
        """Forget the calibration images seen."""
        self.seen = Columns(["cosines", "labels"], self.widths).to(self.device)

    def update(self, prediction: Prediction) -> None:
        """Keep one batch of the calibration split."""
        self.seen.update(prediction.index, cosines=prediction.cosines, labels=prediction.labels)

    def fit(self, current: float) -> Fit:
        """Return the fit on the calibration split that the last pass embedded, gathered over ranks."""
        columns = self.seen.compute()
        return self.fitted(torch.from_numpy(columns["cosines"]), torch.from_numpy(columns["labels"]).long(), current)

    def fitted(self, cosines: Tensor, targets: Tensor, current: float) -> Fit:
        """Return the fit on ``cosines`` (N, C) with labels (N,) or target probabilities (N, C)."""
        self.count = len(targets)
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
            "n": self.count,
            "metrics": {"nll_before": fit.nll_before, "nll": fit.nll_after, "at_bound": float(fit.at_bound)},
        }

    def compute(self) -> list[Row]:
        """Return no rows: the refitted scale is read by the views of the next pass."""
        return []
