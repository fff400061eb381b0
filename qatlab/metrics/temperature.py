"""The logit scale (inverse temperature) under which a set of cosines has the highest likelihood."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor

from qatlab.metrics.calibration import blocks, check_labels, softmax_peak


class Fit(NamedTuple):
    """The fitted ``logit_scale``, the mean NLL (nats) before and after, whether a bound was reached, and the images."""

    logit_scale: float
    nll_before: float
    nll_after: float
    at_bound: bool
    images: int


def fit_logit_scale(
    cosines: Tensor, targets: Tensor, bounds: tuple[float, float] = (1.0, 1000.0), *, current: float = 100.0
) -> Fit:
    """Return the logit scale s that minimises the mean cross-entropy of softmax(s c) with the targets, in float64.

    ``cosines`` (N, C); ``targets`` either (N,) int labels or (N, C) probabilities, such as a teacher's softmax where no
    label may be used; ``bounds`` of s; ``current``, the scale that ``nll_before`` is measured at. Temperature scaling,
    Guo et al. 2017, with s = 1/T: the objective is convex in s, so its slope has at most one root, which is bracketed
    in log s; a slope that keeps its sign within the bounds puts s at one of them. Raises ValueError on labels outside
    0..C-1, on rows of probabilities that do not sum to 1 and on no image.
    """
    targeted = _target_cosine(cosines, targets)
    low, high = bounds

    def slope(log_scale: float) -> float:
        return _mean(_expected_cosine(cosines, math.exp(log_scale)) - targeted)

    # A slope that is positive at the lower bound is positive everywhere above, so the lower bound is the best scale.
    if slope(math.log(low)) >= 0:
        scale, at_bound = low, True
    elif slope(math.log(high)) <= 0:
        scale, at_bound = high, True
    else:
        # The slope changes its sign once between the bounds. The
        # search runs in log s, where each decade has the same length.
        scale, at_bound = math.exp(brentq(slope, math.log(low), math.log(high), xtol=1e-12)), False
    before, after = (_nll(cosines, targeted, value) for value in (current, scale))
    return Fit(scale, before, after, at_bound, len(cosines))


def _target_cosine(cosines: Tensor, targets: Tensor) -> Tensor:
    """Return Σ_k t_k c_k, (N,) float64: all that the objective needs of the targets."""
    if not len(cosines):
        raise ValueError("there are no images to fit the logit scale on")
    if targets.ndim == 1:
        check_labels(targets, cosines.shape[1])
        return cosines.gather(1, targets[:, None]).squeeze(1).double()
    sums = targets.sum(dim=1, dtype=torch.float64)
    worst = sums[(sums - 1).abs().argmax()]
    # A tolerance of 1e-3 accepts probabilities in half precision, and refuses logits and cosines.
    if targets.shape != cosines.shape or not abs(worst - 1) < 1e-3 or (targets < 0).any():
        raise ValueError(
            f"soft targets need shape {tuple(cosines.shape)} and rows of probabilities that sum to 1, "
            f"not {tuple(targets.shape)} with a row that sums to {float(worst):.6g}"
        )
    # A float32 softmax sums to 1 only to 1e-7. Without the division, a row that sums to less would count less.
    return torch.cat([(targets[rows].double() * cosines[rows].double()).sum(dim=1) for rows in blocks(cosines)]) / sums


def _nll(cosines: Tensor, targeted: Tensor, scale: float) -> float:
    peak = softmax_peak(cosines, scale)
    # −Σ_k t_k log p_k = log Σ exp(s c) − s Σ t_k c_k, with the largest cosine taken out of the sum.
    return _mean(peak.mass.log() + scale * (peak.cosine - targeted))


def _expected_cosine(cosines: Tensor, scale: float) -> Tensor:
    """Return E_softmax(s c)[c], (N,) float64: the part of the slope that depends on s."""
    expected = []
    for rows in blocks(cosines):
        values = cosines[rows].double()
        expected.append((torch.softmax(scale * values, dim=1) * values).sum(dim=1))
    return torch.cat(expected)


def _mean(values: Tensor) -> float:
    """Return the mean, summed in one fixed order whatever the number of threads."""
    return float(values.cpu().numpy().mean())
