"""What an evaluation is fed with, and the base of the callbacks that turn it into rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from qatlab.metrics.calibration import ZeroShot, score_zero_shot
from qatlab.metrics.ood import score_images
from qatlab.metrics.paired import Difference
from qatlab.metrics.resampling import Interval


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
class View:
    """One reading of the same cosines: the stage it is reported under and the logit scale s that multiplies them.

    ``basis`` is the definition of the set that the scale was fitted on, or the hash of the exported model that is read, and
    "" for neither.
    """

    stage: str
    logit_scale: float
    basis: str = ""

    @property
    def fitted(self) -> bool:
        """Return whether the logit scale is the refit's."""
        return self.stage.startswith("temperature")

    def definition(self, source: Source) -> str:
        """Return what the rows of a set rest on under this view: the set's definition and the ``basis``."""
        return "+".join(filter(None, [source.definition, self.basis]))


@dataclass(frozen=True)
class Prediction:
    """One embedded batch of one set, as some views read it.

    ``features`` (B, D) float32 unit vectors; ``cosines`` (B, C) float32 before any temperature, C the classes of the
    ID reference; ``labels`` (B,) int64, -1 where the set has none; ``index`` (B,) int64, the position in the set, which
    makes the numbers independent of how ranks and workers share the images. ``ood_cosines`` (B, C) are those of the OOD
    scores where these have prompts of their own, ``rows`` the classes that accuracy is measured on where the set has some
    of them only, and ``inputs`` what ``qatlab.metrics.ood.score_images`` takes besides.
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
        return self.cosines[:, rows], torch.searchsorted(rows, self.labels)

    def zero_shot(self, view: View) -> ZeroShot:
        """Return what is scored of every image and its label under a view."""
        return score_zero_shot(*self.classified(), view.logit_scale)

    def ood_scores(self, names: Sequence[str], view: View, temperature: float) -> dict[str, Tensor]:
        """Return {name: (B,) float64} of the named OOD scores under a view, ``temperature`` being MCM's."""
        cosines = self.cosines if self.ood_cosines is None else self.ood_cosines
        return score_images(names, cosines, view.logit_scale, temperature, features=self.features, **self.inputs)


Row = dict[str, Any]


class Columns(Metric):
    """Per-image values of one set, gathered over ranks and returned in the order of the images.

    ``update(index, **columns)`` takes (B,) tensors, kept as float64; ``compute()`` returns {name: (N,) float64 array}
    with "index" (int64) beside them, sorted by index and each image once, so sums come out equal to the last bit on any
    number of processes. Arrays, because torchmetrics squeezes a tensor of a single image to no dimension at all.
    ``shared`` says whether the ranks saw some of the images each; without it nothing is gathered.
    """

    full_state_update = False

    def __init__(self, names: list[str], shared: bool = True) -> None:
        super().__init__(sync_on_compute=shared)
        self.names = names
        for name in ["index", *names]:
            self.add_state(name, default=[], dist_reduce_fx="cat")
        # A rank that sees no image of the set must still join the gathering with the right dtypes.
        self.update(torch.empty(0, dtype=torch.int64), **{name: torch.empty(0) for name in names})

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


@dataclass(frozen=True)
class Pass:
    """What a pass over a suite is about: the ``views``, FP32's first where it is one, and the sets in scored order.

    ``folder`` takes files of the evaluations' own, None keeps none. ``shared``: every rank is fed with a part of the
    images, as in a probe; else one process with all of them. ``resamples`` of the bootstrap behind each interval, 0 for
    none. ``available`` {ID reference: inputs of OOD scores that are there}.
    """

    views: Sequence[View]
    sources: Sequence[Source]
    device: torch.device
    folder: Path | None = None
    shared: bool = False
    resamples: int = 0
    available: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def baseline(self) -> View | None:
        """Return the view that others are paired with, if any."""
        return next((view for view in self.views if view.stage == "fp32"), None)


ALWAYS = frozenset({"cosines", "logit_scale", "temperature", "features"})
"""The inputs of OOD scores that every pass has."""


class Evaluation(L.Callback):
    """Base of every evaluation: fed with each Prediction of a pass over a suite, it gives rows at the end.

    The same object serves the probe during training, which is the trainer's validation loop, and the whole suite, whose
    features are read from the store. A subclass writes ``reset``, ``update`` and ``compute``.
    """

    roles: ClassVar[tuple[str, ...]] = ("id", "shifted", "near_ood", "far_ood")
    """The roles of the sets that get rows."""

    of: Pass

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start a probe."""
        available = dict.fromkeys(pl_module.heads, ALWAYS)
        self.start(Pass(pl_module.views, pl_module.sources, pl_module.device, shared=True, available=available))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hand the batch's Prediction on."""
        self.update(outputs)

    def start(self, of: Pass) -> None:
        """Forget the last pass."""
        self.of = of
        self.reset()

    def table(self, names: list[str]) -> Columns:
        """Return an empty table; every rank makes the same ones in the same order."""
        return Columns(names, self.of.shared).to(self.of.device)

    def tables(self, sources: list[Source], names: list[str]) -> dict[tuple[View, Source], Columns]:
        """Return an empty table per view and set."""
        return {(view, source): self.table(names) for view in self.of.views for source in sources}

    def reset(self) -> None:
        """Forget everything seen."""
        raise NotImplementedError

    def update(self, prediction: Prediction) -> None:
        """Take one embedded batch."""
        raise NotImplementedError

    def compute(self) -> list[Row]:
        """Return one row per (view, set, score), see ``row``; called on every rank of a probe, for it gathers over them."""
        raise NotImplementedError


def row(
    view: View,
    source: Source,
    score: str,
    n: int,
    metrics: dict[str, float],
    intervals: Mapping[str, Interval] | None = None,
    paired: Mapping[str, Difference] | None = None,
    temperature: float | None = None,
) -> Row:
    """Return one result: how ``score`` did on the ``n`` images of a set under one view; fractions or nats.

    ``intervals`` are 95 % ones by metric, ``paired`` the differences from FP32 on the same images; ``temperature`` is that
    of a score which has one.
    """
    return {
        "stage": view.stage,
        "logit_scale": view.logit_scale,
        "dataset": source.name,
        "role": source.role,
        "reference": source.reference,
        "definition": view.definition(source),
        "score": score,
        "n": n,
        "temperature": temperature,
        "metrics": metrics,
        "intervals": {name: list(interval) for name, interval in (intervals or {}).items()},
        "paired": {name: difference._asdict() for name, difference in (paired or {}).items()},
    }
