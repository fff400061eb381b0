"""Classification metrics of many resamples at once, each given as counts of the images."""

from __future__ import annotations

import numpy as np

from qatlab.metrics.bins import equal_width
from qatlab.metrics.smooth import CELLS, on_grid, smooth_errors


class Classified:
    """Images of one set, brought into the orders in which their resamples are summed.

    ``confidence``, ``correct`` (0 or 1), ``nll``, ``brier`` float64, ``labels`` and ``rank`` integers, (N,) each.
    """

    def __init__(
        self,
        confidence: np.ndarray,
        correct: np.ndarray,
        labels: np.ndarray,
        nll: np.ndarray,
        brier: np.ndarray,
        rank: np.ndarray,
        n_bins: int = 15,
    ) -> None:
        self.images, self.n_bins = len(confidence), n_bins
        self.order = np.argsort(confidence, kind="stable")
        self.confidence, self.correct = confidence[self.order], correct[self.order]
        self.residual = self.correct - self.confidence
        self.means = {"nll": nll, "brier": brier, "top1": correct, "top5": (rank < 5).astype(np.float64)}
        self.groups = _starts(self.confidence)
        self.bins = _starts(equal_width(self.confidence, n_bins))
        self.by_class = np.argsort(labels, kind="stable")
        self.classes, self.hits = _starts(labels[self.by_class]), correct[self.by_class]
        self.cells, self.shares = on_grid(self.confidence)
        self.harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, self.images + 1))]

    def measures(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Return {metric: (R,) float64} of ``counts`` (R, N), integers that sum to N in each row."""
        weights = counts.astype(np.float64)
        sums = {name: np.einsum("rn,n->r", weights, values) for name, values in self.means.items()}
        found = {name: total / self.images for name, total in sums.items()}
        found["mean_per_class"] = self._mean_per_class(counts)
        sorted_counts = counts[:, self.order]
        residuals = sorted_counts * self.residual
        found["confidence_gap"] = -residuals.sum(axis=1) / self.images
        per_bin = np.add.reduceat(residuals, self.bins, axis=1)
        found["ece"] = np.abs(per_bin).sum(axis=1) / self.images
        in_bin = np.add.reduceat(sorted_counts, self.bins, axis=1)
        found["mce"] = np.max(np.abs(per_bin) / np.maximum(in_bin, 1), axis=1)
        found["ece_equal_mass"] = self._equal_mass(sorted_counts, residuals)
        found["smooth_ece"] = self._smooth(residuals)
        found["aurc"] = self._aurc(sorted_counts)
        return found

    def _mean_per_class(self, counts: np.ndarray) -> np.ndarray:
        drawn = counts[:, self.by_class]
        images = np.add.reduceat(drawn, self.classes, axis=1)
        hits = np.add.reduceat(drawn * self.hits, self.classes, axis=1)
        return (hits / np.maximum(images, 1)).sum(axis=1) / (images > 0).sum(axis=1)

    def _equal_mass(self, counts: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        """Bins are cut anew in each resample: a run of equal confidences goes where the images below it end."""
        in_group = np.add.reduceat(counts, self.groups, axis=1)
        lower = np.cumsum(in_group, axis=1, dtype=np.int64) - in_group
        position = lower * self.n_bins // self.images
        # a group that was not drawn may lie behind the last bin, with nothing to add to it
        position = np.minimum(position, self.n_bins - 1) + np.arange(len(counts))[:, None] * self.n_bins
        weights = np.add.reduceat(residuals, self.groups, axis=1)
        per_bin = np.bincount(position.ravel(), weights=weights.ravel(), minlength=len(counts) * self.n_bins)
        return np.abs(per_bin.reshape(len(counts), -1)).sum(axis=1) / self.images

    def _smooth(self, residuals: np.ndarray) -> np.ndarray:
        lower, upper = (
            np.stack([np.bincount(cells, weights=row * shares, minlength=CELLS) for row in residuals])
            for cells, shares in zip(self.cells, self.shares, strict=True)
        )
        return smooth_errors((lower + upper) / self.images)

    def _aurc(self, counts: np.ndarray) -> np.ndarray:
        """With n images above a group of m with the share ē of errors, E errors above: Σ_j (E + j ē)/(n + j), j = 1..m."""
        images = np.add.reduceat(counts, self.groups, axis=1)[:, ::-1]
        errors = np.add.reduceat(counts * (1 - self.correct), self.groups, axis=1)[:, ::-1]
        through, wrong = np.cumsum(images, axis=1, dtype=np.int64), np.cumsum(errors, axis=1)
        above, share = through - images, errors / np.maximum(images, 1)
        excess = (wrong - errors) - above * share
        terms = images * share + excess * (self.harmonic[through] - self.harmonic[above])
        return terms.sum(axis=1) / self.images


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Return where each run of equal values starts."""
    return np.r_[0, np.flatnonzero(np.diff(ordered)) + 1]
