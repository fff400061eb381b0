"""Learned step size quantization."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from qatlab.core.domains import OneOf, checked
from qatlab.quant.quantizers.base import SMALLEST_SCALE, Bits, Quantizer, Statistics
from qatlab.quant.quantizers.grids import Observer, Percentile
from qatlab.quant.quantizers.kernels import Kernels


class _LearnedStep(torch.autograd.Function):
    """LSQ's forward and backward; it saves x and s only and computes the rest again."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, qmin: int, qmax: int, gradient_scale: float, kernels: Kernels) -> Tensor:
        """Return x rounded to the grid, in the shape and dtype of x: (rows, n), or any shape with a scalar scale."""
        ctx.save_for_backward(x, scale)
        ctx.constants = qmin, qmax, gradient_scale, kernels
        return kernels.fake_quantize(x, scale, qmin, qmax)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients to x and to the scale, given that of the result, which has the shape of x (rows, n)."""
        x, scale = ctx.saved_tensors
        qmin, qmax, gradient_scale, kernels = ctx.constants
        grad_x, grad_scale = kernels.lsq_backward(x, scale, grad, qmin, qmax)
        return grad_x, (grad_scale * gradient_scale).to(scale.dtype), None, None, None, None


Init = Annotated[str, OneOf("absmax", "lsq", "mse", "percentile")]


class LSQ(Quantizer):
    """Returns x on a grid whose step s is learned (Esser 2020, arXiv 1902.08153).

    With v = x / s: the output is round(clip(v, qmin, qmax)) * s. Strictly inside the range the gradient to x passes and
    ds = round(v) - v; at and beyond its ends dx = 0, ds = qmin or qmax. ds is multiplied by 1 / sqrt(N * qmax), where
    N is the number of elements that share one scale without the batch: two processes then give the gradient of one.

    ``init``: "absmax" puts the grid's end at the largest |x|; "lsq" is the paper's 2 <|x|> / sqrt(qmax), a low-bit rule
    that wastes about two of 8 bits; "mse" minimises the squared error on what was observed; "percentile" puts the end
    where ``percentile`` % of all |x| lie below it. ``log_scale``: the learned parameter is log s (``log_step``), so
    that a learning rate means a relative change, or s itself (``step``), used as |s|.
    """

    log_step: nn.Parameter
    step: nn.Parameter

    @checked
    def __init__(
        self,
        bits: Bits,
        *,
        channels: int,
        batched: bool,
        per_channel: bool = False,
        init: Init = "absmax",
        percentile: Percentile = 99.99,
        log_scale: bool = True,
    ) -> None:
        super().__init__(bits, channels=channels, batched=batched, per_channel=per_channel)
        self.observer, self.log_scale = Observer(init, percentile), log_scale
        # Two names, so that a state dict that holds s is never loaded as log s.
        self.register_parameter("log_step" if log_scale else "step", nn.Parameter(self._empty_scale()))

    @property
    def scale(self) -> Tensor:
        """The step s of the grid, shape () or (channels, 1), positive, differentiable."""
        if self.log_scale:
            return self.log_step.exp()
        # An optimizer may move s through zero, where the grid would vanish or be mirrored.
        return self.step.abs().clamp(min=SMALLEST_SCALE)

    @torch.no_grad()
    def store_scale(self, scale: Tensor) -> None:
        """Store ``scale``, positive, () or (channels, 1), as the new scale, in place."""
        parameter = self.log_step if self.log_scale else self.step
        parameter.copy_(scale.log() if self.log_scale else scale)

    def needs_histogram(self) -> bool:
        """Return whether ``init`` reads a histogram, as percentiles and squared errors do."""
        return self.observer.needs_histogram

    def initial_scale(self, statistics: Statistics) -> Tensor:
        """Return the scale that ``init`` names, float64, () or (channels, 1)."""
        if self.observer.name == "lsq":
            return 2 * statistics.mean_abs / math.sqrt(self.qmax)
        return self.observer.scale(statistics, self.qmin, self.qmax)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return x rounded to the grid, in its shape and dtype: (rows, n), or any shape where there is one scale."""
        gradient_scale = 1 / math.sqrt(self._elements_per_scale(x) * self.qmax)
        return _LearnedStep.apply(x, self.scale, self.qmin, self.qmax, gradient_scale, self.kernels)

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        return f"{super().extra_repr()}, init={self.observer.name}, log_scale={self.log_scale}"

    def _elements_per_scale(self, x: Tensor) -> int:
        """Return LSQ's N for x: the number of elements that share one scale, the batch dimension left out."""
        # If N counted the batch, two processes with half of the images each would learn sqrt(2) times as fast as one.
        sharing = x.shape[0] if self.batched else self.channels if self.per_channel else 1
        return max(1, x.numel() // max(1, sharing))
