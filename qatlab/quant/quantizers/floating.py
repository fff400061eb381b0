"""The base of quantizers whose grid is one of small floating-point numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qatlab.core.errors import UserError
from qatlab.quant.quantizers.base import Quantizer
from qatlab.quant.quantizers.kernels import widened
from qatlab.quant.quantizers.number_formats import FORMATS


class FloatingPoint(Quantizer):
    """Returns each value as a number of ``format``, one of FORMATS, times a scale.

    ``bits`` are those of the number, without the scale. The gradient to x passes unchanged where x is not clipped, and the
    scale counts as a constant. There are no integer codes; what ``kernels`` are chosen changes nothing.
    A subclass that stores a scale, which nothing learns, has it as the buffer ``step``; others write ``scales``.
    """

    step: Tensor

    def __init__(self, format: str, *, channels: int, batched: bool, per_channel: bool = False) -> None:
        number = FORMATS[format]
        super().__init__(number.bits, channels=channels, batched=batched, per_channel=per_channel)
        self.format, self.number = format, number

    @property
    def integer_product(self) -> bool:
        """False, because floating-point numbers have no integer codes."""
        return False

    @property
    def scale(self) -> Tensor:
        """The scale that is stored: () of a tensor, (channels, 1) of weights per channel."""
        return self.step

    def store_scale(self, scale: Tensor) -> None:
        """Store ``scale``, of the shape of the present one, as the new scale."""
        self.step.copy_(scale)

    def scales(self, rows: Tensor) -> Tensor:
        """Return the scales of ``rows``, which are x in the shape that ``_rows`` gives; they broadcast over it."""
        return self.scale

    def quotients(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``rows`` over their scales, a new tensor, and the scales, which broadcast over the rows."""
        scale = self.scales(rows)
        return rows / scale, scale

    @torch.no_grad()
    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point, 0, of every element of x, a weight (channels, ...) or activations."""
        rows = self._rows(widened(x.detach()))
        scale = self._like(self.scales(rows).expand(rows.shape), x)
        return scale, torch.zeros_like(scale)

    @torch.no_grad()
    def beyond(self, x: Tensor) -> Tensor:
        """Return which elements of x are clipped and not only rounded, bool, in the shape of x."""
        quotient, _ = self.quotients(self._rows(widened(x)))
        return self._like(quotient.abs_() > self.number.limit, x)

    def codes(self, x: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
        """Raise UserError for any x (channels, ...) or (..., channels): floating-point numbers are no integers."""
        raise UserError(
            f"{type(self).__name__} rounds to floating-point numbers, which have no integer codes: set quant.matmul=float."
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the twin of x, a weight (channels, ...) or activations (..., channels), in its shape and dtype.

        Raises UserError before calibration.
        """
        if not self._ready:
            self._require_scale()
        return _Rounded.apply(x, self)

    @torch.no_grad()
    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return what ``forward`` returns for x, without a gradient."""
        quotient, scale = self.quotients(self._rows(widened(x)))
        return self._like(self.number.round_(quotient).mul_(scale), x).to(x.dtype)

    def passes(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient to x, given that of the twin, ``grad``, in the shape of x."""
        return grad.masked_fill(self.beyond(x), 0)

    def grid_rows(self, x: Tensor) -> Tensor:
        """Return x as (number of scales, -1): a row shares a scale."""
        rows = self._rows(x)
        return rows.reshape(-1, rows.shape[-1]) if self._several else rows.reshape(1, -1)

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        return f"format={self.format}"

    def _like(self, rows: Tensor, x: Tensor) -> Tensor:
        """Return ``rows``, which have the shape of ``_rows(x)``, in the shape of x."""
        return rows.reshape(x.shape)


class _Rounded(torch.autograd.Function):
    """The twin in the place of x, with the gradient that the quantizer lets pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: FloatingPoint) -> Tensor:
        """Return the twin of x, in its shape and dtype."""
        ctx.save_for_backward(x)
        ctx.quantizer = quantizer
        return quantizer.fake_quantize(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient to x, given that of the twin, in the shape of x."""
        (x,) = ctx.saved_tensors
        return ctx.quantizer.passes(x, grad), None
