"""What calibration remembers of a tensor, in bounded memory, and the search for the scale of least squared error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qatlab.errors import UserError

BINS = 2**16
# A batch is counted in pieces: the bin of every element takes 8 bytes.
PIECE = 2**22


class WeightStatistics:
    """The weight itself, (rows, n), one row per scale: it is there whole, so nothing has to be summarised.

    ``absmax`` and ``mean_abs`` are float64 of ``shape``, the shape of the scale. Raises UserError on NaN or infinite
    values.
    """

    def __init__(self, rows: Tensor, shape: torch.Size) -> None:
        self.rows, self.shape = rows, shape
        self.absmax = rows.abs().amax(1).double().reshape(self.shape)
        _require_finite(self.absmax)

    @property
    def mean_abs(self) -> Tensor:
        """The mean of |w| per scale."""
        return self.rows.abs().mean(1, dtype=torch.float64).reshape(self.shape)

    def mse_optimal_scale(self, qmin: int, qmax: int) -> Tensor:
        """Return the scales of least squared error between the rows and their quantized twins, float64."""

        def squared_error(scale: Tensor) -> Tensor:
            step = scale.reshape(-1, 1).to(self.rows.dtype)
            error = torch.div(self.rows, step).round_().clamp_(qmin, qmax).mul_(step).sub_(self.rows)
            return error.square_().sum(1).double().reshape(self.shape)

        return _search(squared_error, self.absmax / qmax)


class ActivationStatistics:
    """Running absmax, mean of |x| and, on request, a histogram of a tensor seen batch by batch.

    The histogram has BINS equal bins over [-range, range]. A larger value doubles the range, which merges bins two by
    two and so loses no count.
    """

    def __init__(self, *, histogram: bool) -> None:
        self.absmax = torch.zeros((), dtype=torch.float64)
        self._total = torch.zeros((), dtype=torch.float64)
        self._elements = 0
        self._range = 0.0
        self._counts: Tensor | None = None
        self._histogram = histogram

    @property
    def mean_abs(self) -> Tensor:
        """The mean of |x| over all that was seen, float64, shape ()."""
        return self._total / max(1, self._elements)

    def update(self, x: Tensor) -> None:
        """Take one batch of any shape; UserError on NaN or infinite values."""
        if x.numel() == 0:
            return
        absmax = torch.stack(torch.aminmax(x)).abs().max().double()
        _require_finite(absmax)
        self.absmax = torch.maximum(self.absmax.to(x.device), absmax)
        self._total = self._total.to(x.device) + torch.linalg.vector_norm(x, 1, dtype=torch.float64)
        self._elements += x.numel()
        # A tensor of zeros alone is represented exactly by every scale, so it needs no counting.
        if self._histogram and float(self.absmax) > 0:
            self._count(x)

    def _count(self, x: Tensor) -> None:
        if self._counts is None:
            self._range = float(self.absmax)
            self._counts = torch.zeros(BINS, dtype=torch.float64, device=x.device)
        while self._range < float(self.absmax):
            merged = self._counts.view(-1, 2).sum(1)
            self._counts = torch.zeros_like(self._counts)
            self._counts[BINS // 4 : 3 * BINS // 4] = merged
            self._range *= 2
        for piece in x.flatten().split(PIECE):
            # Not torch.histc, whose float32 counts saturate and which is refused on GPUs in deterministic mode.
            bins = ((piece.float() + self._range) * (BINS / 2 / self._range)).long().clamp_(0, BINS - 1)
            self._counts += torch.bincount(bins, minlength=BINS)

    def mse_optimal_scale(self, qmin: int, qmax: int) -> Tensor:
        """Return the scale of least squared error over the histogram, float64, shape ()."""
        if self._counts is None:
            return self.absmax / qmax
        seen = self._counts > 0
        counts = self._counts[seen]
        values = ((seen.nonzero().squeeze(1).double() + 0.5) * (2 / BINS) - 1) * self._range

        def squared_error(scale: Tensor) -> Tensor:
            error = torch.div(values, scale).round_().clamp_(qmin, qmax).mul_(scale).sub_(values)
            return error.square_() @ counts

        return _search(squared_error, self.absmax / qmax)


def _search(squared_error: Callable[[Tensor], Tensor], largest: Tensor) -> Tensor:
    """Return the scales, from ``largest`` / 1000 to ``largest``, of least ``squared_error`` (elementwise, same shape).

    A geometric grid finds the valley, since the error has many small local minima; three finer ones go to its bottom.
    """
    factor = 1.13
    largest = largest.clamp(min=1e-30)
    best, least = largest, squared_error(largest)
    candidates = [largest * factor**-k for k in range(1, 57)]
    for _ in range(4):
        for candidate in candidates:
            error = squared_error(candidate)
            best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
        factor **= 0.2
        candidates = [best * factor**k for k in (-4, -3, -2, -1, 1, 2, 3, 4)]
    return best


def _require_finite(absmax: Tensor) -> None:
    if not bool(absmax.isfinite().all()):
        raise UserError("calibration met NaN or infinite values; look for broken images or overflowing weights.")
