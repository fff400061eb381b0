"""LSQ+: activations on a learned grid with a learned offset."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from qatlab.core.domains import OneOf, checked
from qatlab.core.errors import UserError
from qatlab.quant.quantizers.base import Bits, Statistics
from qatlab.quant.quantizers.grids import Percentile
from qatlab.quant.quantizers.kernels import Kernels, widened
from qatlab.quant.quantizers.lsq import LSQ
from qatlab.quant.quantizers.observers import ActivationStatistics


class _LearnedGrid(torch.autograd.Function):
    """LSQ+'s forward and backward; it saves x, s and beta only and computes the rest again."""

    @staticmethod
    def forward(
        ctx, x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int, gradient_scale: float, kernels: Kernels
    ) -> Tensor:
        """Return x (of any shape) rounded to the grid, in its shape and dtype; s and beta are each a scalar."""
        ctx.save_for_backward(x, scale, offset)
        ctx.constants = qmin, qmax, gradient_scale, kernels
        # The difference is taken in float32, because bfloat16 would round it before the grid does.
        return kernels.fake_quantize(widened(x) - offset, scale, qmin, qmax).add_(offset).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients to x, s and beta, given that of the result (shape like x); s and beta are scalars."""
        x, scale, offset = ctx.saved_tensors
        qmin, qmax, gradient_scale, kernels = ctx.constants
        shifted = widened(x) - offset
        grad = grad.to(shifted.dtype)
        grad_x, grad_scale = kernels.lsq_backward(shifted, scale, grad, qmin, qmax)
        # The gradient of beta is the sum over the clipped elements. It is summed after the subtraction, because the
        # difference of two sums would be rounding noise where few elements are clipped.
        grad_offset = (grad - grad_x).sum()
        learned = (grad_scale * gradient_scale).to(scale.dtype), (grad_offset * gradient_scale).to(offset.dtype)
        return grad_x.to(x.dtype), *learned, None, None, None, None


class LSQPlus(LSQ):
    """Returns activations on a grid with learned step s and offset beta (Bhalgat 2020, arXiv 2004.09576).

    With v = (x - beta) / s: the output is round(clip(v, qmin, qmax)) * s + beta. Strictly inside the range the gradient
    to x passes, ds = round(v) - v and dbeta = 0; at and beyond its ends dx = 0, ds = qmin or qmax, dbeta = 1. ds and
    dbeta are multiplied by LSQ's 1 / sqrt(N * qmax). The zero point -beta / s is a real number, and 0 is on the grid
    only at the start; a product of codes is still exact if the bias takes beta times the sum of the weights.

    ``init``: "absmax" lays the grid from the smallest to the largest value, "percentile" likewise without the tails,
    "mse" minimises the squared error. ``log_scale``: the learned parameter is log s (``log_step``) or s (``step``);
    beta is ``offset``. Raises UserError for weights, which the paper leaves to LSQ.
    """

    offset: nn.Parameter

    @checked
    def __init__(
        self,
        bits: Bits,
        *,
        channels: int,
        batched: bool,
        init: Annotated[str, OneOf("absmax", "mse", "percentile")] = "absmax",
        percentile: Percentile = 99.99,
        log_scale: bool = True,
    ) -> None:
        if not batched:
            raise UserError("LSQPlus learns the offset of activations: choose LSQ for weights (quant/weight=lsq_pc).")
        super().__init__(
            bits, channels=channels, batched=batched, init=init, percentile=percentile, log_scale=log_scale
        )
        self.offset = nn.Parameter(torch.zeros(()))

    @property
    def zero_point(self) -> Tensor:
        """-beta / s, a real number: x on the grid is (codes - zero_point) * scale."""
        return -self.offset / self.scale

    @property
    def integer_product(self) -> bool:
        """False, because beta adds its multiple of the sum of the weights to every product, and codes do not."""
        return False

    @torch.no_grad()
    def start_from(self, statistics: Statistics) -> None:
        """Set s to the scale of the grid that ``init`` names, and beta such that 0 is on the grid."""
        assert isinstance(statistics, ActivationStatistics)
        scale, zero = self.observer.grid(statistics, self.qmin, self.qmax)
        self.store_scale(scale)
        # The stored scale may differ from ``scale`` in the last bit,
        # and only with the stored one 0 is exactly on the grid.
        self.offset.copy_(-zero.to(self.scale) * self.scale)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return x (of any shape) rounded to the grid, in its shape and dtype; s and beta are scalars."""
        factor = 1 / math.sqrt(self._elements_per_scale(x) * self.qmax)
        return _LearnedGrid.apply(x, self.scale, self.offset, self.qmin, self.qmax, factor, self.kernels)

    def _codes(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        shifted = widened(rows) - self.offset.detach()
        return self.kernels.integer_codes(shifted, self.scale.detach(), self.qmin, self.qmax, dtype)
