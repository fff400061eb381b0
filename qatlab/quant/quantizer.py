"""The base of every quantizer: a tensor in, its fake-quantized twin out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qatlab.errors import UserError
from qatlab.quant.kernels import EAGER, Kernels
from qatlab.quant.observers import ActivationStatistics, WeightStatistics

Statistics = ActivationStatistics | WeightStatistics

# The scale of a tensor (or of a weight row) that is zero throughout: positive, so that 0 / scale is 0 and never NaN.
SMALLEST_SCALE = 1e-12


class Quantizer(nn.Module):
    """Maps a tensor to its fake-quantized twin on the symmetric signed grid s * {-2^(b-1), ..., 2^(b-1) - 1}.

    ``bits`` b is 2 to 8; there is no zero point. ``channels`` is the weight's output or the activation's input width.
    ``batched`` says that dimension 0 is the batch (activations). ``per_channel`` gives one scale per output channel,
    shape (channels, 1), the weight seen as (channels, -1); otherwise there is one scale, shape ().

    The scale has its final shape from the start, as NaN, and is filled by ``observe`` and ``fit`` or by a state dict;
    ``forward`` never initialises. The result has x's dtype and is computed in float32 or wider. Beware that a bfloat16
    result is *not* on the 8-bit grid: code * scale, rounded to bfloat16, is off by up to half a step. It still has at
    most 2^b distinct values; exact integer arithmetic takes ``codes`` and multiplies by the scale after the product.

    A subclass writes ``scale``, ``store_scale``, ``initial_scale`` and ``fake_quantize``. Raises UserError for bits
    outside 2 to 8 and for ``per_channel`` activations.
    """

    def __init__(self, bits: int, *, channels: int, batched: bool, per_channel: bool = False) -> None:
        super().__init__()
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise UserError(f"bits is {bits!r}: a quantizer takes a whole number from 2 to 8.")
        if per_channel and batched:
            raise UserError(
                "per_channel is true for activations, which have one scale per tensor: set it for weights only."
            )
        self.bits, self.channels, self.batched, self.per_channel = bits, channels, batched, per_channel
        self.qmin, self.qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.kernels: Kernels = EAGER
        self._ready = False
        self._statistics: Statistics | None = None

    @property
    def scale(self) -> Tensor:
        """The positive step s of the grid: shape () or (channels, 1), differentiable where it is learned."""
        raise NotImplementedError

    def store_scale(self, scale: Tensor) -> None:
        """Take ``scale``, positive and of the final shape, as the new scale."""
        raise NotImplementedError

    def initial_scale(self, statistics: Statistics) -> Tensor:
        """Return the scale that calibration starts from, float64, shape () or (channels, 1)."""
        raise NotImplementedError

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return the rounded twin of x, in its dtype, with the gradient; x is (channels, -1) if ``per_channel``."""
        raise NotImplementedError

    def needs_histogram(self) -> bool:
        """Whether ``initial_scale`` reads the histogram of activations, which costs a pass over every tensor."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        """Return the fake-quantized twin of x in x's shape and dtype; UserError before calibration."""
        if not self._ready:
            self._require_scale()
        if self.per_channel:
            return self.fake_quantize(x.reshape(self.channels, -1)).view(x.shape)
        return self.fake_quantize(x)

    def codes(self, x: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
        """Return the integer codes of x in ``dtype``, in x's shape; ``codes(x) * scale`` is the forward's value."""
        if not self._ready:
            self._require_scale()
        rows = x.detach().reshape(self.channels, -1) if self.per_channel else x.detach()
        return self.kernels.integer_codes(rows, self.scale.detach(), self.qmin, self.qmax, dtype).view(x.shape)

    def observe(self, x: Tensor) -> None:
        """Gather what ``fit`` needs: a weight is kept as it is, activations over any number of calls in bounded memory.

        Raises UserError when x holds NaN or infinite values.
        """
        if not self.batched:
            rows = x.detach().reshape(self.channels if self.per_channel else 1, -1)
            self._statistics = WeightStatistics(rows, self._empty_scale().shape)
            return
        if not isinstance(self._statistics, ActivationStatistics):
            self._statistics = ActivationStatistics(histogram=self.needs_histogram())
        self._statistics.update(x.detach())

    def fit(self) -> None:
        """Turn what was observed into the scale and forget it; UserError when nothing was observed."""
        if self._statistics is None:
            raise UserError("nothing was observed: a quantizer sees at least one tensor before its scale is fitted.")
        self.store_scale(self.initial_scale(self._statistics).clamp(min=SMALLEST_SCALE))
        self._statistics = None
        self._ready = True

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        return f"bits={self.bits}, per_channel={self.per_channel}"

    def _empty_scale(self) -> Tensor:
        return torch.full((self.channels, 1) if self.per_channel else (), float("nan"))

    def _elements_per_scale(self, x: Tensor) -> int:
        """LSQ's N: the elements that share one scale, the batch dimension left out."""
        sharing = x.shape[0] if self.batched else self.channels if self.per_channel else 1
        return max(1, x.numel() // max(1, sharing))

    def _require_scale(self) -> None:
        # Asked once and not per step: reading the scale's value waits for the GPU.
        if not self._ready and bool(self.scale.isnan().any()):
            raise UserError("a quantizer runs before it has a scale: call qatlab.quant.calibrate(model, images) first.")
        self._ready = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ready = False
        super()._load_from_state_dict(*args, **kwargs)
