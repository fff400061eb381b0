"""How far the confidence of zero-shot classification is from how often it is right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from qatlab.metrics.bins import BELOW_ONE, outcomes

# float64 numbers that stay in a core's cache together: the pass over (N, C) cosines is as fast as it gets, at any N.
_BLOCK = 262_144
_LOG2_E = math.log2(math.e)


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
    exponent at or below 0, so that nothing overflows at any scale. Of equal cosines the first class is the top one.
    """
    parts = [Peak(best, top.squeeze(1), powers.sum(dim=1)) for _, best, top, powers in _powers(cosines, logit_scale)]
    return Peak(*map(torch.cat, zip(*parts, strict=True)))


def _powers(cosines: Tensor, logit_scale: float) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield block after block of rows with top class (B,), its cosine (B, 1) and exp(s (c − max c)) (B, C) in float64.

    The last lies in the same memory each time.
    """
    memory = _block_of(cosines, torch.float64)
    for rows in blocks(cosines):
        block = cosines[rows]
        best = _first_largest(block)
        top = block.gather(1, best[:, None]).double()
        gaps = memory[: len(block)].copy_(block).sub_(top)
        yield rows, best, top, _exp2_(gaps.mul_(logit_scale * _LOG2_E))


def _block_of(cosines: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(cosines[blocks(cosines)[0]].shape, dtype=dtype, device=cosines.device)


def _first_largest(block: Tensor) -> Tensor:
    """Return the argmax over classes; numpy's takes a tenth of the time of torch's on a CPU."""
    if block.device.type == "cpu" and block.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(block.detach().numpy().argmax(axis=1))
    return block.max(dim=1).indices


def _exp2_(exponents: Tensor) -> Tensor:
    """Return 2^x in place. On a CPU numpy's takes a third of the time of torch's exp, and torch's exp2 would give an
    element other bits at another place in the block.
    """
    if exponents.device.type == "cpu":
        np.exp2(exponents.numpy(), out=exponents.numpy())
        return exponents
    return exponents.exp2_()


def blocks(cosines: Tensor) -> list[slice]:
    """Return slices, at least one, that cut (N, C) into runs of rows small enough for a core's cache in float64."""
    step = max(1, _BLOCK // cosines.shape[1])
    return [slice(start, start + step) for start in range(0, max(1, len(cosines)), step)]


class ZeroShot(NamedTuple):
    """Per image (N,): ``confidence`` float64, ``prediction`` int64, ``correct`` bool, ``nll`` float64 in nats,
    ``brier`` float64 in 0..2, ``top5`` bool and ``rank`` int64, the number of classes that come before the label's.
    """

    confidence: Tensor
    prediction: Tensor
    correct: Tensor
    nll: Tensor
    brier: Tensor
    top5: Tensor
    rank: Tensor


def score_zero_shot(cosines: Tensor, labels: Tensor, logit_scale: float) -> ZeroShot:
    """Return what softmax(s c) says of every image and its label, one pass, in float64, in memory for one block.

    ``cosines`` (N, C), ``labels`` (N,) int64 in 0..C-1, ``logit_scale`` s > 0. The Brier score is Σ_k (p_k − y_k)²,
    Brier 1950. Classes are ranked by cosine, equal ones by their index, so ``rank`` is 0 exactly where ``correct``.
    Raises ValueError on a label outside the classes and on cosines that are NaN or +inf.
    """
    check_labels(labels, cosines.shape[1])
    of_label = cosines.gather(1, labels[:, None])
    memory = _block_of(cosines, torch.float32)
    sums = []
    for rows, best, top, powers in _powers(cosines, logit_scale):
        # comparisons written as float32 add up ten times as fast as bools, and exactly below 2^24 classes
        ones = memory[: len(best)]
        before = torch.gt(cosines[rows], of_label[rows], out=ones).sum(dim=1)
        not_after = torch.ge(cosines[rows], of_label[rows], out=ones).sum(dim=1)
        norm = torch.linalg.vector_norm(powers, dim=1)
        sums.append((best, top.squeeze(1), powers.sum(dim=1), norm, before, not_after))
    prediction, top, mass, norm, before, not_after = map(torch.cat, zip(*sums, strict=True))
    bad = int(mass.isnan().sum())
    if bad:
        raise ValueError(f"{bad} of {len(labels)} images have cosines that are NaN or infinite")
    nll = mass.log() + logit_scale * (top - of_label.squeeze(1).double())
    # rounding may leave a Brier score just below 0
    brier = ((norm / mass).square() - 2 * torch.exp(-nll) + 1).clamp_(min=0)
    rank = before.long()
    for image in (not_after - before > 1).nonzero().squeeze(1).tolist():
        rank[image] += (cosines[image, : labels[image]] == of_label[image]).sum()
    return ZeroShot(1 / mass, prediction, rank == 0, nll, brier, rank < 5, rank)


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
    confidences, hits = map(torch.from_numpy, outcomes(confidence, correct))
    return float(binary_calibration_error(confidences.clamp(max=BELOW_ONE), hits.long(), n_bins=n_bins))


def confidence_gap(confidence: Any, correct: Any) -> float:
    """Return mean confidence minus accuracy, in −1..1: positive means overconfident. Arguments as for the ECE."""
    confidences, hits = outcomes(confidence, correct)
    return float(np.mean(confidences) - np.mean(hits))
