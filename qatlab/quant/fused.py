"""A quantized linear layer for training as one autograd function that keeps only its input and its weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from qatlab.quant.layers import QuantLinear
    from qatlab.quant.quantizer import Quantizer

MATMULS = ("float", "int8", "bf16")


def fused_linear(layer: QuantLinear, x: Tensor) -> Tensor:
    """Return Q_w(W) Q_a(x) + b of ``layer``, (..., out_features), differentiable in x, W, b and the quantizers' parameters.

    What backward needs besides x and W is computed anew there by the quantizers themselves, so that any quantizer works
    here unchanged, as long as it gives the same result twice, and nothing is kept that a plain nn.Linear would not keep.

    ``layer.matmul`` chooses the products. "float" is exactly the unfused layer. "int8" multiplies the integer codes in
    the forward (torch._int_mm) and differs by float rounding, some 1e-7 of y; its backward is that of "float". "bf16"
    multiplies the codes in forward and backward: bfloat16 holds every code exactly, but the products are rounded to it,
    which is 2e-3 of y, 3e-3 of dx and dW, and some 5e-3 of the gradient of a scale, more where that nearly cancels.
    """
    return _FusedLinear.apply(
        layer, x, layer.weight, layer.bias, *_learned(layer.act_quantizer, layer.weight_quantizer)
    )


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: QuantLinear, x: Tensor, weight: Tensor, bias: Tensor | None, *learned: Tensor
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, weight, *learned)  # the last so that a step in between is found out
        if layer.matmul != "float":
            return _integer_product(layer, x, weight, bias)
        act = layer.act_quantizer
        return F.linear(x if act is None else act(x), _Weight(layer, weight, False).quantized(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer: QuantLinear = ctx.layer
        x, weight, *_ = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        weights = _Weight(layer, weight, needs_weight)
        inputs = _Operand(layer.act_quantizer, x, needs_x)
        # One operand after the other: what the first needed is freed before the second's product is there.
        grad_x, *grads_act = inputs.back(lambda: _input_gradient(layer, rows, weights).view(x.shape))
        grad_weight, *grads_weights = weights.back(lambda: _weight_gradient(layer, rows, inputs))
        grad_bias = rows.sum(0).to(weight.dtype) if needs_bias else None
        return None, grad_x, grad_weight, grad_bias, *grads_act, *grads_weights


class _Operand:
    """A factor of the product, quantized when it is first needed, and the way of its gradient back through the rounding."""

    def __init__(self, quantizer: Quantizer | None, tensor: Tensor, needs_grad: bool) -> None:
        self.quantizer, self.tensor = quantizer, tensor.detach().requires_grad_(needs_grad)
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The quantized factor, with its graph."""
        if self._value is None:
            with torch.enable_grad():
                self._value = self.quantized()
        return self._value

    def quantized(self) -> Tensor:
        """Return the quantized factor, with a graph where gradients are on."""
        return self.tensor if self.quantizer is None else self.quantizer(self.tensor)

    def codes(self, dtype: torch.dtype) -> Tensor:
        """The integer codes, as rows."""
        assert self.quantizer is not None
        return self.quantizer.codes(self.tensor, dtype).reshape(-1, self.tensor.shape[-1])

    def back(self, gradient: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients to the tensor and the quantizer's parameters; ``gradient()`` is that of the value."""
        learned = _learned(self.quantizer)
        wanted = [self.tensor] * self.tensor.requires_grad + learned
        if not wanted:
            return (None,)
        found = torch.autograd.grad(self.value, wanted, gradient().to(self.value.dtype), allow_unused=True)
        return found if self.tensor.requires_grad else (None, *found)


class _Weight(_Operand):
    """The layer's weight: quantized anew, or reused where it is frozen."""

    def __init__(self, layer: QuantLinear, weight: Tensor, needs_grad: bool) -> None:
        super().__init__(layer.weight_quantizer, weight, needs_grad)
        self.layer = layer

    def quantized(self) -> Tensor:
        """Return the quantized weight, the reused one if it is frozen."""
        return self.layer.quantized_weight() if self.layer.frozen_weight else super().quantized()

    def codes(self, dtype: torch.dtype) -> Tensor:
        """The integer codes, the reused ones if the weight is frozen."""
        return self.layer.weight_codes(dtype) if self.layer.frozen_weight else super().codes(dtype)


def _input_gradient(layer: QuantLinear, rows: Tensor, weights: _Operand) -> Tensor:
    if layer.matmul != "bf16":
        return rows @ weights.value.detach().to(rows.dtype)
    assert layer.weight_quantizer is not None
    scaled = rows * layer.weight_quantizer.scale.detach().view(-1)
    return scaled.to(torch.bfloat16) @ weights.codes(torch.bfloat16)


def _weight_gradient(layer: QuantLinear, rows: Tensor, inputs: _Operand) -> Tensor:
    if layer.matmul != "bf16":
        return rows.T @ inputs.value.detach().reshape(-1, layer.in_features).to(rows.dtype)
    assert layer.act_quantizer is not None
    codes = inputs.codes(torch.bfloat16)
    return (rows.to(torch.bfloat16).T @ codes).float().mul_(layer.act_quantizer.scale.detach())


def _integer_product(layer: QuantLinear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the layer's output from a product of codes, scaled afterwards in float32, in x's dtype."""
    act, weights = layer.act_quantizer, layer.weight_quantizer
    assert act is not None
    assert weights is not None
    dtype = torch.int8 if layer.matmul == "int8" else torch.bfloat16
    rows = act.codes(x, dtype).reshape(-1, layer.in_features)
    columns = _Weight(layer, weight, False).codes(dtype).T
    product = _int_mm(rows, columns) if dtype == torch.int8 else rows @ columns
    y = product.float().mul_((act.scale * weights.scale).view(-1))
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], layer.out_features).to(x.dtype)


def _int_mm(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the product of int8 matrices in int32. A GPU wants more than 16 rows: the missing ones are zeros."""
    padded = F.pad(rows, (0, 0, 0, max(0, 17 - len(rows))))
    return torch._int_mm(padded, columns)[: len(rows)]


def _learned(*quantizers: Quantizer | None) -> list[Tensor]:
    """Return the parameters that the quantizers learn, in order."""
    return [p for quantizer in quantizers if quantizer is not None for p in quantizer.parameters() if p.requires_grad]
