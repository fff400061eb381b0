"""Saturation: a CPU without VNNI adds two neighbouring products of bytes in sixteen bits, and cuts off larger sums.

The instruction is vpmaddubsw (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, PMADDUBSW): a sum
of two products that does not fit into sixteen bits silently becomes the nearest number that does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qatlab.deploy.integer import HIGH, IntegerLayer, integer_layers

LOWEST, HIGHEST = -(2**15), 2**15 - 1
NARROW = HIGHEST // (2 * HIGH)  # 64: two such codes times the largest input stay within sixteen bits
ROWS, PAIRS = 16, 16  # channels that are tried, and pairs of inputs that are at the largest code for each


def wide_layers(model: nn.Module) -> list[str]:
    """Return the names of the integer layers whose weights have codes beyond ±64: those that can be cut off."""
    return [
        name
        for name, layer in integer_layers(model).items()
        if layer.codes.min() < -NARROW or layer.codes.max() > NARROW
    ]


def extreme_codes(weight: Tensor) -> Tensor:
    """Return input codes (min(ROWS, N), K) uint8 that give the largest sums of two products with a weight (N, K).

    Each row is made for one output channel of the weight: its codes are 255 at the PAIRS pairs of neighbours with the
    largest positive sums of weights in this channel, and 0 elsewhere.
    """
    # With both inputs at 255 a pair adds 255 times the sum of its two weights: the largest sums overflow first.
    sums = _pairs(weight).clamp(min=0).sum(-1)
    channels = sums.topk(min(PAIRS, sums.shape[1])).values.sum(1).topk(min(ROWS, len(sums))).indices
    pairs = sums[channels].topk(min(PAIRS, sums.shape[1])).indices
    chosen = torch.zeros(len(channels), sums.shape[1], dtype=torch.bool).scatter(1, pairs, True)
    return (chosen.repeat_interleave(2, 1)[:, : weight.shape[1]] * HIGH).to(torch.uint8)


def extreme_input(layer: IntegerLayer, like: Tensor) -> Tensor:
    """Return an input of the shape of ``like`` (..., K) that a linear layer rounds to its ``extreme_codes``.

    The rows of the codes are repeated to fill the input.
    """
    codes = extreme_codes(layer.codes)
    # Codes become values again, so that the layer itself rounds the input to these codes.
    rows = torch.where(codes > 0, (codes.float() - layer.zero) * layer.scale, 0.0) + layer.offset
    return rows[torch.arange(like[..., 0].numel()) % len(rows)].view(like.shape)


def cut_off(codes: Tensor, weight: Tensor) -> Tensor:
    """Return the loss (M, N) of uint8 ``codes`` (M, K) times an int8 ``weight`` (N, K) where pairs are added in sixteen bits."""
    left, right = _pairs(codes), _pairs(weight)
    lost = []
    for row in left:  # one row at a time, because all rows together with all channels would take much memory
        sums = (row * right).sum(-1)
        lost.append((sums.clamp(LOWEST, HIGHEST) - sums).sum(-1))
    return torch.stack(lost).float()


def _pairs(codes: Tensor) -> Tensor:
    """Return (..., K / 2, 2) int32, pairs of neighbours along the last dimension; for an odd K a zero is added."""
    return nn.functional.pad(codes.to(torch.int32), (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2))
