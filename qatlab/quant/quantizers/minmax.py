"""Static quantizers, whose grid is found in calibration and never learned."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from qatlab.core.domains import Count, OneOf, checked
from qatlab.core.errors import UserError
from qatlab.quant.quantizers.base import Bits, Quantizer, Statistics
from qatlab.quant.quantizers.grids import OBSERVERS, Observer, Percentile
from qatlab.quant.quantizers.kernels import Ends, Kernels, grid_codes
from qatlab.quant.quantizers.observers import ActivationStatistics


class _StraightThrough(torch.autograd.Function):
    """Round to the grid; the gradient passes unchanged where the rounded value lies on the grid, both ends included."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, qmin: Ends, qmax: Ends, kernels: Kernels) -> Tensor:
        """Return x rounded to the grid, in the shape and dtype of x: (rows, n), or any shape with a scalar scale."""
        ctx.save_for_backward(x, scale)
        ctx.constants = qmin, qmax, kernels
        return kernels.fake_quantize(x, scale, qmin, qmax)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient to x, given that of the result, which has the shape of x (rows, n)."""
        x, scale = ctx.saved_tensors
        qmin, qmax, kernels = ctx.constants
        return kernels.straight_through_backward(x, scale, grad, qmin, qmax), None, None, None, None


def straight_through(x: Tensor, scale: Tensor, ends: tuple[Ends, Ends], kernels: Kernels) -> Tensor:
    """Return x rounded to whole multiples of ``scale`` between ``ends``, in the shape and dtype of x.

    x is (rows, n) where ``scale`` and the ends are (rows, 1) or (n,), and of any shape where they are scalars. The
    gradient to x passes where the rounded value lies on the grid, ends included; there is none to the scale.
    """
    return _StraightThrough.apply(x, scale, *ends, kernels)


class MinMax(Quantizer):
    """Returns x on a grid whose ends calibration found and nothing learns: by default s = absmax / (2^(b-1) - 1).

    ``observer`` chooses the ends: "absmax" the largest values seen, "ema" their running mean over batches (momentum
    0.1), "percentile" the ``percentile`` % of values, "mse" the grid of least squared error. ``symmetric`` false gives
    activations a grid from the smallest to the largest value that always holds 0: a whole number ``zero_point`` (a
    buffer) is added to the code. ``per_channel`` is one scale per output channel of weights, or per input channel of
    activations (observers absmax and ema). ``group_size`` is one scale per so many consecutive input channels of each
    output channel of weights, which are seen as (-1, group_size), with scales (channels * groups, 1); it needs
    ``width``, the number of weights per output channel.

    The gradient is straight-through inside the clip range, ends included (the mask of torch.fake_quantize_*). It is
    taken on the rounded code, because absmax / s may come out one float above its end and the largest value would be
    frozen. Raises UserError for options that do not go together.
    """

    activation_channels = True
    step: Tensor
    zero: Tensor

    @checked
    def __init__(
        self,
        bits: Bits,
        *,
        channels: int,
        batched: bool,
        width: int | None = None,
        per_channel: bool = False,
        group_size: Count | None = None,
        symmetric: bool = True,
        observer: Annotated[str, OneOf(*OBSERVERS)] = "absmax",
        percentile: Percentile = 99.99,
    ) -> None:
        super().__init__(bits, channels=channels, batched=batched, per_channel=per_channel)
        self.width = width
        self.group_size, self.symmetric, self.observer = group_size, symmetric, Observer(observer, percentile)
        self._require_options()
        self._several = per_channel or group_size is not None
        self.register_buffer("step", self._empty_scale())
        if not symmetric:
            # The zero point is a buffer and no Parameter, because calibration finds it and training does not change it.
            self.register_buffer("zero", torch.zeros_like(self.step, dtype=torch.int32))
        self._ends: tuple[Ends, Ends] | None = None

    @property
    def scale(self) -> Tensor:
        """The step s of the grid, shape (), (channels, 1), (channels * groups, 1), or (channels,) of activations."""
        return self.step

    @property
    def zero_point(self) -> Tensor:
        """The code that stands for 0, int32 and from -2^(b-1) to 2^(b-1) - 1 if not symmetric, of the scale's shape."""
        return super().zero_point if self.symmetric else self.zero

    @property
    def integer_product(self) -> bool:
        """Whether the product of tensors is the product of their codes, multiplied by the scales afterwards."""
        # The groups of an output channel have different scales within one sum, so no single scale can be taken out.
        return super().integer_product and self.symmetric and self.group_size is None

    def store_scale(self, scale: Tensor) -> None:
        """Store ``scale``, of the final shape, such as () or (channels, 1), as the new scale."""
        self.step.copy_(scale)

    def needs_histogram(self) -> bool:
        """Return whether the observer reads a histogram, as percentiles and squared errors do."""
        return self.observer.needs_histogram

    def initial_scale(self, statistics: Statistics) -> Tensor:
        """Return the scale that the observer gives a symmetric grid, float64, of the scale's shape, such as ()."""
        return self.observer.scale(statistics, self.qmin, self.qmax)

    def start_from(self, statistics: Statistics) -> None:
        """Set the scale and the zero point to those of the observer."""
        if self.symmetric:
            return super().start_from(statistics)
        assert isinstance(statistics, ActivationStatistics)
        scale, zero = self.observer.grid(statistics, self.qmin, self.qmax)
        self.store_scale(scale)
        self.zero.copy_(zero)
        # The ends were computed from the former zero point.
        self._ends = None

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return x rounded to the grid, in its shape and dtype: (rows, n), or any shape where there is one scale."""
        return straight_through(x, self.step, self._grid_ends(), self.kernels)

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        group = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"{super().extra_repr()}{group}, symmetric={self.symmetric}, observer={self.observer.name}"

    def _grid_ends(self) -> tuple[Ends, Ends]:
        """Return the ends as whole multiples of s: two numbers, or two tensors of the scale's shape."""
        if self.symmetric:
            return self.qmin, self.qmax
        if self.per_channel:
            return self.qmin - self.zero, self.qmax - self.zero
        # A single zero point is read once and kept as a number,
        # because reading it in every step would wait for the GPU.
        if self._ends is None:
            zero = int(self.zero)
            self._ends = self.qmin - zero, self.qmax - zero
        return self._ends

    def _empty_scale(self) -> Tensor:
        if self.group_size is None or self.width is None:
            return super()._empty_scale()
        return torch.full((self.channels * self.width // self.group_size, 1), float("nan"))

    def _rows(self, x: Tensor) -> Tensor:
        # The width is a multiple of the group size, so no group reaches into the next output channel.
        return super()._rows(x) if self.group_size is None else x.reshape(-1, self.group_size)

    def _codes(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        if self.symmetric:
            return super()._codes(rows, dtype)
        # grid_codes returns the code minus the zero point.
        return (grid_codes(rows, self.step, *self._grid_ends()) + self.zero).to(dtype)

    def _require_options(self) -> None:
        if self.group_size is not None:
            self._require_groups(self.group_size)
        if not self.batched and (not self.symmetric or self.observer.name == "ema"):
            raise UserError("symmetric=false and observer=ema are for activations: weights take neither.")
        if self.batched and self.per_channel and self.observer.needs_histogram:
            raise UserError(f"observer is {self.observer.name!r}: with per_channel, activations take absmax or ema.")

    def _require_groups(self, size: int) -> None:
        if self.batched or self.per_channel:
            raise UserError(
                "group_size is set for activations or with per_channel: it is for weights, without per_channel."
            )
        if self.width is None or self.width % size:
            raise UserError(
                f"group_size={size} does not divide a layer's {self.width} inputs: choose a divisor, such as 32."
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The loaded state may hold another zero point than the one from which the kept ends were computed.
        self._ends = None
        super()._load_from_state_dict(*args, **kwargs)
