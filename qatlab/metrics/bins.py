"""Bins of confidence: the data of a reliability diagram, and the calibration errors read off them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from qatlab.metrics.arrays import as_array

# The largest float64 below 1. A confidence of 1 counts as this number, because it would otherwise get its own bin.
BELOW_ONE = float(np.nextafter(1.0, 0.0))


class Bins(NamedTuple):
    """Bins in order of confidence, (n_bins,) each: ``images``, mean ``confidence``, ``accuracy``; NaN where empty."""

    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def equal_width(confidence: np.ndarray, n_bins: int) -> np.ndarray:
    """Return the bin of each image, (N,) int64 in 0..n_bins-1: [b/n_bins, (b+1)/n_bins), the last one with 1 in it.

    ``confidence`` (N,) float64 in [0, 1]. The edges are those of torchmetrics to the bit.
    """
    # torch rounds some edges otherwise than numpy.linspace, and torchmetrics takes its edges from torch.
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64).numpy()
    # side="right" puts a confidence that lies on an edge into the bin above the edge.
    return np.searchsorted(edges, np.minimum(confidence, BELOW_ONE), side="right") - 1


def equal_mass(confidence: np.ndarray, n_bins: int) -> np.ndarray:
    """Return the bin of each image, (N,) int64 in 0..n_bins-1: ⌊n_bins · (images of lower confidence) / N⌋.

    ``confidence`` (N,) float64. Without ties no two bins differ by more than one image; images of equal confidence
    share a bin, so that the order of the images does not matter, and a tie longer than N/n_bins leaves bins empty.
    """
    lower = np.searchsorted(np.sort(confidence), confidence, side="left")
    # The division is made in integers, because quotients of floats could put equal shares on both sides of an edge.
    return lower * n_bins // len(confidence)


def reliability_bins(
    confidence: Any, correct: Any, n_bins: int = 15, binning: Callable[[np.ndarray, int], np.ndarray] = equal_width
) -> Bins:
    """Return the bins behind a calibration error: Σ images/N |accuracy − confidence| is that number.

    ``confidence`` (N,) in [0, 1] and ``correct`` (N,) bool or 0/1, arrays or tensors; ``binning`` is ``equal_width`` or
    ``equal_mass``. Raises ValueError on no image, unequal shapes and values that are no probabilities.
    """
    confidences, hits = outcomes(confidence, correct)
    position = binning(confidences, n_bins)
    images = np.bincount(position, minlength=n_bins)
    # An empty bin gives 0/0, which is the NaN that Bins promises.
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(position, weights=confidences, minlength=n_bins) / images
        accuracy = np.bincount(position, weights=hits, minlength=n_bins) / images
    return Bins(images, mean_confidence, accuracy)


def equal_mass_calibration_error(confidence: Any, correct: Any, n_bins: int = 15) -> float:
    """Return Σ_b n_b/N |accuracy_b − confidence_b| over bins that hold equally many images, in 0..1.

    Nguyen & O'Connor 2015. Arguments and errors as for ``reliability_bins``; ``equal_mass`` explains ties.
    """
    bins = reliability_bins(confidence, correct, n_bins, equal_mass)
    # nansum leaves out empty bins, whose accuracy is NaN.
    return float(np.nansum(bins.images * np.abs(bins.accuracy - bins.confidence)) / bins.images.sum())


def maximum_calibration_error(confidence: Any, correct: Any, n_bins: int = 15) -> float:
    """Return max_b |accuracy_b − confidence_b| over the equal-width bins that are not empty, in 0..1.

    Naeini et al. 2015. Arguments and errors as for ``reliability_bins``. A bin of one image counts as much as any
    other.
    """
    bins = reliability_bins(confidence, correct, n_bins)
    return float(np.nanmax(np.abs(bins.accuracy - bins.confidence)))


def outcomes(confidence: Any, correct: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return confidences and hits as float64 arrays, (N,) each.

    ``confidence`` (N,) in [0, 1] and ``correct`` (N,) bool or 0/1, arrays or tensors. Raises ValueError on no image, on
    unequal shapes, on a confidence that is no probability and on a value of ``correct`` that is neither 0 nor 1.
    """
    # float64 is used for a float32 model too, because sums over many images would lose digits in float32.
    confidences, hits = (as_array(values, np.float64) for values in (confidence, correct))
    if confidences.ndim != 1 or confidences.shape != hits.shape or not len(hits):
        shapes = f"{confidences.shape} and {hits.shape}"
        raise ValueError(f"confidence and correct need the same shape (N,) with N > 0, not {shapes}")
    # The comparison is negated to find NaN too, because NaN fails every comparison.
    outside = confidences[~((confidences >= 0) & (confidences <= 1))]
    if len(outside):
        raise ValueError(f"confidence {float(outside[0])} is not a probability ({len(outside)} of {len(confidences)})")
    neither = hits[(hits != 0) & (hits != 1)]
    if len(neither):
        raise ValueError(f"correct {float(neither[0])} is neither 0 nor 1 ({len(neither)} of {len(hits)})")
    return confidences, hits
