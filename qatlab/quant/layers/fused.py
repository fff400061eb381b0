"""A quantized linear layer for training as one autograd function that keeps only its input and its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qatlab.quant.layers.weight import FoldedWeight
from qatlab.quant.quantizers.base import Quantizer

MATMULS = ("float", "int8", "bf16")


def fused_linear(x: Tensor, weight: FoldedWeight, act: Quantizer | None, bias: Tensor | None, matmul: str) -> Tensor:
    """Return Q_w(W) Q_a(x) + b, (..., out), for x (..., in), W (out, in) and b (out,).

    It is differentiable in x, W, b and the quantizers' parameters. Backward runs the quantizers again for what it needs
    besides x and W, so no more is kept than by a plain nn.Linear. Any quantizer works here, as long as it gives the
    same result twice.

    ``matmul`` chooses the products. "float" is exactly the unfused layer. "int8" multiplies the integer codes in
    the forward (torch._int_mm) and differs by float rounding, some 1e-7 of y; its backward is that of "float". "bf16"
    multiplies the codes in forward and backward: bfloat16 holds every code exactly, but the products are rounded to it,
    which is 2e-3 of y, 3e-3 of dx and dW, and some 5e-3 of the gradient of a scale, more where that nearly cancels.
    """
    return _FusedLinear.apply(weight, act, matmul, x, weight.weight, bias, *_learned(act, weight.quantizer))


class _FusedLinear(torch.autograd.Function):
    """The forward and backward of ``fused_linear``; both round, and no rounded tensor is kept in between."""

    @staticmethod
    def forward(
        ctx: Any,
        folded: FoldedWeight,
        act: Quantizer | None,
        matmul: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *learned: Tensor,
    ) -> Tensor:
        """Return the layer's output (..., out) for x (..., in), ``weight`` (out, in) and ``bias`` (out,)."""
        ctx.folded, ctx.act, ctx.matmul = folded, act, matmul
        # Backward does not read the quantizers' parameters from here. They are saved so that torch raises an error if
        # an optimizer has changed them before backward rounds again.
        ctx.save_for_backward(x, weight, *learned)
        weights = _Weight(folded, weight, False)
        if matmul != "float":
            return _integer_product(x, act, weights, bias, torch.int8 if matmul == "int8" else torch.bfloat16)
        return F.linear(x if act is None else act(x), weights.quantized(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients to the inputs of ``forward``, given ``grad`` (..., out), that of the output (N, out)."""
        x, weight, *_ = ctx.saved_tensors
        _, _, _, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        weights = _Weight(ctx.folded, weight, needs_weight)
        inputs = _Operand(ctx.act, x, needs_x)
        input_gradient, weight_gradient = _GRADIENTS[ctx.matmul]
        # One operand comes after the other, so that the tensors
        # of the first are freed before those of the second exist.
        grad_x, *grads_act = inputs.back(lambda: input_gradient(rows, weights).view(x.shape))
        grad_weight, *grads_weights = weights.back(lambda: weight_gradient(rows, inputs))
        grad_bias = rows.sum(0).to(weight.dtype) if needs_bias else None
        return None, None, None, grad_x, grad_weight, grad_bias, *grads_act, *grads_weights


class _Operand:
    """A factor of the product, quantized when first needed, and the way of its gradient back through the rounding."""

    def __init__(self, quantizer: Quantizer | None, tensor: Tensor, needs_grad: bool) -> None:
        # The detached tensor is a leaf of the graph: torch then
        # differentiates the rounding alone, and not what made the tensor.
        self.quantizer, self.tensor = quantizer, tensor.detach().requires_grad_(needs_grad)
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The quantized factor, of the tensor's shape, with its graph."""
        if self._value is None:
            # torch runs the backward of a function with gradients off,
            # but ``back`` differentiates the graph of this value.
            with torch.enable_grad():
                self._value = self.quantized()
        return self._value

    def quantized(self) -> Tensor:
        """Return the quantized factor, (..., in) or (out, in) as it is given, with a graph where gradients are on."""
        return self.tensor if self.quantizer is None else self.quantizer(self.tensor)

    def codes(self, dtype: torch.dtype) -> Tensor:
        """Return the integer codes in ``dtype``, as rows (n, in)."""
        assert self.quantizer is not None
        return self.quantizer.codes(self.tensor, dtype).reshape(-1, self.tensor.shape[-1])

    def back(self, gradient: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients to the tensor and the quantizer's parameters; ``gradient()`` returns that of the value.

        Each gradient has the shape of its tensor, such as (out, in) for a weight and (out, 1) for its scales; the first
        is None where the tensor needs no gradient.
        """
        learned = _learned(self.quantizer)
        wanted = [self.tensor, *learned] if self.tensor.requires_grad else learned
        # Where nothing takes a gradient, the product behind ``gradient`` is not computed at all.
        if not wanted:
            return (None,)
        found = torch.autograd.grad(self.value, wanted, gradient().to(self.value.dtype), allow_unused=True)
        return found if self.tensor.requires_grad else (None, *found)


class _Weight(_Operand):
    """The layer's weight: quantized anew, or reused where it is frozen."""

    def __init__(self, folded: FoldedWeight, weight: Tensor, needs_grad: bool) -> None:
        super().__init__(folded.quantizer, weight, needs_grad)
        self.folded = folded

    def quantized(self) -> Tensor:
        """Return the quantized weight (out, in): the reused one if it is frozen."""
        return self.folded.value() if self.folded.frozen else super().quantized()

    def codes(self, dtype: torch.dtype) -> Tensor:
        """Return the integer codes (out, in) in ``dtype``: the reused ones if the weight is frozen."""
        return self.folded.codes(dtype) if self.folded.frozen else super().codes(dtype)


def _float_input_gradient(rows: Tensor, weights: _Operand) -> Tensor:
    return rows @ weights.value.detach().to(rows.dtype)


def _float_weight_gradient(rows: Tensor, inputs: _Operand) -> Tensor:
    return rows.T @ inputs.value.detach().reshape(-1, inputs.tensor.shape[-1]).to(rows.dtype)


def _bf16_input_gradient(rows: Tensor, weights: _Operand) -> Tensor:
    assert weights.quantizer is not None
    # The weight's scales belong to its rows, over which this
    # product sums, so they are multiplied in before the product.
    scaled = rows * weights.quantizer.scale.detach().view(-1)
    return scaled.to(torch.bfloat16) @ weights.codes(torch.bfloat16)


def _bf16_weight_gradient(rows: Tensor, inputs: _Operand) -> Tensor:
    assert inputs.quantizer is not None
    codes = inputs.codes(torch.bfloat16)
    # Activations have one scale for all elements, so it can be multiplied in after the product.
    return (rows.to(torch.bfloat16).T @ codes).float().mul_(inputs.quantizer.scale.detach())


# For each ``matmul`` the functions that return the gradients to the quantized x and to the quantized W. int8 uses those
# of float, because it multiplies codes in the forward only.
_Gradient = Callable[[Tensor, _Operand], Tensor]
_GRADIENTS: dict[str, tuple[_Gradient, _Gradient]] = {
    "float": (_float_input_gradient, _float_weight_gradient),
    "int8": (_float_input_gradient, _float_weight_gradient),
    "bf16": (_bf16_input_gradient, _bf16_weight_gradient),
}


def _integer_product(
    x: Tensor, act: Quantizer | None, weights: _Weight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the layer's output from a product of codes in ``dtype``, scaled afterwards in float32, in x's dtype."""
    assert act is not None
    assert weights.quantizer is not None
    rows = act.codes(x, dtype).reshape(-1, x.shape[-1])
    columns = weights.codes(dtype).T
    product = _int_mm(rows, columns) if dtype == torch.int8 else rows @ columns
    y = product.float().mul_((act.scale * weights.quantizer.scale).view(-1))
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)


def _int_mm(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the product of int8 matrices (n, in) and (in, out), int32 (n, out)."""
    # torch._int_mm on a GPU needs at least 17 rows, so rows of zeros are added and their products are cut off.
    padded = F.pad(rows, (0, 0, 0, max(0, 17 - len(rows))))
    return torch._int_mm(padded, columns)[: len(rows)]


def _learned(*quantizers: Quantizer | None) -> list[Tensor]:
    """Return the parameters that the quantizers learn, in order."""
    return [p for quantizer in quantizers if quantizer is not None for p in quantizer.parameters() if p.requires_grad]
