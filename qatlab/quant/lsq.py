"""Learned step size quantization."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qatlab.quant.grids import Observer
from qatlab.quant.kernels import Kernels
from qatlab.quant.quantizer import SMALLEST_SCALE, Quantizer, Statistics


class _LearnedStep(torch.autograd.Function):
    """LSQ's forward and backward; saves x and s only and recomputes the rest."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, qmin: int, qmax: int, gradient_scale: float, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.constants = qmin, qmax, gradient_scale, kernels
        return kernels.fake_quantize(x, scale, qmin, qmax)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        qmin, qmax, gradient_scale, kernels = ctx.constants
        grad_x, grad_scale = kernels.lsq_backward(x, scale, grad, qmin, qmax)
        return grad_x, (grad_scale * gradient_scale).to(scale.dtype), None, None, None, None


class LSQ(Quantizer):
    """Returns x on a grid whose step s is learned (Esser 2020, arXiv 1902.08153).

    With v = x / s: the output is round(clip(v, qmin, qmax)) * s. Strictly inside the range the gradient to x passes and
    ds = round(v) - v; at and beyond its ends dx = 0, ds = qmin or qmax. ds is multiplied by 1 / sqrt(N * qmax), where
    N is the number of elements that share one scale without the batch: two processes then give the gradient of one.

    ``init``: "absmax" puts the grid's end at the largest |x|; "lsq" is the paper's 2 <|x|> / sqrt(qmax), a low-bit rule
    that wastes about two of 8 bits; "mse" minimises the squared error on what was observed; "percentile" puts the end
    where ``percentile`` % of all |x| lie below it. ``log_scale``: the learned parameter is log s (``log_step``), so that
    a learning rate means a relative change, or s itself (``step``), used as |s|.
    """

    inits: tuple[str, ...] = ("absmax", "lsq", "mse", "percentile")
    log_step: nn.Parameter
    step: nn.Parameter

    def __init__(
        self,
        bits: int,
        *,
        channels: int,
        batched: bool,
        per_channel: bool = False,
        init: str = "absmax",
        percentile: float = 99.99,
        log_scale: bool = True,
    ) -> None:
        super().__init__(bits, channels=channels, batched=batched, per_channel=per_channel)
        self.observer, self.log_scale = Observer(init, percentile), log_scale
        self.observer.require("init", self.inits)
        self.register_parameter("log_step" if log_scale else "step", nn.Parameter(self._empty_scale()))

    @property
    def scale(self) -> Tensor:
        """The step s of the grid, shape () or (channels, 1), positive, differentiable."""
        if self.log_scale:
            return self.log_step.exp()
        # An optimizer may carry s through zero, where a grid would vanish or mirror.
        return self.step.abs().clamp(min=SMALLEST_SCALE)

    @torch.no_grad()
    def store_scale(self, scale: Tensor) -> None:
        """Take ``scale`` as the new scale, in place."""
        parameter = self.log_step if self.log_scale else self.step
        parameter.copy_(scale.log() if self.log_scale else scale)

    def needs_histogram(self) -> bool:
        """Percentiles and squared errors need more than running sums."""
        return self.observer.needs_histogram

    def initial_scale(self, statistics: Statistics) -> Tensor:
        """Return the scale named by ``init``."""
        if self.observer.name == "lsq":
            return 2 * statistics.mean_abs / math.sqrt(self.qmax)
        return self.observer.scale(statistics, self.qmin, self.qmax)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return x rounded to the grid."""
        gradient_scale = 1 / math.sqrt(self._elements_per_scale(x) * self.qmax)
        return _LearnedStep.apply(x, self.scale, self.qmin, self.qmax, gradient_scale, self.kernels)

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        return f"{super().extra_repr()}, init={self.observer.name}, log_scale={self.log_scale}"
