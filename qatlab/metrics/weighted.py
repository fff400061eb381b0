"""Classification metrics of many resamples at once, each given as counts of the images."""

from __future__ import annotations

import numpy as np

from qatlab.metrics.bins import equal_width
from qatlab.metrics.smooth import CELLS, on_grid, smooth_errors


class Classified:
    """The images of one set, sorted in the orders in which their resamples are summed.

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
        # All calibration errors read the images in the order of
        # confidence, in which a bin or a tie is one run of columns.
        self.order = np.argsort(confidence, kind="stable")
        self.confidence, self.correct = confidence[self.order], correct[self.order]
        self.residual = self.correct - self.confidence
        self.means = {"nll": nll, "brier": brier, "top1": correct, "top5": (rank < 5).astype(np.float64)}
        self.groups = _starts(self.confidence)
        self.bins = _starts(equal_width(self.confidence, n_bins))
        self.by_class = np.argsort(labels, kind="stable")
        self.classes, self.hits = _starts(labels[self.by_class]), correct[self.by_class]
        self.cells, self.shares = on_grid(self.confidence)
        # Place n holds 1 + 1/2 + ... + 1/n, so that the sum of 1/j over a run of ranks is a difference of two places.
        self.harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, self.images + 1))]

    def measures(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Return {metric: (R,) float64} of ``counts`` (R, N), integers that sum to N in each row."""
        weights = counts.astype(np.float64)
        # einsum sums every row separately, so that a replicate has the same bits in blocks of any size.
        sums = {name: np.einsum("rn,n->r", weights, values) for name, values in self.means.items()}
        found = {name: total / self.images for name, total in sums.items()}
        found["mean_per_class"] = self._mean_per_class(counts)
        sorted_counts = counts[:, self.order]
        # Σ over a bin of (hit − confidence) is its size times (accuracy − confidence), which every binned error needs.
        residuals = sorted_counts * self.residual
        found["confidence_gap"] = -residuals.sum(axis=1) / self.images
        per_bin = np.add.reduceat(residuals, self.bins, axis=1)
        found["ece"] = np.abs(per_bin).sum(axis=1) / self.images
        in_bin = np.add.reduceat(sorted_counts, self.bins, axis=1)
        # A bin without drawn images has the residual 0, and the 1 avoids 0/0 there.
        found["mce"] = np.max(np.abs(per_bin) / np.maximum(in_bin, 1), axis=1)
        found["ece_equal_mass"] = self._equal_mass(sorted_counts, residuals)
        found["smooth_ece"] = self._smooth(residuals)
        found["aurc"] = self._aurc(sorted_counts)
        return found

    def _mean_per_class(self, counts: np.ndarray) -> np.ndarray:
        drawn = counts[:, self.by_class]
        images = np.add.reduceat(drawn, self.classes, axis=1)
        hits = np.add.reduceat(drawn * self.hits, self.classes, axis=1)
        # A class that a resample did not draw has no accuracy and is left out of its mean.
        return (hits / np.maximum(images, 1)).sum(axis=1) / (images > 0).sum(axis=1)

    def _equal_mass(self, counts: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        """Return the equal-mass error of each resample, (R,) float64.

        ``counts`` and ``residuals`` (R, N) are in the order of confidence. Bins are cut anew in each
        resample: a run of equal confidences lies in the bin where the images below it end.
        """
        in_group = np.add.reduceat(counts, self.groups, axis=1)
        lower = np.cumsum(in_group, axis=1, dtype=np.int64) - in_group
        position = lower * self.n_bins // self.images
        # A group above all drawn images would get a bin that does
        # not exist. Such a group was not drawn and adds nothing.
        position = np.minimum(position, self.n_bins - 1) + np.arange(len(counts))[:, None] * self.n_bins
        weights = np.add.reduceat(residuals, self.groups, axis=1)
        per_bin = np.bincount(position.ravel(), weights=weights.ravel(), minlength=len(counts) * self.n_bins)
        return np.abs(per_bin.reshape(len(counts), -1)).sum(axis=1) / self.images

    def _smooth(self, residuals: np.ndarray) -> np.ndarray:
        lower, upper = self._on_points(residuals, 0), self._on_points(residuals, 1)
        return smooth_errors((lower + upper) / self.images)

    def _on_points(self, residuals: np.ndarray, neighbour: int) -> np.ndarray:
        """Return the residuals (R, N) summed on the grid point below (0) or above (1) each image, (R, 2048)."""
        cells, shares = self.cells[neighbour], self.shares[neighbour]
        return np.stack([np.bincount(cells, weights=row * shares, minlength=CELLS) for row in residuals])

    def _aurc(self, counts: np.ndarray) -> np.ndarray:
        """Return the area under the risk-coverage curve of each resample, (R,) float64, of ``counts`` (R, N).

        A group of m equal confidences, with the share ē of errors, comes after n more confident images with E errors.
        The mean over the orders of the group adds Σ_j (E + j ē)/(n + j), j = 1..m = m ē + (E − n ē) Σ_j 1/(n + j).
        """
        # The columns are reversed, because the curve starts at the most confident images.
        images = np.add.reduceat(counts, self.groups, axis=1)[:, ::-1]
        errors = np.add.reduceat(counts * (1 - self.correct), self.groups, axis=1)[:, ::-1]
        through, wrong = np.cumsum(images, axis=1, dtype=np.int64), np.cumsum(errors, axis=1)
        above, share = through - images, errors / np.maximum(images, 1)
        excess = (wrong - errors) - above * share
        terms = images * share + excess * (self.harmonic[through] - self.harmonic[above])
        return terms.sum(axis=1) / self.images


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Return where each run of equal values starts, (runs,) int64, for ``np.add.reduceat``."""
    return np.r_[0, np.flatnonzero(np.diff(ordered)) + 1]
