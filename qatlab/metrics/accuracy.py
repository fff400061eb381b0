"""How often zero-shot classification is right."""

from __future__ import annotations

from typing import Any

import numpy as np

from qatlab.metrics.arrays import as_array


def top_k_accuracy(rank: Any, k: int = 1) -> float:
    """Return the fraction of images whose class is among the k first, in 0..1.

    ``rank`` (N,) integers, how many classes come before the image's own (``score_zero_shot``), array or tensor. With no
    more than k classes it is 1. Raises ValueError on no image and on values that are no ranks.
    """
    ranks = _column(rank, "rank")
    if not (ranks >= 0).all():
        raise ValueError("a rank is a number of classes, 0 or more")
    return float(np.mean(ranks < k))


def mean_per_class_accuracy(correct: Any, labels: Any) -> float:
    """Return the mean over classes of the accuracy on their images, in 0..1, over the classes that have images.

    ``correct`` (N,) bool or 0/1, ``labels`` (N,) integers, arrays or tensors. Also called balanced accuracy or mean
    per-class recall. Raises ValueError on no image and unequal shapes.
    """
    # Labels pass through float64, which holds whole numbers up to 2^53 exactly.
    hits, classes = _column(correct, "correct"), _column(labels, "labels")
    if hits.shape != classes.shape:
        raise ValueError(f"correct and labels need the same shape, not {hits.shape} and {classes.shape}")
    # Labels are replaced by positions among the labels that occur, because
    # labels may have gaps and a class without images has no accuracy.
    _, position, images = np.unique(classes, return_inverse=True, return_counts=True)
    return float(np.mean(np.bincount(position, weights=hits) / images))


def _column(values: Any, name: str) -> np.ndarray:
    # float64 holds bools, whole numbers and floats alike, so one check of NaN and infinity serves all columns.
    column = as_array(values, np.float64)
    if column.ndim != 1 or not len(column) or not np.isfinite(column).all():
        raise ValueError(f"{name} needs the shape (N,) with N > 0 and finite values, not {column.shape}")
    return column
