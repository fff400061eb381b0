"""The base of every quantizer, which maps a tensor to its fake-quantized twin."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from qatlab.core.domains import Between, require
from qatlab.core.errors import UserError
from qatlab.quant.quantizers.grids import SMALLEST_SCALE, Statistics
from qatlab.quant.quantizers.kernels import EAGER, Kernels
from qatlab.quant.quantizers.observers import ActivationStatistics, WeightStatistics

__all__ = ["SMALLEST_SCALE", "Bits", "Quantizer", "Statistics"]

Bits = Annotated[int, Between(2, 8)]
"""The bits of a signed grid: with one bit it would have no positive level."""


class Quantizer(nn.Module):
    """Maps a tensor to its fake-quantized twin on the signed grid s * ({-2^(b-1), ..., 2^(b-1) - 1} - z).

    ``bits`` b is ``smallest_bits`` to 8; the zero point z is 0 unless a subclass has one. ``channels`` is the weight's
    output or the activation's input width. ``batched`` says that dimension 0 is the batch (activations).
    ``per_channel`` gives one scale per channel: for weights, seen as (channels, -1), of shape (channels, 1); for the
    last dimension of activations, where ``activation_channels`` allows it, of shape (channels,). Otherwise there is one
    scale, shape ().

    The scale has its final shape from the start, as NaN, and is filled by ``observe`` and ``fit`` or by a state dict;
    ``forward`` never initialises. The result has x's dtype and is computed in float32 or wider. Beware that a bfloat16
    result is *not* on the 8-bit grid: code * scale, rounded to bfloat16, is off by up to half a step. It still has at
    most 2^b distinct values; exact integer arithmetic takes ``codes`` and multiplies by the scale after the product.

    A subclass writes ``scale``, ``store_scale``, ``initial_scale`` and ``fake_quantize``. Raises UserError for bits
    outside ``smallest_bits`` to 8 and for ``per_channel`` activations of a subclass without ``activation_channels``.
    """

    activation_channels = False
    smallest_bits = 2

    def __init__(self, bits: int, *, channels: int, batched: bool, per_channel: bool = False) -> None:
        super().__init__()
        # A subclass may allow other bits than those of most methods, and one of the user need not declare them.
        require({"bits": bits}, {"bits": Annotated[int, Between(self.smallest_bits, 8)]})
        if per_channel and batched and not self.activation_channels:
            raise UserError(
                f"per_channel is true, but {type(self).__name__} has one scale per tensor of activations: set it for "
                "weights only."
            )
        self.bits, self.channels, self.batched, self.per_channel = bits, channels, batched, per_channel
        # The full signed range (-128 to 127 at 8 bits) is that of int8 in the integer kernels.
        self.qmin, self.qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.kernels: Kernels = EAGER
        # With several scales for a tensor, ``fake_quantize`` gets the tensor in two dimensions.
        self._several = per_channel
        # True once the scale is known to hold numbers; until then ``forward`` checks the scale.
        self._ready = False
        self._statistics: Statistics | None = None

    @property
    def scale(self) -> Tensor:
        """The positive step s of the grid: shape () or (channels, 1), differentiable where s is learned."""
        raise NotImplementedError

    @property
    def zero_point(self) -> Tensor:
        """The code z of the value 0, of the scale's shape: x on the grid is (codes - zero_point) * scale."""
        return torch.zeros_like(self.scale, requires_grad=False)

    @property
    def integer_product(self) -> bool:
        """Whether the product of tensors is the product of their ``codes``, multiplied by the scales afterwards.

        This is False with a zero point, and where the elements of one sum have different scales.
        """
        # A product sums over the input channels, so a scale for each of them cannot be taken out of the sum.
        return not (self.batched and self.per_channel)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point that activations x, (..., channels), are rounded with.

        Both are of shape () or (channels,), or (..., 1) where each token has a grid, and broadcast over x.
        """
        return self.scale, self.zero_point

    def beyond(self, x: Tensor) -> Tensor:
        """Return which of activations x, (..., channels), lie more than half a step beyond the ends of their grid, bool."""
        scale, zero_point = self.grid(x)
        # The result of ``codes`` is clipped and cannot be used, because values beyond the ends are looked for.
        code = (x / scale + zero_point).round_()
        return (code < self.qmin) | (code > self.qmax)

    def store_scale(self, scale: Tensor) -> None:
        """Store ``scale``, positive and of the final shape, () or (channels, 1)."""
        raise NotImplementedError

    def initial_scale(self, statistics: Statistics) -> Tensor:
        """Return the scale that training starts from, float64, of the scale's shape, () or (channels, 1)."""
        raise NotImplementedError

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return the fake-quantized twin of x, in the shape and dtype of x, with its gradient.

        x is (scales, n) for a weight with several scales, (n, channels) for such activations, and else of any shape.
        """
        raise NotImplementedError

    def needs_histogram(self) -> bool:
        """Whether ``initial_scale`` reads the histogram of activations, which costs a pass over every tensor."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        """Return the fake-quantized twin of x, a weight (channels, ...) or activations (B, ...).

        It has the shape and dtype of x. Raises UserError before calibration.
        """
        if not self._ready:
            self._require_scale()
        return self.fake_quantize(self._rows(x)).view(x.shape) if self._several else self.fake_quantize(x)

    def codes(self, x: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
        """Return the integer codes of x (of any shape), -2^(b-1) to 2^(b-1) - 1, in ``dtype`` and the shape of x.

        ``(codes(x) - zero_point) * scale`` is the forward's value.
        """
        if not self._ready:
            self._require_scale()
        return self._codes(self._rows(x.detach()), dtype).view(x.shape)

    def grid_rows(self, x: Tensor) -> Tensor:
        """Return x as (number of scales, -1): a row shares a scale, so a quantized row holds at most 2^bits values."""
        if not self._several:
            return x.reshape(1, -1)
        # Weights have their channels first, activations last.
        return self._rows(x).T if self.batched else self._rows(x)

    def observe(self, x: Tensor) -> None:
        """Keep what ``fit`` needs of x: a weight (channels, ...) itself, or a bounded summary of activations (B, ...).

        Activations may be given in any number of calls. Raises UserError when x holds NaN or infinite values.
        """
        if not self.batched:
            # One call shows the whole weight, so a second call replaces what was observed in the first.
            rows = self.grid_rows(x.detach())
            self._statistics = WeightStatistics(rows, torch.Size([len(rows), 1] if self._several else []))
            return
        if not isinstance(self._statistics, ActivationStatistics):
            channels = self.channels if self.per_channel else None
            self._statistics = ActivationStatistics(histogram=self.needs_histogram(), channels=channels)
        self._statistics.update(self._rows(x.detach()))

    def fit(self) -> None:
        """Set the scale from what was observed, and forget the observations; UserError when nothing was observed."""
        if self._statistics is None:
            raise UserError("nothing was observed: a quantizer sees at least one tensor before its scale is fitted.")
        self.start_from(self._statistics)
        # Statistics can hold a histogram of half a megabyte, and an encoder has some hundred quantizers.
        self._statistics = None
        self._ready = True

    def start_from(self, statistics: Statistics) -> None:
        """Set the learned or stored state to the values at which training starts, given ``statistics``."""
        self.store_scale(self.initial_scale(statistics).clamp(min=SMALLEST_SCALE))

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        return f"bits={self.bits}, per_channel={self.per_channel}"

    def _empty_scale(self) -> Tensor:
        shape = () if not self.per_channel else (self.channels,) if self.batched else (self.channels, 1)
        # The scale starts as NaN, because a scale of 1 that nobody filled would not be noticed.
        return torch.full(shape, float("nan"))

    def _rows(self, x: Tensor) -> Tensor:
        """Return x in two dimensions over which the scales broadcast, or x itself where there is one scale."""
        if not self.per_channel:
            return x
        if not self.batched:
            return x.reshape(self.channels, -1)
        self._require_channels_last(x)
        return x.reshape(-1, self.channels)

    def _codes(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return self.kernels.integer_codes(rows, self.scale.detach(), self.qmin, self.qmax, dtype)

    def _require_channels_last(self, x: Tensor) -> None:
        if x.shape[-1] != self.channels:
            raise UserError(
                f"an input of shape {tuple(x.shape)} does not end in its {self.channels} channels, so it has no scale per "
                "channel or token (a convolution's has not): skip the layer's input with +quant.rules={<layer>: {act: null}}."
            )

    def _require_scale(self) -> None:
        # The scale is read once and not in every step, because reading a value waits for the GPU.
        if not self._ready and bool(self.scale.isnan().any()):
            raise UserError("a quantizer runs before it has a scale: call qatlab.quant.calibrate(model, images) first.")
        self._ready = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The loaded state may be that of a model before calibration, with NaN scales, so the next forward checks again.
        self._ready = False
        super()._load_from_state_dict(*args, **kwargs)


def of_weight(factory: Callable[..., Quantizer], weight: Tensor) -> Quantizer:
    """Return the quantizer that ``factory`` makes for ``weight`` (out, in, ...), not calibrated, on the CPU.

    It is called as ``factory(channels=out, batched=False)``, with ``width=``, the weights per output channel, and
    ``inputs=``, the input channels of a row, where its signature has them. Raises UserError as the factory does.
    """
    # The sizes of a row are given only where the signature has them, because most factories have no use for them.
    sizes = {"width": weight[0].numel(), "inputs": weight.shape[1]}
    takes = inspect.signature(factory).parameters
    given = {size: count for size, count in sizes.items() if size in takes}
    return factory(channels=len(weight), batched=False, **given)


def fitted(quantizer: Quantizer, x: Tensor) -> Quantizer:
    """Return ``quantizer``, moved to the device of x and its scale fitted to x, a weight (channels, ...) or (..., channels)."""
    quantizer = quantizer.to(x.device)
    quantizer.observe(x)
    quantizer.fit()
    return quantizer
