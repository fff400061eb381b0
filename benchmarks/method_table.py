"""The methods that methods.py measures: how each makes a calibrated model, and what its training step is to cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from qatlab.quant import (
    FP8,
    GPTQ,
    LSQ,
    MX,
    NVFP4,
    AttentionProducts,
    DynamicMinMax,
    LSQPlus,
    MinMax,
    Ridge,
    calibrate,
    quant_layers,
    quantize,
)
from qatlab.quant.bits.allocate import bit_rules
from qatlab.quant.bits.sensitivity import gradient_sensitivities
from qatlab.quant.layers.lora import LoRA
from qatlab.quant.quantizers.lr_qat import LRQAT
from qatlab.quant.quantizers.raana import RaanA
from qatlab.quant.rewrites.outlier_channels import OutlierChannels
from qatlab.quant.rewrites.repq import RepQ
from qatlab.quant.rewrites.rotation import Rotation
from qatlab.quant.rewrites.smoothquant import SmoothQuant

LSQ_STEP = {"compiled": 1.20, "eager": 1.45}

Make = Callable[[nn.Module, list[Tensor]], nn.Module]


@dataclass(frozen=True)
class Method:
    """How a full-precision tower and batches of images become a calibrated model, and what that is to cost."""

    make: Make
    passes: int = 1
    trained: bool = False
    step: float | dict[str, float] | None = None  # the target, or one for each choice of kernels


def plain(weight: Any, act: Any, rewrite: Any = None, outliers: Any = None, **options: Any) -> Make:
    """Rewrite the tower where the method does, quantize it, take channels out of the rounding and calibrate it."""

    def make(visual: nn.Module, batches: list[Tensor]) -> nn.Module:
        visual = visual if rewrite is None else rewrite(visual, batches)
        model = quantize(visual, weight, act, **options)
        model = model if outliers is None else outliers(model, batches)
        calibrate(model, batches)
        return model

    return make


def compensated(weight: Any) -> Make:
    """Activations of four bits with a zero point, for whose errors weights and biases make up."""

    def make(visual: nn.Module, batches: list[Tensor]) -> nn.Module:
        model = quantize(visual, weight, partial(MinMax, bits=4, symmetric=False, observer="mse"))
        Ridge().prepare(model)
        calibrate(model, batches, Ridge())
        return model

    return make


def mixed_precision(visual: nn.Module, batches: list[Tensor]) -> nn.Module:
    """2 to 8 bits per layer, 6 on average, by the gradient's sensitivities."""
    shared = {id(parameter): parameter for parameter in visual.parameters()}
    model = quantize(copy.deepcopy(visual, shared), W8, A8)
    costs = {
        name: {bits: cost * 2.0**-bits for bits in range(2, 9)}
        for name, cost in gradient_sensitivities(model, batches).items()
    }
    sizes = {name: layer.weight.numel() for name, layer in quant_layers(model).items()}
    # The activations of a layer get the bits of its weight.
    rules = {name: {**rule, "act": rule["weight"]} for name, rule in bit_rules(costs, sizes, 6).items()}
    return plain(W8, A8, rules=rules)(visual, batches)


def observed(**options: Any) -> Make:
    """Static activations, and weights by absmax per output channel."""
    return plain(W8, partial(MinMax, bits=8, **options))


def weights(weight: Any, **options: Any) -> Make:
    """Activations by absmax per tensor."""
    return plain(partial(weight, bits=8, **options), A8)


def attention(softmax: str, act: Any = None, **options: Any) -> Make:
    """Both products of attention on static grids too."""
    return plain(W8, act or A8, attention=partial(AttentionProducts, 8, softmax=softmax), **options)


W8, A8 = partial(MinMax, bits=8, per_channel=True), partial(MinMax, bits=8)
ASYMMETRIC = partial(MinMax, bits=8, symmetric=False, observer="mse")
LSQ_W, LSQ_PC, LSQ_A = partial(LSQ, bits=8), partial(LSQ, bits=8, per_channel=True), partial(LSQ, bits=8)
LR_QAT = partial(LRQAT, bits=8, per_channel=True)
# Each rounds weights and activations.
FORMATS = {
    "fp8_e4m3": partial(FP8, "e4m3"),
    "fp8_e5m2": partial(FP8, "e5m2"),
    "mxfp8_e4m3": partial(MX, "e4m3"),
    "mxfp8_e5m2": partial(MX, "e5m2"),
    "mxfp6_e2m3": partial(MX, "e2m3"),
    "mxfp6_e3m2": partial(MX, "e3m2"),
    "mxfp4": partial(MX, "e2m1"),
    "nvfp4": NVFP4,
}
METHODS = {
    "absmax": Method(observed(), trained=True),
    "ema": Method(observed(observer="ema")),
    "percentile": Method(observed(observer="percentile")),
    "mse": Method(observed(observer="mse")),
    "asymmetric": Method(observed(symmetric=False)),
    "asym_mse": Method(observed(symmetric=False, observer="mse")),
    "act_channel": Method(observed(per_channel=True)),
    "per_token": Method(plain(W8, partial(DynamicMinMax, bits=8))),
    "token_asym": Method(plain(W8, partial(DynamicMinMax, bits=8, symmetric=False))),
    "w_tensor": Method(weights(MinMax)),
    "w_group64": Method(weights(MinMax, group_size=64)),
    "w_percentile": Method(weights(MinMax, per_channel=True, observer="percentile")),
    "w_mse": Method(weights(MinMax, per_channel=True, observer="mse")),
    "weight_only": Method(plain(partial(MinMax, bits=8, per_channel=True, observer="mse"), None)),
    "attn_uniform": Method(attention("uniform"), trained=True),
    "attn_log_sqrt2": Method(attention("log_sqrt2")),
    "attn_adalog": Method(attention("adalog")),
    "vit_literature": Method(
        attention("uniform", act=partial(MinMax, 8, symmetric=False), patch_conv=True, final_proj=True)
    ),
    "gptq_w4": Method(plain(partial(GPTQ, bits=4), A8), 2),
    "ridge": Method(compensated(W8), 3),
    "ridge_gptq_w4": Method(compensated(partial(GPTQ, bits=4)), 3),
    "raana_w8": Method(weights(RaanA)),
    "raana_w4": Method(plain(partial(RaanA, bits=4), A8)),
    **{name: Method(plain(make, make), trained=True) for name, make in FORMATS.items()},
    "smooth_0.5": Method(plain(W8, A8, SmoothQuant(0.5)), 2),
    "smooth_search": Method(plain(W8, A8, SmoothQuant("search", W8, A8)), 2),
    "outliers": Method(plain(W8, A8, outliers=OutlierChannels(budget=0.003)), 2),
    "repq": Method(plain(W8, ASYMMETRIC, RepQ(ASYMMETRIC)), 2),
    "rotation_lsq": Method(plain(LSQ_PC, LSQ_A, Rotation()), trained=True),
    "mixed": Method(mixed_precision, 4),
    "lsq": Method(plain(LSQ_W, LSQ_A), trained=True, step=LSQ_STEP),
    "lsq_pc": Method(plain(LSQ_PC, LSQ_A), trained=True, step=LSQ_STEP),
    "lsq_plus": Method(plain(LSQ_PC, partial(LSQPlus, bits=8)), trained=True),
    "lora": Method(plain(W8, A8, adapter=LoRA), trained=True, step=0.90),
    "lora_lsq": Method(plain(W8, LSQ_A, adapter=LoRA), trained=True, step=0.90),
    "lr_qat": Method(plain(LR_QAT, LSQ_A), trained=True, step=1.25),
}
