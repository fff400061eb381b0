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

# A block has this many float64 numbers (2 MB), which stay in a core's cache, so that the pass over (N, C) cosines
# takes the same time per image at any N.
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
    # Each block is reduced to one number per image at once, because a softmax of all (N, C) would fill the memory.
    parts = [Peak(best, top.squeeze(1), powers.sum(dim=1)) for _, best, top, powers in _powers(cosines, logit_scale)]
    return Peak(*map(torch.cat, zip(*parts, strict=True)))


def _powers(cosines: Tensor, logit_scale: float) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield block after block of rows with top class (B,), its cosine (B, 1) and exp(s (c − max c)) (B, C) in float64.

    The (B, C) tensor lies in the same memory each time: the caller reduces it before it asks for the next block.
    """
    # One buffer serves all blocks, so that the pass needs memory for a single block, however many images there are.
    memory = _block_of(cosines, torch.float64)
    for rows in blocks(cosines):
        block = cosines[rows]
        # The top class is found before the conversion to float64, which doubles the bytes that are compared.
        best = _first_largest(block)
        top = block.gather(1, best[:, None]).double()
        gaps = memory[: len(block)].copy_(block).sub_(top)
        # A power of 2 is computed faster than a power of e; the factor log2(e) turns one into the other.
        yield rows, best, top, _exp2_(gaps.mul_(logit_scale * _LOG2_E))


def _block_of(cosines: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(cosines[blocks(cosines)[0]].shape, dtype=dtype, device=cosines.device)


def _first_largest(block: Tensor) -> Tensor:
    """Return the first largest class of each row, (B,) int64; on a CPU numpy's argmax takes a tenth of torch's time."""
    # numpy has no bfloat16, and is slow with half precision.
    if block.device.type == "cpu" and block.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(block.detach().numpy().argmax(axis=1))
    return block.max(dim=1).indices


def _exp2_(exponents: Tensor) -> Tensor:
    """Return 2^x of float64 ``exponents`` of any shape, written over them.

    On a CPU numpy's exp2 takes a third of the time of torch's exp, and torch's exp2 would give an element other bits at
    another place in the block.
    """
    if exponents.device.type == "cpu":
        np.exp2(exponents.numpy(), out=exponents.numpy())
        return exponents
    return exponents.exp2_()


def blocks(cosines: Tensor) -> list[slice]:
    """Return slices, at least one, that cut (N, C) into runs of rows small enough for a core's cache in float64."""
    # A block has at least one row, even where the classes alone fill more than a block.
    step = max(1, _BLOCK // cosines.shape[1])
    # max(1, N) gives one empty slice where there is no image, so that callers find a shape to concatenate.
    return [slice(start, start + step) for start in range(0, max(1, len(cosines)), step)]


class ZeroShot(NamedTuple):
    """Per image (N,): ``confidence`` float64, ``prediction`` int64, ``correct`` bool, ``nll`` float64 in nats,
    ``brier`` float64 in 0..2 and ``rank`` int64, the number of classes that come before the label's.
    """

    confidence: Tensor
    prediction: Tensor
    correct: Tensor
    nll: Tensor
    brier: Tensor
    rank: Tensor


def score_zero_shot(cosines: Tensor, labels: Tensor, logit_scale: float) -> ZeroShot:
    """Return the ZeroShot numbers of softmax(s c) for every image and its label, (N,) each, in the memory of a block.

    ``cosines`` (N, C), ``labels`` (N,) int64 in 0..C-1, ``logit_scale`` s > 0. The Brier score is Σ_k (p_k − y_k)²,
    Brier 1950. Classes are ranked by cosine, equal ones by their index, so ``rank`` is 0 exactly where ``correct``.
    Raises ValueError on a label outside the classes and on cosines that are NaN or +inf.
    """
    check_labels(labels, cosines.shape[1])
    of_label = cosines.gather(1, labels[:, None])
    memory = _block_of(cosines, torch.float32)
    sums = []
    for rows, best, top, powers in _powers(cosines, logit_scale):
        # Comparisons written as float32 are summed ten times as fast as bools. Such sums are exact below 2^24 classes.
        ones = memory[: len(best)]
        # Classes above the label's cosine, and classes not below it:
        # their numbers differ by more than 1 where there are ties.
        before = torch.gt(cosines[rows], of_label[rows], out=ones).sum(dim=1)
        not_after = torch.ge(cosines[rows], of_label[rows], out=ones).sum(dim=1)
        norm = torch.linalg.vector_norm(powers, dim=1)
        sums.append((best, top.squeeze(1), powers.sum(dim=1), norm, before, not_after))
    prediction, top, mass, norm, before, not_after = map(torch.cat, zip(*sums, strict=True))
    # A NaN or +inf among the cosines of an image makes its mass NaN, so one test per image finds both.
    bad = int(mass.isnan().sum())
    if bad:
        raise ValueError(f"{bad} of {len(labels)} images have cosines that are NaN or infinite")
    nll = mass.log() + logit_scale * (top - of_label.squeeze(1).double())
    # Σ (p_k − y_k)² = Σ p_k² − 2 p_label + 1. Rounding may make the sum slightly negative.
    brier = ((norm / mass).square() - 2 * torch.exp(-nll) + 1).clamp_(min=0)
    # Of classes that tie with the label, those of a lower index come
    # first. Ties are rare, so a loop over such images is enough.
    rank = before.long()
    for image in (not_after - before > 1).nonzero().squeeze(1).tolist():
        rank[image] += (cosines[image, : labels[image]] == of_label[image]).sum()
    return ZeroShot(1 / mass, prediction, rank == 0, nll, brier, rank)


def check_labels(labels: Tensor, n_classes: int) -> None:
    """Raise ValueError naming the first of the ``labels``, (N,) integers, that is not in 0..n_classes-1."""
    outside = labels[(labels < 0) | (labels >= n_classes)]
    if len(outside):
        raise ValueError(
            f"label {int(outside[0])} is outside 0..{n_classes - 1} ({len(outside)} of {len(labels)} images; "
            "-1 marks a set without labels, which cannot be scored against any)"
        )


def expected_calibration_error(confidence: Any, correct: Any, n_bins: int = 15) -> float:
    """Return the expected calibration error Σ_b n_b/N |accuracy_b − confidence_b| over equal-width bins, in 0..1.

    ``confidence`` (N,) in [0, 1] and ``correct`` (N,) bool or 0/1, arrays or tensors. Guo et al. 2017, eq. 3, computed
    by torchmetrics in float64. Two conventions of torchmetrics are avoided: values outside [0, 1], which it takes for
    logits, raise ValueError, and a confidence of exactly 1, for which it makes an extra bin, counts in the last bin.
    """
    confidences, hits = map(torch.from_numpy, outcomes(confidence, correct))
    # The clamp keeps a confidence of 1 out of the extra bin that torchmetrics makes for it.
    return float(binary_calibration_error(confidences.clamp(max=BELOW_ONE), hits.long(), n_bins=n_bins))


def confidence_gap(confidence: Any, correct: Any) -> float:
    """Return mean confidence minus accuracy, in −1..1: positive means overconfident. Arguments as for the ECE."""
    confidences, hits = outcomes(confidence, correct)
    return float(np.mean(confidences) - np.mean(hits))
