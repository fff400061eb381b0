"""Dynamic activations: every token is rounded on a grid of its own, which is computed in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from qatlab.core.domains import checked
from qatlab.core.errors import UserError
from qatlab.quant.quantizers.base import Bits, Quantizer
from qatlab.quant.quantizers.grids import SMALLEST_SCALE, spanning
from qatlab.quant.quantizers.kernels import Ends, grid_codes, widened
from qatlab.quant.quantizers.minmax import straight_through
from qatlab.quant.quantizers.observers import require_finite


class DynamicMinMax(Quantizer):
    """Returns activations (..., channels) with each token, a vector of ``channels`` values, on its own grid.

    The scale is the token's absmax / (2^(b-1) - 1), or, not ``symmetric``, (max - min) / (2^b - 1) with a zero point
    and 0 on the grid (a grid per token: ZeroQuant, Yao et al. 2022, arXiv 2206.01861). Nothing is calibrated or stored.
    The gradient to x is straight-through where the code is not clipped; the scale counts as a constant.

    Raises UserError for weights, and in the forward for an input that does not end in its channels.
    """

    @checked
    def __init__(self, bits: Bits, *, channels: int, batched: bool, symmetric: bool = True) -> None:
        super().__init__(bits, channels=channels, batched=batched)
        if not batched:
            raise UserError("a weight has no tokens: DynamicMinMax is for activations, choose quant/weight=minmax.")
        # There are as many scales as tokens, so tensors are always reshaped to (tokens, channels).
        self.symmetric, self._several = symmetric, True

    @property
    def scale(self) -> Tensor:
        """Raise UserError: scales exist only for an input, see ``grid``."""
        raise UserError("a dynamic quantizer has no scale of its own: each token has one, see grid(x).")

    @property
    def integer_product(self) -> bool:
        """False, because integer products need scales that are known before the input is."""
        return False

    @torch.no_grad()
    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point of every token of x (..., channels), both (..., 1), float32 or wider."""
        self._require_channels_last(x)
        x = widened(x)
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # torch.aminmax takes ten times as long on a CPU
        if not self.symmetric:
            return spanning(low, high, self.qmin, self.qmax)
        scale = (torch.maximum(-low, high) / self.qmax).clamp(min=SMALLEST_SCALE)
        return scale, torch.zeros_like(scale)

    def observe(self, x: Tensor) -> None:
        """Raise UserError when x (of any shape) holds NaN or infinite values; nothing is remembered."""
        require_finite(torch.stack(torch.aminmax(x)))

    def fit(self) -> None:
        """Do nothing, because no scale is stored."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return x (tokens, channels), each token rounded to its own grid, in the shape and dtype of x."""
        scale, zero = self.grid(x)
        return straight_through(x, scale, self._ends(zero), self.kernels)

    def grid_rows(self, x: Tensor) -> Tensor:
        """Return x (..., channels) as (tokens, channels); the elements of a row share a scale."""
        return self._rows(x)

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        return f"bits={self.bits}, per token, symmetric={self.symmetric}"

    def _rows(self, x: Tensor) -> Tensor:
        self._require_channels_last(x)
        return x.reshape(-1, self.channels)

    def _codes(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        scale, zero = self.grid(rows)
        # grid_codes returns the code minus the zero point.
        return (grid_codes(rows, scale, *self._ends(zero)) + zero).to(dtype)

    def _ends(self, zero: Tensor) -> tuple[Ends, Ends]:
        return (self.qmin, self.qmax) if self.symmetric else (self.qmin - zero, self.qmax - zero)

    def _require_scale(self) -> None:
        # Nothing is calibrated, so no scale can be missing.
        self._ready = True
