"""How far the confidence of zero-shot classification is from how often it is right."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

# float64 numbers that stay in a core's cache together: the pass over (N, C) cosines is as fast as it gets, at any N.
_BLOCK = 65_536
_BELOW_ONE = float(np.nextafter(1.0, 0.0))


class Peak(NamedTuple):
    """The top class of each image: ``prediction`` (N,) int64, its ``cosine`` and its softmax ``mass``, (N,) float64.

    mass = Σ_k exp(s (c_k − max c)) lies in [1, C]; 1/mass is the confidence max softmax(s c).
    """

    prediction: Tensor
    cosine: Tensor
    mass: Tensor


def softmax_peak(cosines: Tensor, logit_scale: float) -> Peak:
    """Return the top class of each image with its softmax mass, computed in float64 block by block.

    ``cosines`` (N, C), ``logit_scale`` s > 0. Subtracting the largest cosine before multiplying by s keeps every
    exponent at or below 0, so that nothing overflows at any scale.
    """
    top, prediction = cosines.max(dim=1)
    top = top.double()
    mass = torch.empty_like(top)
    for rows in blocks(cosines):
        gaps = (cosines[rows].double() - top[rows, None]).mul_(logit_scale)
        torch.sum(gaps.exp_(), dim=1, out=mass[rows])
    return Peak(prediction, top, mass)


def blocks(cosines: Tensor) -> list[slice]:
    """Return slices that cut (N, C) into runs of rows small enough for a core's cache in float64."""
    step = max(1, _BLOCK // cosines.shape[1])
    return [slice(start, start + step) for start in range(0, len(cosines), step)]


class ZeroShot(NamedTuple):
    """Per image (N,): ``confidence`` float64, ``prediction`` int64, ``correct`` bool, ``nll`` float64 in nats."""

    confidence: Tensor
    prediction: Tensor
    correct: Tensor
    nll: Tensor


def score_zero_shot(cosines: Tensor, labels: Tensor, logit_scale: float) -> ZeroShot:
    """Return confidence, prediction, correctness and negative log-likelihood of softmax(s c), one pass, in float64.

    ``cosines`` (N, C), ``labels`` (N,) int64 in 0..C-1, ``logit_scale`` s > 0. Raises ValueError on a label outside.
    """
    check_labels(labels, cosines.shape[1])
    peak = softmax_peak(cosines, logit_scale)
    of_label = cosines.gather(1, labels[:, None]).squeeze(1).double()
    nll = peak.mass.log() + logit_scale * (peak.cosine - of_label)
    return ZeroShot(1 / peak.mass, peak.prediction, peak.prediction == labels, nll)


def check_labels(labels: Tensor, n_classes: int) -> None:
    """Raise ValueError naming the first label that is not in 0..n_classes-1."""
    outside = labels[(labels < 0) | (labels >= n_classes)]
    if len(outside):
        raise ValueError(
            f"label {int(outside[0])} is outside 0..{n_classes - 1} ({len(outside)} of {len(labels)} images; "
            "-1 marks a set without labels, which cannot be scored against any)"
        )


def expected_calibration_error(confidence: Any, correct: Any, n_bins: int = 15) -> float:
    """Return the expected calibration error Σ_b n_b/N |accuracy_b − confidence_b| over equal-width bins, in 0..1.

    ``confidence`` (N,) in [0, 1] and ``correct`` (N,) bool or 0/1, arrays or tensors. Guo et al. 2017, eq. 3, computed
    by torchmetrics in float64. Two of its conventions are closed off: values outside [0, 1], which it would take for
    logits, raise ValueError, and a confidence of exactly 1, to which it gives a bin of its own, counts in the last one.
    """
    confidences, hits = _checked(confidence, correct)
    return float(binary_calibration_error(confidences.clamp(max=_BELOW_ONE), hits.long(), n_bins=n_bins))


def confidence_gap(confidence: Any, correct: Any) -> float:
    """Return mean confidence minus accuracy, in −1..1: positive means overconfident. Arguments as for the ECE."""
    confidences, hits = _checked(confidence, correct)
    return float(np.mean(confidences.numpy()) - np.mean(hits.numpy()))


class Bins(NamedTuple):
    """Equal-width confidence bins, (n_bins,) each: ``images``, mean ``confidence``, ``accuracy``; NaN where empty."""

    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability_bins(confidence: Any, correct: Any, n_bins: int = 15) -> Bins:
    """Return the bins behind the expected calibration error: Σ images/N |accuracy − confidence| is that number."""
    confidences, hits = _checked(confidence, correct)
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64)
    position = (torch.bucketize(confidences.clamp(max=_BELOW_ONE), edges, right=True) - 1).numpy()
    images = np.bincount(position, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence, accuracy = (
            np.bincount(position, weights=values.numpy(), minlength=n_bins) / images for values in (confidences, hits)
        )
    return Bins(images, mean_confidence, accuracy)


def _checked(confidence: Any, correct: Any) -> tuple[Tensor, Tensor]:
    """Return both as float64 (N,) on the CPU; ValueError on no image, unequal shapes or no probability."""
    confidences, hits = (torch.as_tensor(values, dtype=torch.float64).cpu() for values in (confidence, correct))
    if confidences.ndim != 1 or confidences.shape != hits.shape or not len(hits):
        shapes = f"{tuple(confidences.shape)} and {tuple(hits.shape)}"
        raise ValueError(f"confidence and correct need the same shape (N,) with N > 0, not {shapes}")
    outside = confidences[~((confidences >= 0) & (confidences <= 1))]
    if len(outside):
        raise ValueError(f"confidence {float(outside[0])} is not a probability ({len(outside)} of {len(confidences)})")
    return confidences, hits
