"""Detection measures of many resamples at once, each given as counts of the ID and of the OOD images."""

from __future__ import annotations

import numpy as np

from qatlab.metrics.detection import at_least_95_percent


class Ranked:
    """One score of N ID and M OOD images, (N,) and (M,) float64, sorted once for all resamples."""

    def __init__(self, inside: np.ndarray, outside: np.ndarray) -> None:
        self.n, self.m = len(inside), len(outside)
        self.by_id, self.by_ood = np.argsort(inside, kind="stable"), np.argsort(outside, kind="stable")
        ids, oods = inside[self.by_id], outside[self.by_ood]
        # These are the numbers of images of one side that lie below, or not above, each image of the other side. No
        # resample changes the order of the scores, so every resample reads the same places of its cumulated counts.
        self.id_below_ood = np.searchsorted(ids, oods, side="left")
        self.id_to_ood = np.searchsorted(ids, oods, side="right")
        self.ood_below_id = np.searchsorted(oods, ids, side="left")
        self.id_below_id = np.searchsorted(ids, ids, side="left")
        self.ood_to_ood = np.searchsorted(oods, oods, side="right")

    def measures(self, id_counts: np.ndarray, ood_counts: np.ndarray) -> dict[str, np.ndarray]:
        """Return {measure: (R,) float64} of ``id_counts`` (R, N) and ``ood_counts`` (R, M), summing to N and M."""
        ids, oods = id_counts[:, self.by_id], ood_counts[:, self.by_ood]
        id_through, ood_through = _cumulated(ids), _cumulated(oods)
        below, not_above = id_through[:, self.id_below_ood], id_through[:, self.id_to_ood]
        # Every pair counts twice, so that a tie can lose one of two and the sums stay whole numbers.
        pairs = 2 * self.n * self.m
        # int64 is needed, because 50 000 by 50 000 pairs exceed int32.
        losses = np.einsum("rm,rm->r", oods, below + not_above, dtype=np.int64)
        # These are the images at or above each ID score, counted as often as the resample drew them.
        accepted_id = self.n - id_through[:, self.id_below_id]
        accepted_ood = self.m - ood_through[:, self.ood_below_id]
        flagged_ood = ood_through[:, self.ood_to_ood]
        return {
            "auroc": (pairs - losses) / pairs,
            "aupr_in": _average_precision(ids, accepted_id, accepted_ood),
            "aupr_out": _average_precision(oods, flagged_ood, not_above),
            "fpr95_id_pos": self._fpr95_id_pos(id_through, ood_through),
            "fpr95_ood_pos": self._fpr95_ood_pos(id_through, ood_through),
        }

    def _fpr95_id_pos(self, id_through: np.ndarray, ood_through: np.ndarray) -> np.ndarray:
        rank = self.n - at_least_95_percent(self.n)
        # The threshold is the first image, in the order of scores, at which the cumulated count exceeds the rank.
        threshold = [np.searchsorted(row[1:], rank, side="right") for row in id_through]
        rejected = np.take_along_axis(ood_through, self.ood_below_id[threshold][:, None], axis=1)[:, 0]
        return (self.m - rejected) / self.m

    def _fpr95_ood_pos(self, id_through: np.ndarray, ood_through: np.ndarray) -> np.ndarray:
        rank = at_least_95_percent(self.m) - 1
        # The rank is the number of OOD images that may lie below the threshold, which is the next drawn image.
        threshold = [np.searchsorted(row[1:], rank, side="right") for row in ood_through]
        return np.take_along_axis(id_through, self.id_to_ood[threshold][:, None], axis=1)[:, 0] / self.n


def _cumulated(counts: np.ndarray) -> np.ndarray:
    """Return (R, N + 1) int32: in column i how often the images before the i-th were drawn, of ``counts`` (R, N)."""
    # The column of zeros in front makes place i hold the number of drawn images before image i.
    through = np.zeros((len(counts), counts.shape[1] + 1), dtype=np.int32)
    np.cumsum(counts, axis=1, out=through[:, 1:])
    return through


def _average_precision(counts: np.ndarray, hits: np.ndarray, others: np.ndarray) -> np.ndarray:
    # An image that was not drawn has the count 0, so its precision does not matter; the 1 avoids 0/0 there.
    precision = hits / np.maximum(hits + others, 1)
    return np.einsum("rn,rn->r", counts, precision) / counts.shape[1]
