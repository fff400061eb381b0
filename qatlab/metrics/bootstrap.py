"""Replicates of every metric on resamples of the images, for intervals and paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qatlab.metrics.arrays import as_array
from qatlab.metrics.bins import outcomes
from qatlab.metrics.detection import finite_scores
from qatlab.metrics.ranked import Ranked
from qatlab.metrics.resampling import BLOCK, resampled_counts
from qatlab.metrics.weighted import Classified


def bootstrap_classification(
    scored: Mapping[str, Any], labels: Any, *, resamples: int = 1000, seed: int = 0, strata: Any = None
) -> dict[str, np.ndarray]:
    """Return {metric: (R,) float64 replicates} of every classification metric, exact on each resample.

    ``scored`` holds the columns of ``score_zero_shot``, (N,) each: confidence, correct, nll, brier and rank, arrays or
    tensors; ``labels`` (N,). ``strata`` (N,), such as the labels, keeps as many images of each value in every resample
    as the set has: right for a set drawn so, and no spread at all where each value has one image. Models scored on the
    same images with the same seed and strata have the same resamples, so the differences of their replicates are
    paired. Raises ValueError as the metrics do.
    """
    # The columns are checked once here, because the resamples below repeat them a thousand times without a check.
    classes = as_array(labels)
    confidence, correct = outcomes(scored["confidence"], scored["correct"])
    nll, brier, rank = (as_array(scored[name]) for name in ("nll", "brier", "rank"))
    for name, values in {"labels": classes, "nll": nll, "brier": brier, "rank": rank}.items():
        if values.shape != confidence.shape or np.isnan(values).any():
            raise ValueError(f"{name} needs the shape {confidence.shape} and no NaN, not {values.shape}")
    classified = Classified(confidence, correct, classes, nll, brier, rank)
    # One stratum with all images gives the bootstrap without strata.
    groups = np.zeros(len(classes)) if strata is None else as_array(strata)
    if groups.shape != classes.shape:
        raise ValueError(f"strata needs the shape {classes.shape}, not {groups.shape}")
    # A block has so many resamples that their counts stay in a core's cache.
    rows = max(1, BLOCK // len(classes))
    # The seed gets a 0 here, but a 1 for ID and a 2 for OOD images in
    # detection, so that classification and detection have different draws.
    return _stacked([classified.measures(counts) for counts in resampled_counts(groups, resamples, rows, (seed, 0))])


def bootstrap_means(values: np.ndarray, *, resamples: int = 1000, seed: int = 0, side: int = 0) -> np.ndarray:
    """Return (R, M) float64 replicates of the column means of ``values`` (N, M), such as the hits of M models.

    Every column has the same resamples, and another ``side`` has others, because two sets are resampled separately.
    Raises ValueError on no image and on NaN.
    """
    columns = np.asarray(values, dtype=np.float64)
    if columns.ndim != 2 or not len(columns) or np.isnan(columns).any():
        raise ValueError(f"values need the shape (N, M) with N > 0 and no NaN, not {columns.shape}")
    rows = max(1, BLOCK // len(columns))
    drawn = resampled_counts(np.zeros(len(columns)), resamples, rows, (seed, side))
    # The sum over a resample is a product with its counts, so one matrix product serves all models.
    return np.concatenate([counts @ columns for counts in drawn]) / len(columns)


def bootstrap_detection(
    id_scores: Mapping[str, Any], ood_scores: Mapping[str, Any], *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """Return {score: {measure: (R,) float64 replicates}} of AUROC, AUPR and FPR@95, exact on each resample.

    ``id_scores`` {score: (N,)} and ``ood_scores`` {score: (M,)}, arrays or tensors in the order of the images; ID and
    OOD images are resampled apart, N and M of them, the same for every score. One seed gives the same resamples for
    every model. Raises ValueError on an empty or non-finite side and on scores of unequal numbers of images.
    """
    inside, outside = _side(id_scores, "ID"), _side(ood_scores, "OOD")
    ranked = {name: Ranked(inside[name], outside[name]) for name in inside}
    n, m = len(next(iter(inside.values()))), len(next(iter(outside.values())))
    rows = max(1, BLOCK // max(n, m))
    # The seeds of ID and OOD differ, because with one seed two sets of one size would be drawn alike.
    id_draws = resampled_counts(np.zeros(n), resamples, rows, (seed, 1))
    ood_draws = resampled_counts(np.zeros(m), resamples, rows, (seed, 2))
    blocks: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in ranked}
    # Every score reads the same resamples, so that differences
    # between scores are paired and each resample is drawn once.
    for id_counts, ood_counts in zip(id_draws, ood_draws, strict=True):
        for name, score in ranked.items():
            blocks[name].append(score.measures(id_counts, ood_counts))
    return {name: _stacked(measured) for name, measured in blocks.items()}


def _side(scores: Mapping[str, Any], side: str) -> dict[str, np.ndarray]:
    """Return the scores as float64 in the order of the images."""
    columns = {name: finite_scores(values, side) for name, values in scores.items()}
    sizes = [len(values) for values in columns.values()]
    if len(set(sizes)) != 1:
        raise ValueError(f"{side} scores need the same number of images, not {sizes}")
    return columns


def _stacked(blocks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return {measure: the replicates of all blocks, one after the other}."""
    stacked = {}
    for name in blocks[0]:
        stacked[name] = np.concatenate([block[name] for block in blocks])
    return stacked
