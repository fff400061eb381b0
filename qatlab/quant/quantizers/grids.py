"""The scale and zero point that each observer chooses from the statistics of calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from qatlab.core.domains import Between
from qatlab.quant.quantizers.observers import ActivationStatistics, WeightStatistics

OBSERVERS = ("absmax", "ema", "percentile", "mse")
# At 50 % or less the lower tail would reach the upper one.
Percentile = Annotated[float, Between(50, 100, above=True)]
# The scale of a tensor (or of a weight row) that is zero throughout: positive, so that 0 / scale is 0 and never NaN.
SMALLEST_SCALE = 1e-12

Statistics = ActivationStatistics | WeightStatistics


@dataclass(frozen=True)
class Observer:
    """The rule by which the ends of a grid are chosen from statistics.

    "absmax": the largest value, of each sign on a grid with zero point. "ema": its running mean over batches, momentum
    0.1. "percentile": the value that ``percentile`` % of all |x| do not exceed; with zero point, the values that
    ``percentile`` % of all x do not exceed and do not fall below. "mse": the grid of least squared error.
    """

    name: str
    percentile: float = 99.99

    @property
    def needs_histogram(self) -> bool:
        """Whether the ends need a histogram of all values, and not only running ends."""
        return self.name in ("percentile", "mse")

    def scale(self, statistics: Statistics, qmin: int, qmax: int) -> Tensor:
        """Return the step of a grid without zero point, float64, of the scale's shape, () or (n, 1); 0 for zeros."""
        # The end is divided by qmax, although the negative side has one
        # code more, so that the largest |x| has a code with either sign.
        if self.name == "mse":
            return statistics.mse_optimal_scale(qmin, qmax)
        if self.name == "percentile":
            return statistics.percentile(self.percentile) / qmax
        if self.name == "ema":
            assert isinstance(statistics, ActivationStatistics)
            # A grid without zero point reaches equally far on both sides, so the end that is farther from 0 decides.
            return torch.maximum(statistics.moving_low.abs(), statistics.moving_high.abs()) / qmax
        return statistics.absmax / qmax

    def grid(self, statistics: ActivationStatistics, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        """Return the step and the whole-numbered zero point of a grid that holds 0, float64, both () or (channels,)."""
        if self.name == "mse":
            scale, zero = statistics.mse_optimal_grid(qmin, qmax)
            # Where all values are 0 the search gives the scale 0.
            return scale.clamp(min=SMALLEST_SCALE), zero
        if self.name == "percentile":
            return spanning(*statistics.tails(self.percentile), qmin, qmax)
        if self.name == "ema":
            return spanning(statistics.moving_low, statistics.moving_high, qmin, qmax)
        return spanning(statistics.low, statistics.high, qmin, qmax)


def spanning(low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Return (scale, zero point) of the grid from min(low, 0) to max(high, 0), both in the shape and dtype of ``low``.

    ``low`` and ``high`` may have any shape, such as () or (tokens, 1).

    The zero point is rounded to a whole number from qmin to qmax, which moves both ends by up to half a step.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (qmax - qmin)).clamp(min=SMALLEST_SCALE)
    # A whole-numbered zero point gives 0 a code, so that 0 is rounded to exactly 0.
    return scale, (qmin - torch.round(low / scale)).clamp(qmin, qmax)
