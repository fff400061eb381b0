"""Calibration of every class's probability, not only of the top one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qatlab.metrics.calibration import blocks, check_labels

# Probabilities are counted in units of 2^-32. Sums over up to 2^21 images then stay whole numbers below 2^53, which
# float64 adds without rounding, so the order of the images and the size of the batches do not matter.
_UNIT = float(2**32)


def classwise_gaps(
    cosines: Tensor, labels: Tensor, logit_scale: float, n_bins: int = 15, logit_bias: float | None = None
) -> np.ndarray:
    """Return Σ (p_k − y_k) over the images in each equal-width bin of p_k, (C, n_bins) float64, p = softmax(s c).

    With a ``logit_bias`` b, p_k = sigmoid(s c_k + b). ``cosines`` (N, C), ``labels`` (N,) int64 in 0..C-1,
    ``logit_scale`` s > 0. The gaps of batches add up, to the same bits in any order: probabilities are rounded to 2^-32.
    Raises ValueError on a label outside and on a NaN.
    """
    classes = cosines.shape[1]
    check_labels(labels, classes)
    gaps = np.zeros(classes * n_bins)
    first = np.arange(classes) * n_bins
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64)
    for rows in blocks(cosines):
        logits = cosines[rows].double() * logit_scale
        probabilities = logits.softmax(dim=1) if logit_bias is None else (logits + logit_bias).sigmoid()
        if probabilities.isnan().any():
            raise ValueError("there are cosines that are NaN or infinite")
        # A probability of exactly 1 belongs to the last bin, as in the calibration error of the top class.
        position = (torch.bucketize(probabilities, edges, right=True) - 1).clamp_(max=n_bins - 1)
        residual = (probabilities * _UNIT).round_()
        # y_k is 1 for the label alone, so the difference p − y changes in one place of each row.
        residual[torch.arange(len(residual)), labels[rows]] -= _UNIT
        # Every pair of class and bin has a number of its own, so that a single bincount sums all pairs.
        keys = (position.cpu().numpy() + first).ravel()
        gaps += np.bincount(keys, weights=residual.cpu().numpy().ravel(), minlength=len(gaps))
    return gaps.reshape(classes, n_bins) / _UNIT


def classwise_calibration_error(gaps: np.ndarray, images: int) -> float:
    """Return 1/C Σ_k Σ_b |gap_kb| / N, the mean over classes of the calibration error of p_k, in 0..1.

    ``gaps`` (C, n_bins) from ``classwise_gaps`` over all N ``images``. Kull et al. 2019. With many classes nearly all
    probabilities are close to 0 and the number is small for any model. Raises ValueError on no image.
    """
    if images < 1:
        raise ValueError("there are no images")
    return float(np.abs(gaps).sum() / (images * len(gaps)))
