"""The absmax quantizer: the largest value seen is the end of the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from qatlab.quant.kernels import Kernels
from qatlab.quant.quantizer import Quantizer, Statistics


class _StraightThrough(torch.autograd.Function):
    """Round to the grid; the gradient passes unchanged where the rounded value lies on the grid, both ends included."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, qmin: int, qmax: int, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.constants = qmin, qmax, kernels
        return kernels.fake_quantize(x, scale, qmin, qmax)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        qmin, qmax, kernels = ctx.constants
        return kernels.straight_through_backward(x, scale, grad, qmin, qmax), None, None, None, None


class MinMax(Quantizer):
    """Returns x on a grid that ends at the largest |x| seen in calibration: s = absmax / (2^(b-1) - 1), not learned.

    The gradient is straight-through inside the clip range, ends included (the mask of torch.fake_quantize_*). It is
    taken on the rounded code, because absmax / s may come out one float above its end and the largest value would be
    frozen.
    """

    step: Tensor

    def __init__(self, bits: int, *, channels: int, batched: bool, per_channel: bool = False) -> None:
        super().__init__(bits, channels=channels, batched=batched, per_channel=per_channel)
        self.register_buffer("step", self._empty_scale())

    @property
    def scale(self) -> Tensor:
        """The step s of the grid, shape () or (channels, 1)."""
        return self.step

    def store_scale(self, scale: Tensor) -> None:
        """Take ``scale`` as the new scale."""
        self.step.copy_(scale)

    def initial_scale(self, statistics: Statistics) -> Tensor:
        """Return absmax / qmax."""
        return statistics.absmax / self.qmax

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return x rounded to the grid."""
        return _StraightThrough.apply(x, self.step, self.qmin, self.qmax, self.kernels)
