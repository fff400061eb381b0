"""Logarithmic quantization of values from 0 to 1, such as the attention weights that a softmax gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qatlab.core.errors import UserError
from qatlab.quant.quantizers.grids import SMALLEST_SCALE
from qatlab.quant.quantizers.kernels import widened
from qatlab.quant.quantizers.observers import require_finite

PARTS = 37  # r of AdaLog: the base is a power of the 37th root of 2
CANDIDATES = range(1, 2 * PARTS + 1)  # p: bases from the 37th root of 2 to 4
BINS_PER_OCTAVE, OCTAVES = 64, 32  # of the histogram that the base is searched on


class LogHistogram:
    """Number, sum and sum of squares of non-negative values by bins of their logarithm, float64 (channels, bins).

    A bin is 1 / BINS_PER_OCTAVE of an octave wide; values below 2^-OCTAVES are in the last one.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.channels = channels
        self.counts, self.sums, self.squares = (
            torch.zeros(channels, BINS_PER_OCTAVE * OCTAVES, dtype=torch.float64, device=device) for _ in range(3)
        )

    def update(self, rows: Tensor) -> None:
        """Add the values ``rows`` (n, channels), from 0 to 1."""
        bins = self.counts.shape[1]
        places = (-rows.log2() * BINS_PER_OCTAVE).clamp(0, bins - 1).long()
        places = (places + torch.arange(self.channels, device=rows.device) * bins).flatten()
        values = rows.flatten().double()
        for held, weights in ((self.counts, None), (self.sums, values), (self.squares, values.square())):
            held += torch.bincount(places, weights, held.numel()).view(held.shape)


class LogQuantizer(nn.Module):
    """Returns s * 2^(-q e) for x from 0 to s, with the code q = clip(round(-log2(x / s) / e), 0, 2^bits - 1).

    e is 1/2, as in RepQ-ViT (arXiv 2212.08254): s * 2^(-ceil(q / 2)) * (1 + (sqrt(2) - 1) (q mod 2)) is the same number.
    With ``searched`` it is p / 37, as in AdaLog (arXiv 2407.12951), with the p of least squared error over the values
    observed. s is the largest of these. Where a weight is 0, it is rounded to the smallest value.

    With ``per_channel`` each index of the last dimension, ``channels`` in number, has its own s and p. The result has
    x's dtype and is computed in float32 or wider; the gradient is straight-through, because no code is out of reach
    for x from 0 to s. The scale is NaN until ``observe`` and ``fit``, or a state dict.
    """

    step: Tensor
    numerator: Tensor

    def __init__(self, bits: int, *, channels: int, per_channel: bool, searched: bool) -> None:
        super().__init__()
        self.bits, self.channels, self.per_channel, self.searched = bits, channels, per_channel, searched
        shape = (channels,) if per_channel else ()
        self.register_buffer("step", torch.full(shape, float("nan")))
        if searched:
            self.register_buffer("numerator", torch.full(shape, PARTS // 2, dtype=torch.int32))
        self._largest: Tensor | None = None
        self._histogram: LogHistogram | None = None
        self._ready = False

    @property
    def scale(self) -> Tensor:
        """The largest value s, () or (channels,)."""
        return self.step

    @property
    def exponent(self) -> Tensor:
        """The e of the base 2^-e, () or (channels,), of the dtype of s."""
        return self.numerator / PARTS if self.searched else torch.full_like(self.step, 0.5)

    def observe(self, x: Tensor) -> None:
        """Keep what ``fit`` needs of x (..., channels) from 0 to 1; raises UserError for NaN and infinite values."""
        rows = x.detach().reshape(-1, self.channels if self.per_channel else 1)
        largest = rows.amax(0)
        require_finite(largest)
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        if self.searched:
            if self._histogram is None:
                self._histogram = LogHistogram(rows.shape[1], x.device)
            self._histogram.update(rows)

    def fit(self) -> None:
        """Set the scale, and the base where it is searched, from what was observed; UserError when nothing was."""
        if self._largest is None:
            raise UserError("nothing was observed: a quantizer sees at least one tensor before its scale is fitted.")
        self.step.copy_(self._largest.clamp(min=SMALLEST_SCALE).view(self.step.shape))
        if self._histogram is not None:
            self.numerator.copy_(self._best(self._histogram).view(self.step.shape))
        self._largest = self._histogram = None
        self._ready = True

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., channels) rounded, in its shape and dtype; raises UserError before calibration."""
        if not self._ready and bool(self.step.isnan().any()):
            raise UserError("a quantizer runs before it has a scale: call qatlab.quant.calibrate(model, images) first.")
        self._ready = True
        rounded: Tensor = _StraightThrough.apply(x, self.step, self.exponent, 2**self.bits - 1)  # type: ignore[no-untyped-call]
        return rounded

    def grid_rows(self, x: Tensor) -> Tensor:
        """Return x (..., channels) as (number of scales, -1): a rounded row holds at most 2^bits values."""
        return x.reshape(-1, self.channels).T if self.per_channel else x.reshape(1, -1)

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        return f"bits={self.bits}, per_channel={self.per_channel}, searched={self.searched}"

    def _best(self, seen: LogHistogram) -> Tensor:
        """Return the p of least squared error for each row of the histogram, int64 (rows,)."""
        # Within a bin, whose values differ by 1 %, all are rounded as their mean is.
        means = (seen.sums / seen.counts.clamp(min=1)).T
        step = self.step.double().reshape(-1)
        errors = []
        for numerator in CANDIDATES:
            exponent = torch.full_like(step, numerator / PARTS)
            value = rounded_logarithm(means, step, exponent, 2**self.bits - 1).T
            errors.append((seen.squares - 2 * value * seen.sums + value.square() * seen.counts).sum(1))
        return torch.stack(errors).argmin(0) + CANDIDATES[0]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The loaded state may be that of a model before calibration, with NaN scales, so the next forward checks again.
        self._ready = False
        super()._load_from_state_dict(*args, **kwargs)


def rounded_logarithm(x: Tensor, step: Tensor, exponent: Tensor, last: int) -> Tensor:
    """Return s * 2^(-q e), in the shape and dtype of x (..., n), with codes q from 0 to ``last``.

    ``step`` s and ``exponent`` e are () or (n,).
    """
    codes = torch.div(widened(x), step).log2_().neg_().div_(exponent).round_().clamp_(0, last).long()
    # The levels are looked up: a power that is computed for each x differs in its last digit from one place of a tensor
    # to another, and a code would stand for several values.
    every = torch.arange(last + 1, dtype=step.dtype, device=x.device)
    levels = torch.exp2(-every[:, None] * exponent.reshape(-1)) * step.reshape(-1)
    found = levels[codes, torch.arange(len(step), device=x.device)] if step.ndim else levels[:, 0][codes]
    return found.to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    """Round the logarithm; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, x: Tensor, step: Tensor, exponent: Tensor, last: int) -> Tensor:
        """Return x (..., n) rounded, in its shape and dtype."""
        return rounded_logarithm(x, step, exponent, last)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient to x, that of the result (..., n)."""
        return grad, None, None, None
