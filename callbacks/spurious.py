"""How much of the accuracy hangs on the background: the same classes before their usual and before another background."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatlab.evaluation import Evaluation, Prediction, Row, Source, View, row
from qatlab.metrics.bootstrap import bootstrap_means
from qatlab.metrics.paired import Difference, paired_bootstrap
from qatlab.metrics.resampling import percentile_interval

CONFUSED = 20
"""Classes of the easier protocol: the image's own and those most confused with it."""

_Batch = tuple[Tensor, Tensor]
_Key = tuple[View, str]  # a view and a protocol


class Spurious(Evaluation):
    """One row per view, pair of a common and a counter set, and protocol: accuracies, drop, RSG and added vulnerability.

    ``one_vs_all`` is measured among all classes of the reference; ``one_vs_20`` among the image's own class and the 19
    to which FP32 (without it: the pass's first view) gives most probability, on average over that class's images of
    both sets. drop = A_common - A_counter, rsg = drop / A_common. With an FP32 view: vulnerability =
    d_counter - d_common, d = (A_fp32 - A) / A_fp32 the relative loss of each set. Each with its bootstrap interval, the
    two sets resampled apart, and drop and rsg with their differences from FP32. A probe has no rows. The sets are
    CounterAnimal's, Wang et al. 2024, whose own 20 classes come from one LAION model; the measures are the paper's.
    """

    roles = ("common", "counter")

    def reset(self) -> None:
        """Forget everything seen."""
        self.seen: dict[tuple[View, Source], list[tuple[Tensor, Tensor, Tensor]]] = {}

    def update(self, prediction: Prediction) -> None:
        """Keep one batch of either side."""
        if prediction.source.role in self.roles and not self.of.shared:
            for view in prediction.views:
                # Views of one encoder keep the same tensors.
                batch = prediction.index, prediction.cosines, prediction.labels
                self.seen.setdefault((view, prediction.source), []).append(batch)

    def compute(self) -> list[Row]:
        """Return the rows; a counter set without its common one, or the other way round, has none."""
        return [row for pair in self._pairs() for row in self._rows(*pair)]

    def _rows(self, common: Source, counter: Source) -> Iterator[Row]:
        hits = self._hits(common, counter)
        measured = _measured({key: (one.mean(), other.mean()) for key, (one, other) in hits.items()}, self.of.baseline)
        replicates = _measured(self._replicates(hits), self.of.baseline) if self.of.resamples else {}
        for (view, protocol), (one, other) in hits.items():
            values = {name: float(value) for name, value in measured[view, protocol].items()}
            drawn = replicates.get((view, protocol), {})
            intervals = {name: percentile_interval(of_metric) for name, of_metric in drawn.items()}
            paired: dict[str, Difference] = {}
            if drawn and view != self.of.baseline and self.of.baseline is not None:
                before, of_before = measured[self.of.baseline, protocol], replicates[self.of.baseline, protocol]
                paired = {
                    name: paired_bootstrap(values[name] - before[name], of_before[name], drawn[name])
                    for name in ("drop", "rsg")
                }
            yield row(view, counter, protocol, len(one) + len(other), values, intervals, paired)

    def _hits(self, common: Source, counter: Source) -> dict[_Key, list[np.ndarray]]:
        """Return, per view and protocol, whether each image of either side is right."""
        sides = {view: [self._merged(view, source) for source in (common, counter)] for view in self.of.views}
        first = self.of.views[0]
        confused = _confused(sides[first], first.logit_scale)
        return {
            (view, protocol): [_right(*side, classes) for side in sides[view]]
            for view in self.of.views
            for protocol, classes in (("one_vs_all", None), ("one_vs_20", confused))
        }

    def _replicates(self, hits: dict[_Key, list[np.ndarray]]) -> dict[_Key, Any]:
        sides = [
            bootstrap_means(np.stack(columns, axis=1), resamples=self.of.resamples, side=side)
            for side, columns in enumerate(zip(*hits.values(), strict=True), 1)
        ]
        return {key: [side[:, column] for side in sides] for column, key in enumerate(hits)}

    def _pairs(self) -> Iterator[tuple[Source, Source]]:
        sources = dict.fromkeys(source for _, source in self.seen)
        for reference in dict.fromkeys(source.reference for source in sources):
            # Of several pairs the first sides belong together, the second, and so on.
            yield from zip(
                *([s for s in sources if (s.role, s.reference) == (role, reference)] for role in self.roles),
                strict=False,
            )

    def _merged(self, view: View, source: Source) -> _Batch:
        index, cosines, labels = (torch.cat(parts) for parts in zip(*self.seen[view, source], strict=True))
        order = index.argsort()  # that of the images, whatever the batches: models are paired on it
        return cosines[order], labels[order]


def _confused(sides: list[_Batch], logit_scale: float) -> dict[int, Tensor]:
    """Return, per class with images, the classes it is told from, (at most 20,)."""
    cosines, labels = (torch.cat(parts) for parts in zip(*sides, strict=True))
    found = {}
    for label in labels.unique().tolist():
        mean = (cosines[labels == label].double() * logit_scale).softmax(1).mean(0)
        mean[label] = 2.0  # always among them
        found[label] = mean.topk(min(CONFUSED, len(mean))).indices.sort().values  # of equal cosines the first wins
    return found


def _right(cosines: Tensor, labels: Tensor, classes: dict[int, Tensor] | None) -> np.ndarray:
    """Return whether each image's class has the largest cosine, of all ``classes`` or of those it is told from, (N,)."""
    if classes is None:
        return (cosines.argmax(1) == labels).cpu().numpy()
    right = torch.empty(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        mine = labels == label
        right[mine.cpu()] = (classes[label][cosines[mine][:, classes[label]].argmax(1)] == label).cpu()
    return right.numpy()


def _measured(accuracies: dict[_Key, Any], baseline: View | None) -> dict[_Key, dict[str, Any]]:
    """Return the metrics of the accuracies on both sides, numbers or replicates of them."""
    found = {}
    for (view, protocol), (common, counter) in accuracies.items():
        drop = common - counter
        found[view, protocol] = {"common": common, "counter": counter, "drop": drop, "rsg": _share(drop, common)}
        if view != baseline and baseline is not None:
            losses = [
                _share(before - now, before)
                for before, now in zip(accuracies[baseline, protocol], (common, counter), strict=True)
            ]
            found[view, protocol]["vulnerability"] = losses[1] - losses[0]
    return found


def _share(part: Any, whole: Any) -> Any:
    """Return part / whole, NaN of nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, np.divide(part, whole), np.nan)
