"""How much of the accuracy depends on the background: the same classes in front of usual and of other backgrounds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatlab.evaluation.evaluation import Evaluation, Pass, row
from qatlab.evaluation.prediction import Prediction
from qatlab.metrics.bootstrap import bootstrap_means
from qatlab.metrics.paired import Difference, paired_bootstrap
from qatlab.metrics.resampling import percentile_interval
from qatlab.results.rowfile import Row
from qatlab.suites.source import Source, View

CONFUSED = 20
"""The number of classes of the easier protocol: the image's own class and the 19 most confused with it."""

PROTOCOLS = ("one_vs_all", "one_vs_20")

_Batch = tuple[Tensor, Tensor]
_Key = tuple[View, str]  # a view and the name of a protocol


class Spurious(Evaluation):
    """One row per view, pair of a common and a counter set, and protocol: accuracies, drop, RSG, added vulnerability.

    ``one_vs_all`` is measured among all classes of the reference; ``one_vs_20`` among the image's own class and the 19
    to which FP32 (without it: the pass's first view) gives most probability, on average over that class's images of
    both sets. drop = A_common - A_counter, rsg = drop / A_common. With an FP32 view: vulnerability =
    d_counter - d_common, where d = (A_fp32 - A) / A_fp32 is the relative loss on a set. Every metric has a bootstrap
    interval, with the two sets resampled apart; drop and rsg have differences from FP32. A probe has no rows. Sets and
    measures are CounterAnimal's (Wang et al. 2024), whose own 20 classes come from one LAION model.
    """

    roles = ("common", "counter")

    def reset(self) -> None:
        """Forget everything seen."""
        self.seen: dict[tuple[View, Source], list[tuple[Tensor, Tensor, Tensor]]] = {}

    def update(self, prediction: Prediction) -> None:
        """Keep one batch of a common or a counter set."""
        if prediction.source.role in self.roles and not self.of.shared:
            for view in prediction.views:
                # The views of one encoder share these tensors, so a second view takes no more memory.
                batch = prediction.index, prediction.cosines, prediction.labels
                self.seen.setdefault((view, prediction.source), []).append(batch)

    def expected(self, of: Pass, images: Mapping[Source, int]) -> Iterator[tuple[View, Source, str]]:
        """Yield the row of each view, counter set with a common one, and protocol."""
        # The rows of a pair carry the name of its counter set.
        for _, counter in self._pairs(of.sources):
            for view in of.views:
                yield from ((view, counter, protocol) for protocol in PROTOCOLS)

    def compute(self) -> list[Row]:
        """Return the rows; a counter set without its common one, or the other way round, has none."""
        sources = dict.fromkeys(source for _, source in self.seen)
        return [row for pair in self._pairs(sources) for row in self._rows(*pair)]

    def _rows(self, common: Source, counter: Source) -> Iterator[Row]:
        """Yield the rows of one pair of sets."""
        hits = self._hits(common, counter)
        accuracies = {key: (one.mean(), other.mean()) for key, (one, other) in hits.items()}
        measured = _measured(accuracies, self.of.baseline)
        # _measured works on arrays of replicates as well as on numbers.
        replicates = _measured(self._replicates(hits), self.of.baseline) if self.of.resamples else {}
        for (view, protocol), (one, other) in hits.items():
            values = {name: float(value) for name, value in measured[view, protocol].items()}
            drawn = replicates.get((view, protocol), {})
            intervals = {name: percentile_interval(of_metric) for name, of_metric in drawn.items()}
            paired: dict[str, Difference] = {}
            if drawn and view != self.of.baseline and self.of.baseline is not None:
                before, of_before = measured[self.of.baseline, protocol], replicates[self.of.baseline, protocol]
                for name in ("drop", "rsg"):
                    paired[name] = paired_bootstrap(values[name] - before[name], of_before[name], drawn[name])
            yield row(view, counter, protocol, len(one) + len(other), values, intervals, paired)

    def _hits(self, common: Source, counter: Source) -> dict[_Key, list[np.ndarray]]:
        """Return, per view and protocol, whether each image of either side is right."""
        sides: dict[View, list[_Batch]] = {}
        for view in self.of.views:
            sides[view] = [self._merged(view, source) for source in (common, counter)]
        # The first view, which is FP32's where there is one, chooses the 20 classes for all views. With classes of its
        # own each view would be measured on another task.
        first = self.of.views[0]
        confused = _confused(sides[first], first.logit_scale)
        hits: dict[_Key, list[np.ndarray]] = {}
        for view in self.of.views:
            for protocol, classes in zip(PROTOCOLS, (None, confused), strict=True):
                hits[view, protocol] = [_right(*side, classes) for side in sides[view]]
        return hits

    def _replicates(self, hits: dict[_Key, list[np.ndarray]]) -> dict[_Key, Any]:
        """Return, per view and protocol, the accuracies of both sides in every resample, (resamples,) each.

        The images of a side are drawn once for all views and protocols, so that these can be paired.
        """
        sides = []
        for side, columns in enumerate(zip(*hits.values(), strict=True), 1):
            sides.append(bootstrap_means(np.stack(columns, axis=1), resamples=self.of.resamples, side=side))
        replicates: dict[_Key, Any] = {}
        for column, key in enumerate(hits):
            replicates[key] = [side[:, column] for side in sides]
        return replicates

    def _pairs(self, sources: Iterable[Source]) -> Iterator[tuple[Source, Source]]:
        """Yield every (common set, counter set) of one ID reference."""
        sources = list(sources)
        for reference in dict.fromkeys(source.reference for source in sources):
            of_reference = [source for source in sources if source.reference == reference]
            common = [source for source in of_reference if source.role == "common"]
            counter = [source for source in of_reference if source.role == "counter"]
            # The first common set belongs to the first counter set, the second to the second, and so on.
            yield from zip(common, counter, strict=False)

    def _merged(self, view: View, source: Source) -> _Batch:
        """Return cosines (N, C) and labels (N,) of a set's images in their order."""
        index, cosines, labels = (torch.cat(parts) for parts in zip(*self.seen[view, source], strict=True))
        order = index.argsort()  # the set's own order, because models are compared image by image
        return cosines[order], labels[order]


def _confused(sides: list[_Batch], logit_scale: float) -> dict[int, Tensor]:
    """Return {class: its alternatives and itself, (at most 20,)} for every class that has images."""
    cosines, labels = (torch.cat(parts) for parts in zip(*sides, strict=True))
    found = {}
    for label in labels.unique().tolist():
        mean = (cosines[labels == label].double() * logit_scale).softmax(1).mean(0)
        mean[label] = 2.0  # above every probability: the class itself is always among the 20
        # Sorted classes make argmax take the smaller class number of two equal cosines, as it does among all classes.
        found[label] = mean.topk(min(CONFUSED, len(mean))).indices.sort().values
    return found


def _right(cosines: Tensor, labels: Tensor, classes: dict[int, Tensor] | None) -> np.ndarray:
    """Return whether each image's class has the largest cosine, among all classes or ``classes`` of its label, (N,)."""
    if classes is None:
        return (cosines.argmax(1) == labels).cpu().numpy()
    # All images of a class have the same alternatives, so one comparison serves a whole class.
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
    """Return part / whole, or NaN where ``whole`` is 0 and the share is therefore undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, np.divide(part, whole), np.nan)
