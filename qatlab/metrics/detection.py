"""How well scores separate in-distribution (ID) from out-of-distribution (OOD) images: exact, in float64.

Every function takes ``id_scores`` (N,) and ``ood_scores`` (M,), arrays or tensors on any scale, higher = more
in-distribution, and raises ValueError on an empty or non-finite side. No score is flipped: a score that is worse than
chance stays worse than chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qatlab.metrics.arrays import as_array


def auroc(id_scores: Any, ood_scores: Any) -> float:
    """Return P(ID score > OOD score) + ½ P(equal), the area under the ROC curve; 0.5 is chance. Mann & Whitney 1947."""
    return _measured(_auroc, id_scores, ood_scores)


def aupr_in(id_scores: Any, ood_scores: Any) -> float:
    """Return the area under the precision-recall curve with ID as the positive class; N / (N + M) is chance.

    Average precision as in scikit-learn and MCM: precision summed over the steps of recall, one step per distinct
    score. OpenOOD joins the points by straight lines instead, which gives another number.
    """
    return _measured(_aupr_in, id_scores, ood_scores)


def aupr_out(id_scores: Any, ood_scores: Any) -> float:
    """Return the area under the precision-recall curve with OOD as the positive class; M / (N + M) is chance."""
    return _measured(_aupr_out, id_scores, ood_scores)


def fpr95_id_pos(id_scores: Any, ood_scores: Any) -> float:
    """Return the fraction of OOD images accepted at the highest threshold that accepts at least 95 % of the ID images.

    ID is the positive class, as in the code of MCM and NegLabel.
    """
    return _measured(_fpr95_id_pos, id_scores, ood_scores)


def fpr95_ood_pos(id_scores: Any, ood_scores: Any) -> float:
    """Return the fraction of ID images flagged at the lowest threshold that flags at least 95 % of the OOD images.

    OOD is the positive class, as in OpenOOD 1.5 and torch-uncertainty.
    """
    return _measured(_fpr95_ood_pos, id_scores, ood_scores)


def detection(id_scores: Any, ood_scores: Any) -> dict[str, float]:
    """Return {measure: value} of all five measures, with every score sorted once for all of them."""
    inside, outside = np.sort(finite_scores(id_scores, "ID")), np.sort(finite_scores(ood_scores, "OOD"))
    return {name: measure(inside, outside) for name, measure in _MEASURES.items()}


def at_least_95_percent(n: int) -> int:
    """Return the smallest k with k/n >= 0.95, exactly."""
    # ⌈95 n / 100⌉ is computed in whole numbers, because 0.95 has no exact float.
    return -(-95 * n // 100)


def finite_scores(scores: Any, side: str) -> np.ndarray:
    """Return the ``scores``, of any shape, as a float64 array (n,).

    Raises ValueError, naming the ``side``, on no score and on a NaN or infinite one.
    """
    values = as_array(scores, np.float64).ravel()
    if not len(values):
        raise ValueError(f"there are no {side} scores")
    # A NaN would be sorted to the end and count as the most in-distribution image.
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{bad} of {len(values)} {side} scores are NaN or infinite")
    return values


def _measured(measure: Callable[[np.ndarray, np.ndarray], float], id_scores: Any, ood_scores: Any) -> float:
    return measure(np.sort(finite_scores(id_scores, "ID")), np.sort(finite_scores(ood_scores, "OOD")))


def _auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    # Both sums count ID images per OOD image: those strictly below,
    # and those below or equal. A tie is in one sum only, hence ½.
    below = np.searchsorted(inside, outside, side="left").sum()
    not_above = np.searchsorted(inside, outside, side="right").sum()
    # The sums are whole numbers, so the last division is the only rounding.
    pairs = 2 * len(inside) * len(outside)
    return (pairs - int(below) - int(not_above)) / pairs


def _aupr_in(inside: np.ndarray, outside: np.ndarray) -> float:
    # The threshold is each ID score in turn: images with a score at or above the threshold are accepted.
    accepted_id = len(inside) - np.searchsorted(inside, inside, side="left")
    accepted_ood = len(outside) - np.searchsorted(outside, inside, side="left")
    return float(np.mean(accepted_id / (accepted_id + accepted_ood)))


def _aupr_out(inside: np.ndarray, outside: np.ndarray) -> float:
    # The threshold is each OOD score in turn: images with a score at or below the threshold are flagged as OOD.
    flagged_ood = np.searchsorted(outside, outside, side="right")
    flagged_id = np.searchsorted(inside, outside, side="right")
    return float(np.mean(flagged_ood / (flagged_id + flagged_ood)))


def _fpr95_id_pos(inside: np.ndarray, outside: np.ndarray) -> float:
    # The threshold is the k-th largest ID score, with k images at least 95 %; a higher threshold would accept fewer.
    threshold = inside[len(inside) - at_least_95_percent(len(inside))]
    return float(len(outside) - np.searchsorted(outside, threshold, side="left")) / len(outside)


def _fpr95_ood_pos(inside: np.ndarray, outside: np.ndarray) -> float:
    # The threshold is the k-th smallest OOD score, with k images at least 95 %; a lower threshold would flag fewer.
    threshold = outside[at_least_95_percent(len(outside)) - 1]
    return float(np.searchsorted(inside, threshold, side="right")) / len(inside)


_MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "auroc": _auroc,
    "aupr_in": _aupr_in,
    "aupr_out": _aupr_out,
    "fpr95_id_pos": _fpr95_id_pos,
    "fpr95_ood_pos": _fpr95_ood_pos,
}
