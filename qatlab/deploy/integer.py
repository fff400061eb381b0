"""The form of a quantized encoder that is exported: integer weights, and quantize and dequantize steps for activations."""

from __future__ import annotations

import copy

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

from qatlab.core.errors import UserError
from qatlab.quant.layers.linear import QuantConv2d, QuantLayer, RightFactor
from qatlab.quant.layers.outliers import OutlierProduct
from qatlab.quant.layers.walk import attention_products, quant_layers
from qatlab.quant.quantizers.base import Quantizer
from qatlab.quant.quantizers.dynamic import DynamicMinMax
from qatlab.quant.quantizers.floating import FloatingPoint
from qatlab.quant.quantizers.lsq_plus import LSQPlus

_OPS = torch.ops.quantized_decomposed
# Activations are unsigned, that is a signed grid shifted by 128: unsigned times signed bytes is the product that CPUs
# are fastest at.
LOW, HIGH, MIDDLE = 0, 255, 128


class IntegerLayer(RightFactor, nn.Module):
    """A ``QuantLayer`` in the form of integer runtimes: quantize, dequantize, and a product with a dequantized int8 weight.

    Input channels that stay in full precision have codes of zero in the weight, and a product of their own, in floats.

    Its values are equal to those of the simulation up to the order of sums. Runtimes fuse the three steps into one
    integer product. Raises UserError, naming the layer, unless the input has one grid, and the weight one grid or one
    per channel.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, layer: QuantLayer, name: str) -> None:
        super().__init__()
        weight, act = _static(layer, name)
        self.name, self.shell = name, _shell(layer)
        codes = layer.weight_codes(torch.int8)
        self.outliers = _frozen(layer.outliers) if layer.outliers else None
        scale = weight.scale.detach().float().reshape(-1)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scale.expand(len(codes)).contiguous())
        self.register_buffer("zeros", torch.zeros(len(codes), dtype=torch.int64))
        # LSQ+ learns an offset b of the input, which no integer zero point can hold: W (x + b) = W x + W b. So b is
        # subtracted before rounding, and the bias takes up W b, a constant.
        self.offset = float(act.offset.detach()) if isinstance(act, LSQPlus) else 0.0
        if self.offset:
            moved = self.offset * layer.quantized_weight().detach().flatten(1).sum(1)
            self.shell.bias = _constant(moved if layer.bias is None else layer.bias + moved)
        if self.outliers is not None:
            self._leave_out(layer, act, self.outliers.channels)
        zero = 0 if self.offset else int(act.zero_point)
        self.scale, self.zero = float(act.scale.detach()), zero + MIDDLE
        self.ends: tuple[float, float] | None = None
        if act.bits < 8:  # runtimes clip at the ends of eight bits: a narrower grid is clipped before, in floats
            self.ends = (act.qmin - zero) * self.scale, (act.qmax - zero) * self.scale
        self.weight_bits, self.act_bits = weight.bits, act.bits

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for the input ``x`` (..., K), as the simulation's layer shapes it."""
        outliers = None if self.outliers is None else self.outliers(x)
        # Quantize, dequantize, multiply: runtimes look for this pattern and put one integer product in its place.
        x = _OPS.dequantize_per_tensor(self.rounded(x), self.scale, self.zero, LOW, HIGH, torch.uint8)
        weight = _OPS.dequantize_per_channel(self.codes, self.scales, self.zeros, 0, -128, 127, torch.int8)
        y = self.shell.compute(x, weight)
        return y if outliers is None else y + outliers

    def _leave_out(self, layer: QuantLayer, act: Quantizer, channels: Tensor) -> None:
        """Give the columns of ``channels`` (k,) codes of zero, so that it does not matter what their inputs are rounded to."""
        # The simulation rounds zeros there. Where a training has moved the columns, or the grid has no zero, what their
        # product adds is a constant, which the bias takes up.
        columns = layer.quantized_weight().detach()[:, channels].flatten(1).sum(1)
        moved = (act(torch.zeros(1, device=columns.device)).detach() - self.offset) * columns
        if bool(moved.any()):
            self.shell.bias = _constant(moved if self.shell.bias is None else self.shell.bias + moved)
        self.codes = self.codes.index_fill(1, channels, 0)

    def rounded(self, x: Tensor) -> Tensor:
        """Return the codes of the input ``x`` of any shape, uint8 of the same shape."""
        if self.offset:
            x = x - self.offset
        if self.ends is not None:
            x = x.clamp(*self.ends)
        return _OPS.quantize_per_tensor(x, self.scale, self.zero, LOW, HIGH, torch.uint8)


class Classifier(nn.Module):
    """Returns features (B, D) and probabilities (B, C): softmax of ``logit_scale`` times the cosines to ``classes`` (C, D).

    With a ``logit_bias`` b each probability is sigmoid(s c + b) of its own cosine c, at the scale s.
    """

    classes: Tensor

    def __init__(self, visual: nn.Module, classes: Tensor, logit_scale: float, logit_bias: float | None = None) -> None:
        super().__init__()
        self.visual, self.logit_scale, self.logit_bias = visual, logit_scale, logit_bias
        self.register_buffer("classes", classes.clone())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, D) and probabilities (B, C) of normalised ``images`` (B, 3, S, S)."""
        features = self.visual(images)
        cosines = nn.functional.normalize(features, dim=-1) @ self.classes.T
        logits = self.logit_scale * cosines
        return features, logits.softmax(-1) if self.logit_bias is None else (logits + self.logit_bias).sigmoid()


def integer_copy(visual: nn.Module) -> nn.Module:
    """Return a copy of a quantized encoder with every quantized layer an ``IntegerLayer``, in eval mode.

    Raises UserError, before anything is copied, for a layer that has no exact integer form, and where nothing is quantized.
    """
    layers = quant_layers(visual)
    if not layers:
        raise UserError("nothing of this encoder is quantized: there is no integer model to export.")
    for name in attention_products(visual):
        raise UserError(
            f"'{name}' has no exact integer form: quant.attention rounds both operands of its products, which exports "
            "multiply in floats. Export a run with quant/attention=null."
        )
    # All layers are checked before the copy is made, because an encoder may have hundreds of megabytes.
    for name, layer in layers.items():
        _static(layer, name)
    model = copy.deepcopy(visual).eval()
    with torch.no_grad():
        for name, layer in quant_layers(model).items():
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, IntegerLayer(layer, name))
    return model


def integer_layers(model: nn.Module) -> dict[str, IntegerLayer]:
    """Return the integer layers of ``model`` by the name they have in the encoder, in its order."""
    return {module.name: module for module in model.modules() if isinstance(module, IntegerLayer)}


def _static(layer: QuantLayer, name: str) -> tuple[Quantizer, Quantizer]:
    """Return the quantizers of the weight and of the input; raises UserError if the layer's product has no integer form."""
    weight, act = layer.weight_quantizer, layer.act_quantizer
    for said, quantizer in (("weight", weight), ("input", act)):
        if quantizer is None:
            raise _inexact(name, f"its {said} is not quantized")
    assert weight is not None
    assert act is not None
    for said, quantizer in (("weight", weight), ("input", act)):
        if isinstance(quantizer, FloatingPoint):
            raise _inexact(name, f"{type(quantizer).__name__} rounds its {said} to floating-point numbers")
    # LoRA's path runs beside the product in full precision, and cannot be merged into integers exactly.
    if layer.adapter is not None:
        raise _inexact(name, f"{type(layer.adapter).__name__} beside it reads the full-precision input")
    if not weight.integer_product or getattr(weight, "group_size", None):
        raise _inexact(
            name, f"{type(weight).__name__} has no grid per tensor or output channel in the basis of its input"
        )
    # A scale per input channel cannot be taken out of the sum over the channels, and a scale per token is not static.
    if act.per_channel or isinstance(act, DynamicMinMax):
        raise _inexact(name, f"{type(act).__name__} rounds its input with a scale for each channel or token")
    # Where a convolution pads, the offset that its bias takes up would be added around the image too.
    if isinstance(act, LSQPlus) and isinstance(layer, QuantConv2d) and _pads(layer):
        raise _inexact(name, "LSQPlus adds an offset to its input, which the zeros around the image do not have")
    return weight, act


def _pads(layer: QuantConv2d) -> bool:
    """Return whether a convolution reads zeros around its input."""
    if isinstance(layer.padding, str):
        return layer.padding == "same" and max(layer.kernel_size) > 1
    return any(layer.padding)


def _inexact(name: str, why: str) -> UserError:
    return UserError(
        f"'{name}' has no exact integer form: {why}. Export a run with static scales on both sides, such as recipe=ptq, "
        "smoothquant, rotation, light_qat_lsq or lr_qat."
    )


def _shell(layer: QuantLayer) -> QuantLayer:
    """Return a copy of ``layer`` without weight and quantizers; it only multiplies."""
    # The copy is shallow but has tables of its own, so that removing entries does not change ``layer``.
    shell = copy.copy(layer)
    shell._parameters, shell._modules = dict(layer._parameters), dict(layer._modules)
    shell.bias = None if layer.bias is None else _constant(layer.bias)
    shell.weight = None  # type: ignore[assignment]
    shell.weight_quantizer = shell.act_quantizer = shell.outliers = None
    shell.unfold()
    return shell


def _frozen(product: OutlierProduct) -> OutlierProduct:
    """Return a copy of ``product`` whose weight is not trained."""
    return copy.deepcopy(product).requires_grad_(False)


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=False)
