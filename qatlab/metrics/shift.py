"""How the images of one confidence bin of the full-precision model move when it is quantized and rescaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qatlab.metrics.bins import equal_width, outcomes


class Shift(NamedTuple):
    """The effect of one condition on the images of each reference bin, in order of the reference's confidence.

    ``images`` (B,) int64 per reference bin, the same under every condition; their mean ``confidence`` and ``accuracy``
    (B,) under it, NaN where the bin is empty; ``moved`` (B, B) int64, images of reference bin i (row) that lie in bin j
    (column) under it.
    """

    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    moved: np.ndarray


def bin_shift(reference: Any, conditions: Mapping[str, tuple[Any, Any]], n_bins: int = 15) -> dict[str, Shift]:
    """Return {condition: Shift}: images grouped by their ``reference`` confidence and followed through the conditions.

    ``reference`` (N,) confidences of the full-precision model in [0, 1]; each condition (such as fp32 itself,
    quantized, after temperature) is (confidence, correct), (N,) each, of the same images in the same order. Bins are
    equal-width. Raises ValueError on no image, unequal shapes and values that are no probabilities.
    """
    # Only the confidences are used; the zeros take the place of hits, which a reference need not have.
    before, _ = outcomes(reference, np.zeros(len(reference)))
    bins = equal_width(before, n_bins)
    images = np.bincount(bins, minlength=n_bins)
    shifts = {}
    for name, (confidence, correct) in conditions.items():
        confidences, hits = outcomes(confidence, correct)
        if len(confidences) != len(before):
            raise ValueError(f"{name} has {len(confidences)} images, the reference {len(before)}")
        # An empty bin gives 0/0, which is the NaN that Shift promises.
        with np.errstate(invalid="ignore"):
            mean_confidence = np.bincount(bins, weights=confidences, minlength=n_bins) / images
            accuracy = np.bincount(bins, weights=hits, minlength=n_bins) / images
        # Every pair (bin before, bin after) has a number of its own, so that a single bincount fills the table.
        moved = np.bincount(bins * n_bins + equal_width(confidences, n_bins), minlength=n_bins**2)
        shifts[name] = Shift(images, mean_confidence, accuracy, moved.reshape(n_bins, n_bins))
    return shifts
