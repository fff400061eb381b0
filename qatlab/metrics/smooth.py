"""Calibration error without bins: residuals smoothed by a kernel whose width is the error itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.fft import dct, idct
from scipy.optimize.elementwise import find_root

from qatlab.metrics.bins import outcomes

CELLS = 2048
"""Points of the grid on which residuals are smoothed."""


def smooth_calibration_error(confidence: Any, correct: Any) -> float:
    """Return the smooth calibration error, in 0..1: ∫ |mean_i (y_i − p_i) K_σ(t, p_i)| dt at the σ that it equals.

    ``confidence`` p (N,) in [0, 1] and ``correct`` y (N,) bool or 0/1, arrays or tensors; K_σ is the Gaussian kernel
    reflected at 0 and 1. Błasiok & Nakkiran 2023. Residuals are shared between the two nearest of 2048 points, an error
    far below 1e-4. Raises ValueError on no image, unequal shapes and values that are no probabilities.
    """
    confidences, hits = outcomes(confidence, correct)
    cells, shares = on_grid(confidences)
    # The kernel smooths sums of residuals, so images that share a grid point can be summed first.
    residuals = np.bincount(cells.ravel(), weights=(shares * (hits - confidences)).ravel(), minlength=CELLS)
    return float(smooth_errors(residuals[None] / len(hits))[0])


def on_grid(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the two grid points next to each confidence, (2, N) int64, and its share in them, (2, N) summing to 1."""
    # The points are the middles of the cells, (i + ½)/2048, for
    # which the discrete cosine transform reflects at 0 and 1.
    place = np.clip(confidence * CELLS - 0.5, 0, CELLS - 1)
    below = np.minimum(place.astype(np.int64), CELLS - 2)
    share = place - below
    return np.stack([below, below + 1]), np.stack([1 - share, share])


def smooth_errors(residuals: np.ndarray) -> np.ndarray:
    """Return the smooth calibration error of each row, (R,), of ``residuals`` (R, 2048): mean residual per grid point.

    In the basis of cosines the reflected Gaussian is exp(−(πkσ)²/2). The error falls as σ grows from 0 to 1, so there
    is one σ that equals it.
    """
    # Smoothing is a product in this basis, so one transform serves all widths that are tried.
    waves = dct(residuals, axis=1)
    squared = -0.5 * (np.pi * np.arange(residuals.shape[1])) ** 2

    def excess(width: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Return the error minus the width, (r,), of the rows numbered ``row`` (r,) smoothed by ``width`` (r,)."""
        # find_root drops rows that are already solved, and gives the numbers of the others as floats.
        kept = waves[row.astype(np.int64)] * np.exp(squared * width[:, None] ** 2)
        return np.abs(idct(kept, axis=1)).sum(axis=1) - width

    rows = np.arange(len(residuals), dtype=np.float64)
    # The error lies in 0..1, so excess is >= 0 at a width of 0 and <= 0 at 1.
    ends = np.zeros_like(rows), np.ones_like(rows)
    return find_root(excess, ends, args=(rows,), tolerances={"xatol": 1e-9}).x
