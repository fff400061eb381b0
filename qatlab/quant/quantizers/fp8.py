"""FP8: eight-bit floating-point numbers, with one scale per tensor of activations and per output channel of weights."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from qatlab.core.domains import OneOf, checked
from qatlab.quant.quantizers.base import Statistics
from qatlab.quant.quantizers.floating import FloatingPoint


class FP8(FloatingPoint):
    """Returns s times the number of ``format``, e4m3 or e5m2, that is nearest to x / s, s = absmax / its largest number.

    The largest number is 448 or 57344; beyond it values are clipped (Micikevicius et al. 2022, arXiv 2209.05433). s is
    float32: that of activations is (), from calibration, that of weights (channels, 1).
    """

    @checked
    def __init__(self, format: Annotated[str, OneOf("e4m3", "e5m2")], *, channels: int, batched: bool) -> None:
        super().__init__(format, channels=channels, batched=batched, per_channel=not batched)
        self.register_buffer("step", self._empty_scale())

    def initial_scale(self, statistics: Statistics) -> Tensor:
        """Return absmax / largest, float64, () or (channels, 1)."""
        return statistics.absmax / self.number.largest
