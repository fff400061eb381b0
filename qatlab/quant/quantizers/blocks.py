"""Quantizers with a scale for each block of consecutive input channels, found when the values arrive: MX and NVFP4."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from qatlab.core.domains import OneOf, checked
from qatlab.core.errors import UserError
from qatlab.quant.quantizers.base import Statistics
from qatlab.quant.quantizers.floating import FloatingPoint
from qatlab.quant.quantizers.number_formats import FORMATS, absmax_of, power_of_two
from qatlab.quant.quantizers.observers import WeightStatistics, require_finite

# The least block scale of NVFP4, the least normal number of E4M3.
_LEAST_E4M3 = 2.0**-6


class Blocks(FloatingPoint):
    """Returns each value as a number of ``format`` times the scale of its block, ``size`` consecutive input channels.

    Weights are (channels, inputs, ...), activations (..., channels). ``inputs`` may be left out; then the blocks are only
    counted when a weight comes. Raises UserError where they do not divide the input channels.
    """

    size: int

    def __init__(self, format: str, *, channels: int, batched: bool, inputs: int | None) -> None:
        super().__init__(format, channels=channels, batched=batched)
        self._several = True
        width = channels if batched else inputs
        if width is not None:
            self._require_blocks(width)

    def _rows(self, x: Tensor) -> Tensor:
        """Return x as (..., blocks, size)."""
        if self.batched:
            self._require_channels_last(x)
            return x.unflatten(-1, (-1, self.size))
        # The input channels of a convolution come last: a block lies at one place of its kernel, as one of its input does.
        x = x.movedim(1, -1)
        self._require_blocks(x.shape[-1])
        return x.unflatten(-1, (-1, self.size))

    def _like(self, rows: Tensor, x: Tensor) -> Tensor:
        flat = rows.flatten(-2)
        return flat if self.batched else flat.movedim(-1, 1)

    def _require_blocks(self, width: int) -> None:
        if width % self.size:
            slot = "act" if self.batched else "weight"
            raise UserError(
                f"{type(self).__name__} has a scale for every {self.size} input channels, and the layer has {width}, which "
                f"is no multiple: leave it as it is with +quant.rules={{<layer>: {{{slot}: null}}}}."
            )


class MX(Blocks):
    """Returns 2^k times the nearest number of ``format``, k from the largest value of each block of 32 as it arrives.

    OCP Microscaling Formats (MX) 1.0, with scales of E8M0: MXFP8 (e4m3, e5m2), MXFP6 (e2m3, e3m2) and MXFP4 (e2m1). ``scaling``
    "floor", that of OCP 1.0, is k = floor(log2 absmax) - the exponent of the largest number, and may clip the largest
    values of a block; "rceil" is k = ceil(log2(absmax / the largest number)), and clips none. Values are clipped to
    the largest number. The gradient passes everywhere, because the scale follows the values: those clipped are no outliers.

    Nothing is calibrated or stored. A block with NaN or an infinite value becomes NaN.
    """

    size = 32

    @checked
    def __init__(
        self,
        format: Annotated[str, OneOf(*FORMATS)],
        *,
        channels: int,
        batched: bool,
        inputs: int | None = None,
        scaling: Annotated[str, OneOf("floor", "rceil")] = "floor",
    ) -> None:
        super().__init__(format, channels=channels, batched=batched, inputs=inputs)
        self.scaling = scaling

    @property
    def scale(self) -> Tensor:
        """Raise UserError: scales exist only for given values, see ``grid``."""
        raise UserError("an MX quantizer has no scale of its own: each block has one, see grid(x).")

    def scales(self, rows: Tensor) -> Tensor:
        """Return the scales (..., blocks, 1) of ``rows`` (..., blocks, 32), powers of two."""
        absmax = absmax_of(rows)
        if self.scaling == "rceil":
            return power_of_two(absmax / self.number.largest, up=True)
        return power_of_two(absmax, lower=self.number.largest_exponent)

    def passes(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return ``grad``, in the shape of x, as it is."""
        return grad

    def observe(self, x: Tensor) -> None:
        """Raise UserError when x, a weight (channels, ...) or activations (..., channels), holds NaN or infinite values."""
        self._rows(x)
        require_finite(torch.stack(torch.aminmax(x)))

    def fit(self) -> None:
        """Do nothing, because no scale is stored."""

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        return f"{super().extra_repr()}, scaling={self.scaling}"

    def _require_scale(self) -> None:
        # Nothing is calibrated, so no scale can be missing.
        self._ready = True


class NVFP4(Blocks):
    """Returns t s times the nearest number of E2M1, with s, of E4M3, for each block of 16 as it arrives, and t a constant.

    t = absmax / (448 * 6) is float32 and (), from calibration or from the weight; s is the block's absmax / 6 / t in E4M3,
    2^-6 to 448, so that blocks that pass the absmax of calibration are clipped (NVIDIA 2025, arXiv 2509.25149).
    """

    size = 16

    @checked
    def __init__(self, *, channels: int, batched: bool, inputs: int | None = None) -> None:
        super().__init__("e2m1", channels=channels, batched=batched, inputs=inputs)
        self.register_buffer("step", self._empty_scale())

    def initial_scale(self, statistics: Statistics) -> Tensor:
        """Return absmax / (448 * 6), float64, ()."""
        return statistics.absmax / (FORMATS["e4m3"].largest * self.number.largest)

    def observe(self, x: Tensor) -> None:
        """Keep what ``fit`` needs of x, a weight (channels, ...) or activations (..., channels); UserError as in ``MX``."""
        if self.batched:
            super().observe(x)
            return
        self._rows(x)
        self._statistics = WeightStatistics(x.detach().reshape(1, -1), torch.Size([]))

    def scales(self, rows: Tensor) -> Tensor:
        """Return the scales t s (..., blocks, 1) of ``rows`` (..., blocks, 16)."""
        return self._block_scales(rows) * self.step

    def quotients(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``rows`` (..., blocks, 16) over their scales, and the scales (..., blocks, 1)."""
        blocks = self._block_scales(rows)
        # Kernels multiply by the reciprocal, which rounds some ties otherwise than a division.
        return rows * ((1 / self.step) / blocks), blocks * self.step

    def extra_repr(self) -> str:
        """Return no options, because there are none."""
        return ""

    def _block_scales(self, rows: Tensor) -> Tensor:
        """Return the scales s (..., blocks, 1), numbers of E4M3, of ``rows`` (..., blocks, 16)."""
        wanted = absmax_of(rows) / self.number.largest / self.step
        return FORMATS["e4m3"].round_(wanted.clamp_(min=_LEAST_E4M3))
