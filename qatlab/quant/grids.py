"""From what calibration saw to the grid: the scale and zero point that each observer chooses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qatlab.errors import UserError, nearest
from qatlab.quant.observers import ActivationStatistics, WeightStatistics

OBSERVERS = ("absmax", "ema", "percentile", "mse")
# The scale of a tensor (or of a weight row) that is zero throughout: positive, so that 0 / scale is 0 and never NaN.
SMALLEST_SCALE = 1e-12

Statistics = ActivationStatistics | WeightStatistics


@dataclass(frozen=True)
class Observer:
    """How the ends of a grid are chosen from what was seen.

    "absmax": the largest value, of each sign on a grid with zero point. "ema": its running mean over batches, momentum
    0.1. "percentile": the value that ``percentile`` % of all |x| do not exceed; with zero point, that many % of all x
    do not exceed and that many do not fall below. "mse": the grid of least squared error.
    """

    name: str
    percentile: float = 99.99

    def require(self, option: str, known: Iterable[str]) -> None:
        """Raise UserError when the name, the value of ``option``, is not ``known``, or the percentile no percentile."""
        if self.name not in known:
            raise UserError(f"{option} is {self.name!r}{nearest(str(self.name), known)}: there are {', '.join(known)}.")
        number = isinstance(self.percentile, (int, float)) and not isinstance(self.percentile, bool)
        if not number or not 50 < self.percentile <= 100:
            raise UserError(
                f"percentile is {self.percentile!r}: it takes a number above 50, at most 100, such as 99.99."
            )

    @property
    def needs_histogram(self) -> bool:
        """Whether the running ends are not enough."""
        return self.name in ("percentile", "mse")

    def scale(self, statistics: Statistics, qmin: int, qmax: int) -> Tensor:
        """Return the step of a grid without zero point, float64, of the scale's shape; 0 where all was 0."""
        if self.name == "mse":
            return statistics.mse_optimal_scale(qmin, qmax)
        if self.name == "percentile":
            return statistics.percentile(self.percentile) / qmax
        if self.name == "ema":
            assert isinstance(statistics, ActivationStatistics)
            return torch.maximum(statistics.moving_low.abs(), statistics.moving_high.abs()) / qmax
        return statistics.absmax / qmax

    def grid(self, statistics: ActivationStatistics, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        """Return the step and the whole-numbered zero point of a grid that holds 0, float64, of the scale's shape."""
        if self.name == "mse":
            scale, zero = statistics.mse_optimal_grid(qmin, qmax)
            return scale.clamp(min=SMALLEST_SCALE), zero
        if self.name == "percentile":
            return spanning(*statistics.tails(self.percentile), qmin, qmax)
        if self.name == "ema":
            return spanning(statistics.moving_low, statistics.moving_high, qmin, qmax)
        return spanning(statistics.low, statistics.high, qmin, qmax)


def spanning(low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Return (scale, zero point) of the grid from min(low, 0) to max(high, 0), both of low's shape and dtype.

    The zero point is rounded to a whole number from qmin to qmax, which moves both ends by up to half a step.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (qmax - qmin)).clamp(min=SMALLEST_SCALE)
    return scale, (qmin - torch.round(low / scale)).clamp(qmin, qmax)
