"""Layers that hold a weight quantizer and an activation quantizer and know nothing of methods."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.errors import UserError
from qatlab.quant.fused import fused_linear
from qatlab.quant.quantizer import Quantizer


class QuantLayer(nn.Module):
    """Returns ``compute(Q_a(x), Q_w(W)) + adapter(x)``: a layer that took over another's ``weight`` and ``bias`` and their names.

    Each slot may be None, which leaves that tensor in full precision or that term out; the adapter sees the
    full-precision x. A quantized weight that no gradient is asked of, because it is frozen or because this is eval mode
    without gradients, is computed once and reused, bit-equal to computing it each time and as large as the weight; a
    change of the weight or of its quantizer's state, ``train()`` and ``to()`` drop it, and it is in no state dict. Only a
    write in place through ``.data`` goes unnoticed: call ``unfold`` after one.
    """

    weight: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int
    weight_quantizer: Quantizer | None
    act_quantizer: Quantizer | None
    adapter: nn.Module | None

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
            setattr(self, slot, module.to(source.weight.device) if module is not None else None)
        self._folded: tuple[Any, dict[Any, Tensor]] | None = None
        self.train(source.training)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the layer's output for an input and a weight that are already quantized, or not to be."""
        raise NotImplementedError

    def base(self, x: Tensor) -> Tensor:
        """Return the output without the adapter."""
        return self.compute(x if self.act_quantizer is None else self.act_quantizer(x), self.quantized_weight())

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized layer's output, of the shape of the layer it replaced."""
        y = self.base(x)
        return y if self.adapter is None else y + self.adapter(x)

    @property
    def frozen_weight(self) -> bool:
        """Whether nothing that the quantized weight is computed from is trained."""
        learned = [] if self.weight_quantizer is None else self.weight_quantizer.parameters()
        return not any(tensor.requires_grad for tensor in (self.weight, *learned))

    def quantized_weight(self) -> Tensor:
        """Return the weight that the forward multiplies with: fake-quantized, or as it is if there is no quantizer."""
        quantizer = self.weight_quantizer
        return self.weight if quantizer is None else self._reused("value", lambda: quantizer(self.weight))

    def weight_codes(self, dtype: torch.dtype) -> Tensor:
        """Return the integer codes of the weight in ``dtype``."""
        assert self.weight_quantizer is not None
        quantizer = self.weight_quantizer
        return self._reused(dtype, lambda: quantizer.codes(self.weight, dtype))

    def _reused(self, what: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Return ``compute()``, or what it gave before if nothing changed since and no gradient is asked of it."""
        assert self.weight_quantizer is not None
        learning = self.training or torch.is_grad_enabled()
        if (learning and not self.frozen_weight) or self.weight.is_inference():
            return compute()
        state = [self.weight, *self.weight_quantizer.parameters(), *self.weight_quantizer.buffers()]
        # A tensor made in inference mode cannot be kept for a backward.
        key = [torch.is_inference_mode_enabled(), *((tensor.data_ptr(), tensor._version) for tensor in state)]
        if self._folded is None or self._folded[0] != key:
            self._folded = key, {}
        if what not in self._folded[1]:
            self._folded[1][what] = compute()
        return self._folded[1][what]

    def unfold(self) -> None:
        """Forget the reused weight, so that the next forward runs the weight quantizer."""
        self._folded = None

    def train(self, mode: bool = True) -> QuantLayer:
        """Set train or eval mode and forget the reused weight."""
        self.unfold()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLayer:
        self.unfold()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None}


class QuantLinear(QuantLayer):
    """An nn.Linear with quantized weight and input: Q_w(W) Q_a(x) + b + adapter(x), (..., in_features) to (..., out_features)."""

    def __init__(
        self, source: nn.Linear, weight: Quantizer | None, act: Quantizer | None, adapter: nn.Module | None = None
    ) -> None:
        super().__init__(source, weight, act, adapter)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.matmul = "float"

    def base(self, x: Tensor) -> Tensor:
        """Return the output without the adapter; with gradients, of a function that keeps only x and W for its backward."""
        quantized = self.act_quantizer is not None or self.weight_quantizer is not None
        return fused_linear(self, x) if quantized and torch.is_grad_enabled() else super().base(x)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x W^T + b."""
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        """Return the sizes shown by ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantProjection(QuantLinear):
    """A QuantLinear in the place of a bare Parameter P (in, out) that its owner applies as ``x @ P``."""

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self(x)


class QuantConv2d(QuantLayer):
    """An nn.Conv2d with quantized weight and input, zero padding only; a channel is an output channel."""

    def __init__(
        self, source: nn.Conv2d, weight: Quantizer | None, act: Quantizer | None, adapter: nn.Module | None = None
    ) -> None:
        super().__init__(source, weight, act, adapter)
        self.in_channels, self.out_channels = source.in_channels, source.out_channels
        self.in_features, self.out_features = source.weight[0].numel(), source.out_channels
        self.kernel_size, self.stride, self.padding = source.kernel_size, source.stride, source.padding
        self.dilation, self.groups = source.dilation, source.groups

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution of x (B, in_channels, H, W) with the weight."""
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Return the quantized layers of ``model`` by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


@contextmanager
def full_precision(model: nn.Module) -> Iterator[nn.Module]:
    """Inside this context every quantized layer of ``model`` computes with its full-precision weight and input."""
    held = [(layer, layer.weight_quantizer, layer.act_quantizer) for layer in quant_layers(model).values()]
    try:
        for layer, _, _ in held:
            layer.weight_quantizer = layer.act_quantizer = None
        yield model
    finally:
        for layer, weight, act in held:
            layer.weight_quantizer, layer.act_quantizer = weight, act


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Inside this context ``model`` is in eval mode without gradients; then each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the parameters of ``model``."""
    return next(model.parameters()).device


def require_called(layers: Iterable[str], called: Container[str]) -> None:
    """Raise UserError naming the ``layers`` that a forward never ``called``."""
    missed = [name for name in layers if name not in called]
    if missed:
        raise UserError(
            f"the model's forward never calls {', '.join(missed[:3])}{' ...' if len(missed) > 3 else ''} (it reads the "
            f"weight by itself, or leaves the layer out): skip it with '+quant.rules={{{missed[0]}: null}}'."
        )
