"""The inputs of a layer as the columns that its weight multiplies, and their second moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qatlab.quant.layers.linear import QuantConv2d, QuantLayer

STRIP = 768  # columns of a product that are computed at once: few make small products, many leave little to be saved
HELD_OUT = 4  # every fourth image
TRIED_ROWS = 64  # of a weight, evenly drawn, on which options are tried


def columns_of(layer: QuantLayer, x: Tensor) -> Tensor:
    """Return the input ``x`` of ``layer`` as (groups, N, n): N rows, each multiplied with all rows of a weight (m, n).

    A linear layer has one group. A convolution's row holds the pixels under its kernel, in the order of its weight.
    """
    if not isinstance(layer, QuantConv2d):
        return x.reshape(1, -1, x.shape[-1])
    patches = F.unfold(x, layer.kernel_size, layer.dilation, _padding(layer), layer.stride)  # (B, channels * kernel, L)
    return patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def rows_of(layer: QuantLayer, weight: Tensor) -> Tensor:
    """Return ``weight`` (out, in, ...) of ``layer`` as (groups, m, n): the rows that meet those of ``columns_of``."""
    groups = layer.groups if isinstance(layer, QuantConv2d) else 1
    return weight.reshape(groups, len(weight) // groups, -1)


def tried_rows(count: int) -> Tensor:
    """Return the places of at most TRIED_ROWS of ``count`` rows of a weight, evenly drawn, int64."""
    return torch.linspace(0, count - 1, min(count, TRIED_ROWS)).round().long()


def _padding(layer: QuantConv2d) -> tuple[int, ...]:
    """Return how many zeros are put above and left of the image, as many as below and right."""
    if isinstance(layer.padding, str):
        # torch allows "same" with a stride of 1 alone; qatlab's towers have odd kernels, of which it pads both sides alike.
        same = layer.padding == "same"
        return tuple((size - 1) * gap // 2 * same for size, gap in zip(layer.kernel_size, layer.dilation, strict=True))
    return layer.padding


class SecondMoments:
    """Sums of products of a layer's inputs over images: of x x^T, and of (x' - x) x^T where x' is given too.

    ``sums`` and ``drifts`` are float64 (groups, n, n), over ``count`` rows; ``drifts`` is None without x'.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.drifts: Tensor | None = None
        self.count = 0

    def update(self, x: Tensor, full: Tensor | None = None) -> None:
        """Add the rows x (groups, N, n), and the same rows in full precision, ``full`` of the shape of x."""
        self.count += x.shape[1]
        # One product of one batch in the inputs' own precision, and the sum over batches in float64.
        product = _products(x).double()
        self.sums = product if self.sums is None else self.sums.add_(product)
        if full is not None:
            drift = ((full - x).mT @ x).double()
            self.drifts = drift if self.drifts is None else self.drifts.add_(drift)

    def added(self, other: SecondMoments) -> SecondMoments:
        """Return the moments of the rows of both."""
        both = SecondMoments()
        both.count = self.count + other.count
        both.sums = _sum(self.sums, other.sums)
        both.drifts = _sum(self.drifts, other.drifts)
        return both

    def of_group(self, group: int) -> tuple[Tensor, Tensor | None]:
        """Return (H, D) of one group, each (n, n): 2 / N times the sums; D is None where x' was not given."""
        assert self.sums is not None
        scale = 2 / self.count
        return self.sums[group] * scale, None if self.drifts is None else self.drifts[group] * scale


def _products(x: Tensor) -> Tensor:
    """Return x^T x of rows x (groups, N, n), (groups, n, n)."""
    found = x.new_empty(len(x), x.shape[2], x.shape[2])
    for start in range(0, x.shape[2], STRIP):
        end = start + STRIP
        # The product is symmetric: what stands below a strip's square stands to the right of it too.
        found[:, start:end, start:] = x[:, :, start:end].mT @ x[:, :, start:]
        found[:, end:, start:end] = found[:, start:end, end:].mT
    return found


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return torch.add(one, other)


def moments_of(
    layer: QuantLayer, inputs: Sequence[Tensor], full: Sequence[Tensor] = (), constant: bool = False
) -> tuple[SecondMoments, SecondMoments]:
    """Return the moments of the rounded inputs of ``layer`` over three quarters of the images, and over every fourth image.

    ``inputs`` are the layer's inputs in each batch, before it rounds them, and ``full`` the same in full precision, where
    the moments of the differences are wanted. With ``constant`` every row gets a last element of 1, which meets the bias.
    """
    kept, held_out = SecondMoments(), SecondMoments()
    image = 0
    for place, x in enumerate(inputs):
        rows = _columns(layer, layer.rounded_input(x, layer.act_quantizer), constant)
        exact = _columns(layer, full[place], constant) if full else None
        last = (torch.arange(len(x), device=x.device) + image) % HELD_OUT == HELD_OUT - 1
        image += len(x)
        for moments, which in ((kept, ~last), (held_out, last)):
            if bool(which.any()):
                moments.update(_of_images(rows, which), None if exact is None else _of_images(exact, which))
    return kept, held_out


def _columns(layer: QuantLayer, x: Tensor, constant: bool) -> Tensor:
    rows = columns_of(layer, x)
    return F.pad(rows, (0, 1), value=1.0) if constant else rows


def _of_images(rows: Tensor, which: Tensor) -> Tensor:
    """Return those of the ``rows`` (groups, B * tokens, n) that belong to the images ``which`` (B,)."""
    return rows.unflatten(1, (len(which), -1))[:, which].flatten(1, 2)
