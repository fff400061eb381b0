"""A quantized encoder in the form that is exported: integer weights, and activations rounded where a runtime looks for it."""

from __future__ import annotations

import copy

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

from qatlab.errors import UserError
from qatlab.quant.dynamic import DynamicMinMax
from qatlab.quant.layers import QuantLayer, quant_layers
from qatlab.quant.lsq_plus import LSQPlus
from qatlab.quant.quantizer import Quantizer

_OPS = torch.ops.quantized_decomposed
LOW, HIGH, MIDDLE = (
    0,
    255,
    128,
)  # unsigned activations: signed grids shifted by 128, the pair that CPUs multiply fastest


class IntegerLayer(nn.Module):
    """A ``QuantLayer`` as integer runtimes know it: quantize, dequantize, and the product with a dequantized int8 weight.

    The same values as the simulation's up to the order of sums. Runtimes fuse the three into one integer product.
    Raises UserError, naming the layer, for what is not one grid for the input and one per tensor or channel of the weight.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, layer: QuantLayer, name: str) -> None:
        super().__init__()
        weight, act = _static(layer, name)
        self.name, self.shell = name, _shell(layer)
        codes = layer.weight_codes(torch.int8)
        scale = weight.scale.detach().float().reshape(-1)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scale.expand(len(codes)).contiguous())
        self.register_buffer("zeros", torch.zeros(len(codes), dtype=torch.int64))
        # A learned offset is no whole number of steps: it is subtracted, and what it would have added is the bias's.
        self.offset = float(act.offset.detach()) if isinstance(act, LSQPlus) else 0.0
        if self.offset:
            moved = self.offset * layer.quantized_weight().detach().flatten(1).sum(1)
            self.shell.bias = _constant(moved if layer.bias is None else layer.bias + moved)
        zero = 0 if self.offset else int(act.zero_point)
        self.scale, self.zero = float(act.scale.detach()), zero + MIDDLE
        self.ends: tuple[float, float] | None = None
        if act.bits < 8:  # runtimes saturate at the ends of eight bits
            self.ends = (act.qmin - zero) * self.scale, (act.qmax - zero) * self.scale
        self.weight_bits, self.act_bits = weight.bits, act.bits

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        x = _OPS.dequantize_per_tensor(self.rounded(x), self.scale, self.zero, LOW, HIGH, torch.uint8)
        weight = _OPS.dequantize_per_channel(self.codes, self.scales, self.zeros, 0, -128, 127, torch.int8)
        return self.shell.compute(x, weight)

    def rounded(self, x: Tensor) -> Tensor:
        """Return the codes of the input, uint8, in its shape."""
        if self.offset:
            x = x - self.offset
        if self.ends is not None:
            x = x.clamp(*self.ends)
        return _OPS.quantize_per_tensor(x, self.scale, self.zero, LOW, HIGH, torch.uint8)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self(x)  # a projection that its owner applies as x @ P


class Classifier(nn.Module):
    """Returns features (B, D) and probabilities (B, C): softmax of ``logit_scale`` times the cosines to ``classes`` (C, D)."""

    classes: Tensor

    def __init__(self, visual: nn.Module, classes: Tensor, logit_scale: float) -> None:
        super().__init__()
        self.visual, self.logit_scale = visual, logit_scale
        self.register_buffer("classes", classes.clone())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return both."""
        features = self.visual(images)
        cosines = nn.functional.normalize(features, dim=-1) @ self.classes.T
        return features, (self.logit_scale * cosines).softmax(-1)


def integer_copy(visual: nn.Module) -> nn.Module:
    """Return a copy of a quantized encoder with every quantized layer an ``IntegerLayer``, in eval mode.

    Raises UserError, before anything is copied, for a layer that has no exact integer form, and where nothing is quantized.
    """
    layers = quant_layers(visual)
    if not layers:
        raise UserError("nothing of this encoder is quantized: there is no integer model to export.")
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
    """Return both quantizers of a layer whose product is one of integers."""
    weight, act = layer.weight_quantizer, layer.act_quantizer
    for said, quantizer in (("weight", weight), ("input", act)):
        if quantizer is None:
            raise _inexact(name, f"its {said} is not quantized")
    assert weight is not None
    assert act is not None
    if layer.adapter is not None:
        raise _inexact(name, f"{type(layer.adapter).__name__} beside it reads the full-precision input")
    if not weight.integer_product or getattr(weight, "group_size", None):
        raise _inexact(
            name, f"{type(weight).__name__} has no grid per tensor or output channel in the basis of its input"
        )
    if act.per_channel or isinstance(act, DynamicMinMax):
        raise _inexact(name, f"{type(act).__name__} rounds its input with a scale for each channel or token")
    return weight, act


def _inexact(name: str, why: str) -> UserError:
    return UserError(
        f"'{name}' has no exact integer form: {why}. Export a run with static scales on both sides, such as recipe=ptq, "
        "smoothquant, rotation, light_qat_lsq or lr_qat."
    )


def _shell(layer: QuantLayer) -> QuantLayer:
    """Return ``layer`` without its weight and quantizers: what is left multiplies."""
    shell = copy.copy(layer)
    shell._parameters, shell._modules = dict(layer._parameters), dict(layer._modules)
    shell.bias = None if layer.bias is None else _constant(layer.bias)
    shell.weight = None  # type: ignore[assignment]
    shell.weight_quantizer = shell.act_quantizer = None
    shell.unfold()
    return shell


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=False)
