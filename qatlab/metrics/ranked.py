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
        # how many ID images lie below or not above each OOD image, and so on: places in cumulated counts
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
        pairs = 2 * self.n * self.m
        losses = np.einsum("rm,rm->r", oods, below + not_above, dtype=np.int64)
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
        threshold = [np.searchsorted(row[1:], rank, side="right") for row in id_through]
        rejected = np.take_along_axis(ood_through, self.ood_below_id[threshold][:, None], axis=1)[:, 0]
        return (self.m - rejected) / self.m

    def _fpr95_ood_pos(self, id_through: np.ndarray, ood_through: np.ndarray) -> np.ndarray:
        rank = at_least_95_percent(self.m) - 1
        threshold = [np.searchsorted(row[1:], rank, side="right") for row in ood_through]
        return np.take_along_axis(id_through, self.id_to_ood[threshold][:, None], axis=1)[:, 0] / self.n


def _cumulated(counts: np.ndarray) -> np.ndarray:
    through = np.zeros((len(counts), counts.shape[1] + 1), dtype=np.int32)
    np.cumsum(counts, axis=1, out=through[:, 1:])
    return through


def _average_precision(counts: np.ndarray, hits: np.ndarray, others: np.ndarray) -> np.ndarray:
    # an image that was not drawn has no threshold of its own: 0 × whatever stands there, 0/0 included
    precision = hits / np.maximum(hits + others, 1)
    return np.einsum("rn,rn->r", counts, precision) / counts.shape[1]
