"""What an evaluation is fed with, and the base of the callbacks that turn it into rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass(frozen=True)
class Source:
    """One evaluated set: its name, its role (id | near_ood | far_ood | shifted | calibration) and its ID reference.

    ``definition`` is a hash of what its numbers rest on: which images, reference and classes, which evaluations. A stored
    row stands for a set only while that stays the same.
    """

    name: str
    role: str
    reference: str
    definition: str = ""


@dataclass(frozen=True)
class Prediction:
    """One embedded batch of one set.

    ``features`` (B, D) float32 unit vectors; ``cosines`` (B, C) float32 before any temperature, C the classes of the
    ID reference; ``labels`` (B,) int64, -1 where the set has none; ``index`` (B,) int64, the position in the set, which
    makes the numbers independent of how ranks and workers share the images.
    """

    source: Source
    features: Tensor
    cosines: Tensor
    labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class View:
    """One reading of the same cosines: the stage it is reported under and the logit scale s that multiplies them.

    ``basis`` is the definition of the set that the scale was fitted on, "" where it was not fitted.
    """

    stage: str
    logit_scale: float
    basis: str = ""

    def definition(self, source: Source) -> str:
        """Return what the rows of a set rest on under this view: the set's definition, and the refit's."""
        return "+".join(filter(None, [source.definition, self.basis]))


Row = dict[str, Any]


class Columns(Metric):
    """Per-image values of one set, gathered over ranks and returned in the order of the images.

    ``update(index, **columns)`` takes (B,) tensors, or (B, W) where ``widths`` gives a column's W, kept as float64;
    ``compute()`` returns {name: (N,) or (N, W) float64 array} with "index" (int64) beside them, sorted by index
    and each image once, so sums come out equal to the last bit on any number of processes. Arrays,
    because torchmetrics squeezes a tensor of a single image to no dimension at all.
    """

    full_state_update = False

    def __init__(self, names: list[str], widths: dict[str, int] | None = None) -> None:
        super().__init__()
        self.names = names
        for name in ["index", *names]:
            self.add_state(name, default=[], dist_reduce_fx="cat")
        # A rank that sees no image of the set must still join the gathering with the right dtypes.
        empty = {name: torch.empty(0, *([widths[name]] if widths and name in widths else [])) for name in names}
        self.update(torch.empty(0, dtype=torch.int64), **empty)

    def update(self, index: Tensor, **columns: Tensor) -> None:
        """Append one batch; raises KeyError when a column is missing."""
        for name, values in {"index": index, **{name: columns[name].double() for name in self.names}}.items():
            getattr(self, name).append(values)

    def compute(self) -> dict[str, np.ndarray]:
        """Return the columns sorted by image index; an image that two ranks saw (a padded share) counts once."""
        merged = {name: _concatenated(getattr(self, name)) for name in ["index", *self.names]}
        _, first = np.unique(merged["index"], return_index=True)
        return {name: values[first] for name, values in merged.items()}


def _concatenated(state: list[Tensor] | Tensor) -> np.ndarray:
    """After a reduction over ranks torchmetrics leaves a tensor, before it a list."""
    return (torch.cat(state) if isinstance(state, list) else state).cpu().numpy()


class Evaluation(L.Callback):
    """Base of every evaluation: fed with each Prediction of a pass over a suite, it gives rows at the end.

    The trainer's validation loop is the pass; the same object serves the probe suite during training and the full suite
    after it. A subclass writes ``reset``, ``update`` and ``compute``.
    """

    roles: ClassVar[tuple[str, ...]] = ("id", "shifted", "near_ood", "far_ood")
    """The roles of the sets that get rows."""

    views: list[View]
    sources: list[Source]

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Forget the last pass; read the sets this one is fed with and the views it is reported under."""
        self.views = pl_module.views
        self.sources = [source for source in pl_module.sources if source.role != "calibration"]
        self.device = pl_module.device
        self.reset()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hand the batch's Prediction on; calibration images are never scored."""
        if outputs.source.role != "calibration":
            self.update(outputs)

    def tables(self, sources: list[Source], names: list[str]) -> dict[tuple[View, Source], Columns]:
        """Return an empty table per view and set, the same ones in the same order on every rank."""
        return {(view, source): Columns(names).to(self.device) for view in self.views for source in sources}

    def reset(self) -> None:
        """Forget everything seen."""
        raise NotImplementedError

    def update(self, prediction: Prediction) -> None:
        """Take one embedded batch."""
        raise NotImplementedError

    def compute(self) -> list[Row]:
        """Return one row per (view, set, score), see ``row``; called on every rank, for it gathers over them."""
        raise NotImplementedError


def row(view: View, source: Source, score: str, n: int, metrics: dict[str, float]) -> Row:
    """Return one result: how ``score`` did on the ``n`` images of a set under one view; fractions or nats."""
    return {
        "stage": view.stage,
        "logit_scale": view.logit_scale,
        "dataset": source.name,
        "role": source.role,
        "reference": source.reference,
        "definition": view.definition(source),
        "score": score,
        "n": n,
        "metrics": metrics,
    }
