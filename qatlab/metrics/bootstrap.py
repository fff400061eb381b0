"""What every metric would have been on other draws of the same images: replicates for intervals and paired tests."""

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
    same images with the same seed and strata have the same resamples, so the differences of their replicates are paired.
    Raises ValueError as the metrics do.
    """
    classes = as_array(labels)
    confidence, correct = outcomes(scored["confidence"], scored["correct"])
    nll, brier, rank = (as_array(scored[name]) for name in ("nll", "brier", "rank"))
    for name, values in {"labels": classes, "nll": nll, "brier": brier, "rank": rank}.items():
        if values.shape != confidence.shape or np.isnan(values).any():
            raise ValueError(f"{name} needs the shape {confidence.shape} and no NaN, not {values.shape}")
    classified = Classified(confidence, correct, classes, nll, brier, rank)
    groups = np.zeros(len(classes)) if strata is None else as_array(strata)
    if groups.shape != classes.shape:
        raise ValueError(f"strata needs the shape {classes.shape}, not {groups.shape}")
    rows = max(1, BLOCK // len(classes))
    return _stacked([classified.measures(counts) for counts in resampled_counts(groups, resamples, rows, (seed, 0))])


def bootstrap_means(values: np.ndarray, *, resamples: int = 1000, seed: int = 0, side: int = 0) -> np.ndarray:
    """Return (R, M) float64 replicates of the column means of ``values`` (N, M), such as the hits of M models.

    The same resamples for every column, and others for another ``side``: sets that are compared are resampled apart.
    Raises ValueError on no image and on NaN.
    """
    columns = np.asarray(values, dtype=np.float64)
    if columns.ndim != 2 or not len(columns) or np.isnan(columns).any():
        raise ValueError(f"values need the shape (N, M) with N > 0 and no NaN, not {columns.shape}")
    rows = max(1, BLOCK // len(columns))
    drawn = resampled_counts(np.zeros(len(columns)), resamples, rows, (seed, side))
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
    sizes = [len(next(iter(side.values()))) for side in (inside, outside)]
    rows = max(1, BLOCK // max(sizes))
    drawn = [resampled_counts(np.zeros(size), resamples, rows, (seed, side)) for side, size in enumerate(sizes, 1)]
    blocks = [
        {name: score.measures(id_counts, ood_counts) for name, score in ranked.items()}
        for id_counts, ood_counts in zip(*drawn, strict=True)
    ]
    return {name: _stacked([block[name] for block in blocks]) for name in ranked}


def _side(scores: Mapping[str, Any], side: str) -> dict[str, np.ndarray]:
    """Return the scores as float64 in the order of the images."""
    columns = {name: finite_scores(values, side) for name, values in scores.items()}
    if len({len(values) for values in columns.values()}) != 1:
        raise ValueError(f"{side} scores need the same number of images, not {[len(v) for v in columns.values()]}")
    return columns


def _stacked(blocks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
