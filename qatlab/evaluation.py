"""What an evaluation is fed with, and the base of the callbacks that turn it into rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass(frozen=True)
class Source:
    """One evaluated set: its name, its role (id | near_ood | far_ood | shifted | calibration) and its ID reference's name."""

    name: str
    role: str
    reference: str


@dataclass(frozen=True)
class Prediction:
    """One embedded batch of one set.

    ``features`` (B, D) float32 unit vectors; ``cosines`` (B, C) float32 before any temperature, C the classes of the ID
    reference; ``labels`` (B,) int64, -1 where the set has none; ``index`` (B,) int64, the position in the set, which makes
    the numbers independent of how ranks and workers share the images.
    """

    source: Source
    features: Tensor
    cosines: Tensor
    labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class View:
    """One reading of the same cosines: the stage it is reported under and the logit scale s that multiplies them."""

    stage: str
    logit_scale: float


Row = dict[str, Any]


class Columns(Metric):
    """Per-image values of one set, gathered over ranks and returned in the order of the images.

    ``update(index, **columns)`` takes (B,) tensors; ``compute()`` returns {name: (N,) tensor} sorted by index, so sums come
    out equal to the last bit on any number of processes.
    """

    full_state_update = False

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for name in ["index", *names]:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, index: Tensor, **columns: Tensor) -> None:
        """Append one batch; raises KeyError when a column is missing."""
        self.index.append(index)
        for name in self.names:
            getattr(self, name).append(columns[name])

    def compute(self) -> dict[str, Tensor]:
        """Return the columns sorted by image index."""
        merged = {name: _concatenated(getattr(self, name)) for name in ["index", *self.names]}
        order = torch.argsort(merged["index"])
        return {name: values[order].cpu() for name, values in merged.items()}


def _concatenated(state: list[Tensor] | Tensor) -> Tensor:
    """After a reduction over ranks torchmetrics leaves a tensor, before it a list."""
    return torch.cat(state) if isinstance(state, list) else state


class Evaluation(L.Callback):
    """Base of every evaluation: fed with each Prediction of a pass over a suite, it gives rows at the end.

    The trainer's validation loop is the pass; the same object serves the probe suite during training and the full suite
    after it. A subclass writes ``reset``, ``update`` and ``compute``.
    """

    views: list[View]

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Forget the last pass and read the views (stage, logit scale) that this one is reported under."""
        self.views = pl_module.views
        self.device = pl_module.device
        self.reset()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hand the batch's Prediction on; calibration images are never scored."""
        if outputs.source.role != "calibration":
            self.update(outputs)

    def reset(self) -> None:
        """Forget everything seen."""
        raise NotImplementedError

    def update(self, prediction: Prediction) -> None:
        """Take one embedded batch."""
        raise NotImplementedError

    def compute(self) -> list[Row]:
        """Return one row per (view, set, score): stage, logit_scale, dataset, role, score, n, metrics {name: float}."""
        raise NotImplementedError
