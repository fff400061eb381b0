"""The base of the callbacks that turn predictions into rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch

from qatlab.evaluation.columns import Columns
from qatlab.evaluation.prediction import Prediction
from qatlab.metrics.paired import Difference
from qatlab.metrics.resampling import Interval
from qatlab.results.rowfile import DEFINITION_VERSION, Row
from qatlab.results.stages import FP32
from qatlab.suites.source import Source, View

Stored = Mapping[tuple["View", "Source"], set[str]]
"""The names of the scores whose rows a run has, by view and set."""


@dataclass(frozen=True)
class Pass:
    """A pass over a suite: the ``views``, FP32's first if there is one, and the sets in the order of scoring.

    ``folder`` is where evaluations may write files of their own, None for nowhere. ``shared`` means that every rank is
    fed with a part of the images, as in a probe; else one process gets all of them. ``resamples`` is the number of
    bootstrap resamples behind each interval, 0 for none. ``available`` is {ID reference: inputs of OOD scores that can
    be given}.
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
        """Return the view that others are compared with, if any."""
        return next((view for view in self.views if view.stage == FP32), None)

    def before(self, view: View) -> View | None:
        """Return the view whose logit scale was refitted to become that of ``view``, if any."""
        return next((other for other in self.views if other.stage == view.before), None)


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
        # A probe encodes no texts and fits nothing on calibration images,
        # so scores that need either are computed only on the whole suite.
        available = dict.fromkeys(pl_module.heads, ALWAYS)
        self.start(Pass(pl_module.views, pl_module.sources, pl_module.device, shared=True, available=available))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take the Prediction that the validation step gave for a batch."""
        self.update(outputs)

    def start(self, of: Pass) -> None:
        """Begin the pass ``of``, and forget what was seen in an earlier pass."""
        self.of = of
        self.reset()

    def table(self, names: list[str]) -> Columns:
        """Return an empty table of columns; every rank makes the same tables in the same order, to join them."""
        return Columns(names, self.of.shared).to(self.of.device)

    def tables(self, sources: list[Source], names: list[str]) -> dict[tuple[View, Source], Columns]:
        """Return an empty table per view and set."""
        return {(view, source): self.table(names) for view in self.of.views for source in sources}

    def reset(self) -> None:
        """Forget everything seen."""
        raise NotImplementedError

    def update(self, prediction: Prediction) -> None:
        """Take in one embedded batch."""
        raise NotImplementedError

    def compute(self) -> list[Row]:
        """Return one row per (view, set, score), see ``row``; in a probe every rank calls this, because it gathers."""
        raise NotImplementedError

    def expected(self, of: Pass, images: Mapping[Source, int]) -> Iterator[tuple[View, Source, str | None]]:
        """Yield (view, set, score) of every row that ``compute`` gives after a pass over the whole suite.

        ``images`` are the numbers of images of the sets. A score of None, as here, stands for any row of the set: an
        evaluation that does not name its scores does not notice a single lost row.
        """
        for view in of.views:
            for source in of.sources:
                if source.role in self.roles:
                    yield view, source, None

    def lacking(self, of: Pass, images: Mapping[Source, int], stored: Stored) -> set[tuple[View, Source]]:
        """Return the views and sets some of whose ``expected`` rows are not ``stored``."""
        lacking = set()
        for view, source, score in self.expected(of, images):
            found = stored.get((view, source), set())
            # A score of None names no score, so any row of the set will do.
            if not found or (score is not None and score not in found):
                lacking.add((view, source))
        return lacking


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

    ``intervals`` are 95 % intervals by metric, ``paired`` the differences from FP32 on the same images; ``temperature``
    is that of a score that has one.
    """
    return {
        "stage": view.stage,
        "logit_scale": view.logit_scale,
        "dataset": source.name,
        "role": source.role,
        "reference": source.reference,
        "definition": view.definition(source),
        "definition_version": DEFINITION_VERSION,
        "score": score,
        "n": n,
        "temperature": temperature,
        "metrics": metrics,
        # Lists are stored, because JSON has no tuples: a new row then equals the same row read back from the file.
        "intervals": {name: list(interval) for name, interval in (intervals or {}).items()},
        "paired": {name: difference._asdict() for name, difference in (paired or {}).items()},
    }
