"""Statistics of a tensor that calibration keeps, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from qatlab.core.errors import UserError
from qatlab.quant.quantizers.histogram import PIECE, Histogram, rank, search

# The weight of a new batch in the running means of the ends: the value
# of the quantizer that the first author of arXiv 2509.21173 published.
MOMENTUM = 0.1
# Elements of weights for which scales are searched together,
# so that the temporaries of a search stay in a core's cache.
ROWS_PIECE = 2**16


class WeightStatistics:
    """The weight itself, (rows, n), one row per scale; a weight is complete, so nothing has to be summarised.

    ``absmax`` and ``mean_abs`` are float64 of ``shape``, the shape of the scale. Raises UserError on NaN or infinite
    values.
    """

    def __init__(self, rows: Tensor, shape: torch.Size) -> None:
        self.rows, self.shape = rows, shape
        # A NaN or an infinite value anywhere in a row shows up in the row's maximum.
        self.absmax = rows.abs().amax(1).double().reshape(self.shape)
        require_finite(self.absmax)

    @property
    def mean_abs(self) -> Tensor:
        """The mean of |w| over the weights that share a scale, float64, of the scale's shape, () or (rows, 1)."""
        return self.rows.abs().mean(1, dtype=torch.float64).reshape(self.shape)

    def percentile(self, percent: float) -> Tensor:
        """Return the least value that at least ``percent`` % of a row's |w| do not exceed, float64, () or (rows, 1)."""
        magnitudes = self.rows.abs().float()
        return magnitudes.kthvalue(rank(percent, magnitudes.shape[1]), 1).values.double().reshape(self.shape)

    def mse_optimal_scale(self, qmin: int, qmax: int) -> Tensor:
        """Return the scales of least squared error between rows and their quantized twins, float64, () or (rows, 1)."""
        # A piece has few rows, so that its search ends early: a search goes on until no row of the piece can gain.
        pieces = self.rows.split(max(1, ROWS_PIECE // max(1, self.rows.shape[1])))
        largest = (self.absmax / qmax).reshape(-1, 1).split([len(piece) for piece in pieces])
        found = [_mse_optimal(*pair, qmin, qmax) for pair in zip(pieces, largest, strict=True)]
        return torch.cat(found).reshape(self.shape)


class ActivationStatistics:
    """Statistics of a tensor seen batch by batch: ends, their mean over batches, mean of |x|, on request a histogram.

    ``low``, ``high`` (smallest and largest value), ``absmax`` and ``moving_low``, ``moving_high`` (the batch's ends,
    averaged with MOMENTUM, starting from the first batch's) are float64, of shape () or, with ``channels``, of shape
    (channels,), for each index of the last dimension. Before any value ``low`` is inf and ``high`` -inf.
    """

    def __init__(self, *, histogram: bool, channels: int | None = None) -> None:
        shape = () if channels is None else (channels,)
        self.channels = channels
        self.absmax = torch.zeros(shape, dtype=torch.float64)
        self.low, self.high = torch.full_like(self.absmax, torch.inf), torch.full_like(self.absmax, -torch.inf)
        self.moving_low, self.moving_high = self.low, self.high
        self._total = torch.zeros((), dtype=torch.float64)
        self._elements = 0
        self._wants_histogram = histogram
        self._histogram: Histogram | None = None

    @property
    def mean_abs(self) -> Tensor:
        """The mean of |x| over all that was seen, a float64 scalar."""
        return self._total / max(1, self._elements)

    def update(self, x: Tensor) -> None:
        """Add a batch x, (..., channels) where ``channels`` is given, to the statistics.

        Raises UserError on NaN or infinite values.
        """
        if x.numel() == 0:
            return
        rows = x.reshape(-1, self.channels or 1)
        # torch.aminmax over a dimension takes twenty times as long on a CPU.
        low, high = torch.aminmax(x) if self.channels is None else (rows.amin(0), rows.amax(0))
        low, high = low.double(), high.double()
        absmax = torch.maximum(low.abs(), high.abs())
        require_finite(absmax)
        self._move(low, high)
        # The running values start on the CPU and follow the activations to their device.
        self.low, self.high = torch.minimum(self.low.to(x.device), low), torch.maximum(self.high.to(x.device), high)
        self.absmax = torch.maximum(self.absmax.to(x.device), absmax)
        # A norm in float64 copies float32 values to float64 first, and pieces keep that copy small.
        norms = [torch.linalg.vector_norm(piece, 1, dtype=torch.float64) for piece in x.flatten().split(PIECE)]
        self._total = self._total.to(x.device) + torch.stack(norms).sum()
        self._elements += x.numel()
        # A tensor of zeros is represented exactly at every scale, so it needs no histogram.
        if self._wants_histogram and (largest := float(self.absmax)) > 0:
            if self._histogram is None:
                self._histogram = Histogram(largest, x.device)
            self._histogram.update(x, largest)

    def percentile(self, percent: float) -> Tensor:
        """Return the least value that at least ``percent`` % of all |x| do not exceed, (), exact to a bin's width."""
        if self._histogram is None:
            return self.absmax
        # The centre of a bin may lie beyond every value that was counted in the bin.
        return torch.minimum(self._histogram.percentile(percent), self.absmax)

    def tails(self, percent: float) -> tuple[Tensor, Tensor]:
        """Return (low, high), (), exact to a bin's width: ``percent`` % of all x are at least low, as many at most high."""
        if self._histogram is None:
            return self.low, self.high
        low, high = self._histogram.tails(percent)
        return torch.maximum(low, self.low), torch.minimum(high, self.high)

    def mse_optimal_scale(self, qmin: int, qmax: int) -> Tensor:
        """Return the scale of least squared error over the histogram, a float64 scalar."""
        # Without a histogram all values seen were 0.
        if self._histogram is None:
            return self.absmax / qmax
        return self._histogram.mse_optimal_scale(self.absmax / qmax, qmin, qmax)

    def mse_optimal_grid(self, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        """Return the (scale, zero point) of least squared error over the histogram, each a float64 scalar."""
        # Without a histogram all values seen were 0, and so is ``absmax``.
        if self._histogram is None:
            return self.absmax, torch.full_like(self.absmax, qmin)
        return self._histogram.mse_optimal_grid(self.low.clamp(max=0), self.high.clamp(min=0), qmin, qmax)

    def _move(self, low: Tensor, high: Tensor) -> None:
        if self._elements == 0:
            self.moving_low, self.moving_high = low, high
        else:
            self.moving_low = torch.lerp(self.moving_low.to(low.device), low, MOMENTUM)
            self.moving_high = torch.lerp(self.moving_high.to(high.device), high, MOMENTUM)


def _mse_optimal(rows: Tensor, largest: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return for each of ``rows`` (n, width) the step, at most ``largest`` (n, 1), of least squared error, float64."""

    def squared_error(scale: Tensor) -> Tensor:
        """Return the error of each row, float64 (n, 1), with the steps ``scale`` (n, 1)."""
        step = scale.to(rows.dtype)
        error = torch.div(rows, step).round_().clamp_(qmin, qmax).mul_(step).sub_(rows)
        return error.square_().sum(1, keepdim=True).double()

    return search(squared_error, largest, rows.shape[1])


def require_finite(values: Tensor) -> None:
    """Raise UserError where ``values`` (of any shape), the ends of what calibration met, are NaN or infinite."""
    if not bool(values.isfinite().all()):
        raise UserError("calibration met NaN or infinite values; look for broken images or overflowing weights.")
