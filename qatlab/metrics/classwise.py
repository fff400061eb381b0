"""Calibration of every class's probability, not only of the top one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qatlab.metrics.calibration import blocks, check_labels

# 2^-32 of a probability: sums of up to 2^21 images stay whole numbers in float64, so their order does not matter
_UNIT = float(2**32)


def classwise_gaps(cosines: Tensor, labels: Tensor, logit_scale: float, n_bins: int = 15) -> np.ndarray:
    """Return Σ (p_k − y_k) over the images in each equal-width bin of p_k, (C, n_bins) float64, p = softmax(s c).

    ``cosines`` (N, C), ``labels`` (N,) int64 in 0..C-1, ``logit_scale`` s > 0. The gaps of batches add up, to the same
    bits in any order: probabilities are rounded to 2^-32. Raises ValueError on a label outside and on a NaN.
    """
    classes = cosines.shape[1]
    check_labels(labels, classes)
    gaps = np.zeros(classes * n_bins)
    first = np.arange(classes) * n_bins
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64)
    for rows in blocks(cosines):
        probabilities = torch.softmax(cosines[rows].double() * logit_scale, dim=1)
        if probabilities.isnan().any():
            raise ValueError("there are cosines that are NaN or infinite")
        position = (torch.bucketize(probabilities, edges, right=True) - 1).clamp_(max=n_bins - 1)
        residual = (probabilities * _UNIT).round_()
        residual[torch.arange(len(residual)), labels[rows]] -= _UNIT
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
