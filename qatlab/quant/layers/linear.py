"""Layers that hold a weight quantizer and an activation quantizer, of whatever method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.quant.layers.fused import fused_linear
from qatlab.quant.layers.outliers import OutlierProduct
from qatlab.quant.layers.weight import FoldedWeight, Kept
from qatlab.quant.quantizers.base import Quantizer


class QuantLayer(nn.Module):
    """A layer that returns ``compute(Q_a(x), Q_w(W)) + adapter(x)``, with the weight and bias of another layer.

    Each slot may be None, which leaves that tensor in full precision or that term out; the adapter sees the
    full-precision x. Where it has ``outliers``, these channels of x are zeros before Q_a, and their product in full precision
    is added. A quantized weight that needs no gradient is computed once and reused (FoldedWeight); it is in no
    state dict, and ``train()`` and ``to()`` drop it. A write in place through ``.data`` is not noticed: call ``unfold``
    after such a write.
    """

    weight: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int
    weight_quantizer: Quantizer | None
    act_quantizer: Quantizer | None
    adapter: nn.Module | None
    outliers: OutlierProduct | None

    def __init__(
        self,
        source: nn.Linear | nn.Conv2d,
        weight: Quantizer | None,
        act: Quantizer | None,
        adapter: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.bias = source.weight, source.bias
        for slot, module in (("weight_quantizer", weight), ("act_quantizer", act), ("adapter", adapter)):
            # Quantizers and adapters are built on the CPU, but the layer may be on a GPU.
            setattr(self, slot, module.to(source.weight.device) if module is not None else None)
        self.outliers = None
        self._kept = Kept()
        self.train(source.training)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the layer's output for x and ``weight`` as they are: quantized before, or in full precision.

        For a linear layer x is (..., in), ``weight`` (out, in) and the bias (out,); ``QuantConv2d`` has other shapes.
        """
        raise NotImplementedError

    def base(self, x: Tensor) -> Tensor:
        """Return the output without the adapter, of the shape of ``compute``: (..., out) for x (..., in)."""
        return self.compute(self.rounded_input(x, self.act_quantizer), self.quantized_weight())

    def tokens(self, x: Tensor) -> Tensor:
        """Return the input x with its channels last, (..., in), as activation quantizers take it."""
        return x

    def to_round(self, x: Tensor) -> Tensor:
        """Return the input x (..., in) as it is rounded: with zeros in the channels of ``outliers``."""
        return self.outliers.without(x) if self.outliers else x

    def rounded_input(self, x: Tensor, act: Quantizer | None) -> Tensor:
        """Return ``to_round`` of the input x, rounded by ``act`` where that is given, in the shape of x."""
        x = self.to_round(x)
        return x if act is None else act(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized layer's output, with the shape of the replaced layer's: (..., out) for x (..., in)."""
        y = self.base(x)
        if self.outliers:
            y = y + self.outliers(x)
        return y if self.adapter is None else y + self.adapter(x)

    @property
    def folded(self) -> FoldedWeight:
        """The weight that the product takes: quantized, and reused where this layer has kept it."""
        return FoldedWeight(self.weight, self.weight_quantizer, self.training, self._kept)

    def quantized_weight(self) -> Tensor:
        """Return the weight (out, in, ...) that the forward multiplies with, reused where FoldedWeight allows it."""
        return self.folded.value()

    def weight_codes(self, dtype: torch.dtype) -> Tensor:
        """Return the integer codes of the weight, (out, in, ...) in ``dtype``, reused where FoldedWeight allows it."""
        return self.folded.codes(dtype)

    def unfold(self) -> None:
        """Forget the reused weight, so that the next forward runs the weight quantizer."""
        self._kept.clear()

    def train(self, mode: bool = True) -> QuantLayer:
        """Set train or eval mode and forget the reused weight."""
        self.unfold()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLayer:
        # to(), half() and cuda() call this method and replace the tensors from which the kept weight was computed.
        self.unfold()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle computes its quantized weight anew, because storing the kept one would double the size.
        return {**self.__dict__, "_kept": Kept()}


class QuantLinear(QuantLayer):
    """An nn.Linear with quantized weight and input: Q_w(W) Q_a(x) + b + adapter(x), (..., out) for x (..., in)."""

    def __init__(
        self, source: nn.Linear, weight: Quantizer | None, act: Quantizer | None, adapter: nn.Module | None = None
    ) -> None:
        super().__init__(source, weight, act, adapter)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.matmul = "float"

    def base(self, x: Tensor) -> Tensor:
        """Return the output (..., out) of x (..., in) without the adapter.

        With gradients it comes from ``fused_linear``, which keeps only x and W for the backward.
        """
        quantized = self.act_quantizer is not None or self.weight_quantizer is not None
        if quantized and torch.is_grad_enabled():
            return fused_linear(self.to_round(x), self.folded, self.act_quantizer, self.bias, self.matmul)
        return super().base(x)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x W^T + b, (..., out), of x (..., in), the weight W (out, in) and the layer's bias b (out,)."""
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        """Return the sizes shown by ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class RightFactor:
    """A layer in the place of a bare Parameter P (in, out) that is applied as ``x @ P``: x (..., in) to (..., out)."""

    def __rmatmul__(self: Any, x: Tensor) -> Tensor:
        # Python calls this method for ``x @ layer``, because a Tensor does not know how to multiply with a module.
        return self(x)


class QuantProjection(RightFactor, QuantLinear):
    """A QuantLinear in a place where ``x @ layer`` is computed unless the layer is an nn.Linear.

    Where a bare Parameter was at this place, ``weight`` is that Parameter, transposed.
    """


class QuantConv2d(QuantLayer):
    """An nn.Conv2d with quantized weight and input, zero padding only; a channel is an output channel."""

    def __init__(
        self, source: nn.Conv2d, weight: Quantizer | None, act: Quantizer | None, adapter: nn.Module | None = None
    ) -> None:
        super().__init__(source, weight, act, adapter)
        self.in_channels, self.out_channels = source.in_channels, source.out_channels
        # As a product of matrices, a row holds all inputs of one
        # output value: the input channels times the kernel's size.
        self.in_features, self.out_features = source.weight[0].numel(), source.out_channels
        self.kernel_size, self.stride, self.padding = source.kernel_size, source.stride, source.padding
        self.dilation, self.groups = source.dilation, source.groups

    def tokens(self, x: Tensor) -> Tensor:
        """Return the input x (B, in_channels, H, W) as a view (B, H, W, in_channels)."""
        return x.movedim(1, -1)

    def rounded_input(self, x: Tensor, act: Quantizer | None) -> Tensor:
        """Return the input x (B, in_channels, H, W), rounded by ``act`` where that is given."""
        # A pixel is a token: a quantizer with a scale for each channel or token finds the channels last.
        return x if act is None else act(self.tokens(x)).movedim(-1, 1)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution of x (B, in_channels, H, W) with ``weight`` (out_channels, in_channels, kH, kW)."""
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        sizes = f"in_channels={self.in_channels}, out_channels={self.out_channels}, kernel_size={self.kernel_size}"
        steps = f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        return f"{sizes}, {steps}, bias={self.bias is not None}"
