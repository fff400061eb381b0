"""How well confidence separates right from wrong predictions when the unsure ones may be left out."""

from __future__ import annotations

from typing import Any

import numpy as np

from qatlab.metrics.bins import outcomes


def aurc(confidence: Any, correct: Any) -> float:
    """Return the area under the risk-coverage curve, 1/N Σ_n (errors among the n most confident images) / n, in 0..1.

    ``confidence`` (N,) in [0, 1] and ``correct`` (N,) bool or 0/1, arrays or tensors. Geifman & El-Yaniv 2017. Images
    of equal confidence count as the mean over their orders, so the order of the images does not matter. Lower is
    better. Raises ValueError on no image, unequal shapes and values that are no probabilities.
    """
    confidences, hits = outcomes(confidence, correct)
    # The minus sign sorts the most confident images first.
    _, group, images = np.unique(-confidences, return_inverse=True, return_counts=True)
    # Each image of a tie counts as the tie's mean error, which is the mean over the orders of the tie.
    share = np.bincount(group, weights=1 - hits) / images
    risk = np.cumsum(np.repeat(share, images)) / np.arange(1, len(hits) + 1)
    return float(np.mean(risk))
