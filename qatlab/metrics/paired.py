"""Tests of whether two models differ on the same images, and the correction for many tests at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, norm, rankdata

from qatlab.metrics.arrays import as_array
from qatlab.metrics.detection import finite_scores
from qatlab.metrics.resampling import percentile_interval


class Difference(NamedTuple):
    """The other model's metric minus the reference's: ``value``, interval ``low``..``high``, two-sided ``p_value``."""

    value: float
    low: float
    high: float
    p_value: float


def mcnemar(reference: Any, other: Any) -> float:
    """Return the two-sided p-value of the exact McNemar test of equal accuracy.

    ``reference`` and ``other`` say which of the same images (N,) each model has right, in the same order: bool or 0/1,
    arrays or tensors. Under equal accuracy the images that only one model has right are tosses of a fair coin; without
    such images p is 1. McNemar 1947. Raises ValueError on no image, unequal shapes and values other than 0 and 1.
    """
    hits = [as_array(values) for values in (reference, other)]
    if hits[0].ndim != 1 or hits[0].shape != hits[1].shape or not len(hits[0]):
        raise ValueError(f"both models need the same images, (N,) with N > 0, not {hits[0].shape} and {hits[1].shape}")
    # The test also refuses NaN, which equals nothing.
    if any(((values != 0) & (values != 1)).any() for values in hits):
        raise ValueError("correct is 0 or 1 for every image")
    first, second = (values.astype(bool) for values in hits)
    losses, gains = int((first & ~second).sum()), int((~first & second).sum())
    # Images that both models have right, or both wrong, say nothing about a difference and are left out.
    return float(binomtest(gains, losses + gains).pvalue) if losses + gains else 1.0


def delong(reference: tuple[Any, Any], other: tuple[Any, Any], level: float = 0.95) -> Difference:
    """Return the difference of the AUROCs of two scores on the same images, with DeLong's interval and test.

    ``reference`` and ``other`` are (ID scores (N,), OOD scores (M,)) in the same order of images. DeLong et al. 1988,
    by midranks as in Sun & Xu 2014. Scores that rank alike have p = 1. Raises ValueError on fewer than two images on a
    side, on a non-finite score and on unequal numbers of images.
    """
    first, second = _components(*reference), _components(*other)
    if [len(side) for side in first] != [len(side) for side in second]:
        raise ValueError(f"both need the same images, not {list(map(len, first))} and {list(map(len, second))}")
    # Differences are taken image by image, so that their variance includes the covariance of the two scores.
    inside, outside = second[0] - first[0], second[1] - first[1]
    value, error = float(np.mean(inside)), float(np.sqrt(_variance(inside, outside)))
    reach = float(norm.isf((1 - level) / 2)) * error
    # Where all images agree on the difference, its error is 0 and the normal test would divide by 0.
    if error == 0:
        return Difference(value, value, value, 1.0 if value == 0 else 0.0)
    return Difference(value, value - reach, value + reach, float(2 * norm.sf(abs(value) / error)))


def paired_bootstrap(value: float, reference: np.ndarray, other: np.ndarray, level: float = 0.95) -> Difference:
    """Return the difference of a metric with its percentile interval and test, from both models' replicates, (R,).

    ``value`` is the measured difference, other minus reference; the replicates come from the same images, seed and
    strata. p is twice the smaller share of differences on one side of 0, each counted with one more that is 0: it
    cannot fall below 2/(R + 1), so a correction over m tests needs R of some 40 m or more. Raises ValueError on unequal
    numbers of replicates.
    """
    if reference.shape != other.shape or not len(reference):
        raise ValueError(f"both need the same number of replicates, not {reference.shape} and {other.shape}")
    differences = other - reference
    low, high = percentile_interval(differences, level)
    # A difference of exactly 0 counts on both sides, so models that never differ have p = 1.
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return Difference(value, low, high, min(1.0, 2 * (tail + 1) / (len(differences) + 1)))


def holm(p_values: Any) -> np.ndarray:
    """Return Holm's adjusted p-values, (m,) float64: rejecting those below α has a false rejection with chance below α.

    ``p_values`` (m,) in [0, 1], of tests that may depend on each other. Holm 1979. Raises ValueError on one outside.
    """
    values = np.asarray(p_values, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values are numbers in 0..1, (m,), not {p_values}")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    # The smallest p is multiplied by m, the next by m − 1, ...; the running maximum keeps the order of the p-values.
    adjusted[order] = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return adjusted


def _components(id_scores: Any, ood_scores: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return DeLong's structural components, (N,) and (M,) float64.

    They are the share of the OOD images below each ID image, and the share of the ID images above each OOD image; a tie
    counts ½.
    """
    inside, outside = finite_scores(id_scores, "ID"), finite_scores(ood_scores, "OOD")
    n, m = len(inside), len(outside)
    if min(n, m) < 2:
        raise ValueError(f"a variance needs two images or more on each side, not {n} ID and {m} OOD")
    ranks = rankdata(np.concatenate([inside, outside]))
    # A rank among all images minus the rank on the own side is the number of images of the other side below.
    return (ranks[:n] - rankdata(inside)) / m, 1 - (ranks[n:] - rankdata(outside)) / n


def _variance(inside: np.ndarray, outside: np.ndarray) -> float:
    # ID and OOD images are drawn apart, so the two variances of a mean add up.
    return float(np.var(inside, ddof=1) / len(inside) + np.var(outside, ddof=1) / len(outside))
