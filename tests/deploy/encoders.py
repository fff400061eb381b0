"""Small quantized encoders, with and without an exact integer form."""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from qatlab.deploy.cpu import lacks_vnni
from qatlab.quant import (
    FP8,
    GPTQ,
    LSQ,
    MX,
    NVFP4,
    LoRA,
    LSQPlus,
    MinMax,
    OutlierChannels,
    RaanA,
    Rotation,
    calibrate,
    quantize,
)
from qatlab.quant.quantizers.dynamic import DynamicMinMax
from qatlab.quant.quantizers.lr_qat import LRQAT

# Of weights: what this machine's instructions multiply without cutting sums off.
BITS = 7 if lacks_vnni() else 8
# The slots of quantize by name; each has an exact integer form, or the one of INEXACT's reasons not to.
PLAIN = {"weight": partial(MinMax, BITS, per_channel=True), "act": partial(MinMax, 8)}
EXACT: dict[str, dict[str, Any]] = {
    "absmax": PLAIN,
    "per tensor": {**PLAIN, "weight": partial(MinMax, BITS)},
    "least squares": {"weight": partial(MinMax, 4, per_channel=True, observer="mse"), "act": partial(MinMax, 8, observer="mse")},
    "zero point": {**PLAIN, "act": partial(MinMax, 8, symmetric=False)},
    "four bits": {"weight": partial(MinMax, 4, per_channel=True), "act": partial(MinMax, 4)},
    "four bits, zero point": {**PLAIN, "act": partial(MinMax, 4, symmetric=False)},
    "lsq": {"weight": partial(LSQ, BITS, per_channel=True), "act": partial(LSQ, 8)},
    "lsq_plus": {"weight": partial(LSQ, BITS, per_channel=True), "act": partial(LSQPlus, 8)},
    "gptq": {"weight": partial(GPTQ, BITS), "act": partial(MinMax, 8, observer="mse")},
    "lr_qat": {"weight": partial(LRQAT, 4, rank=2), "act": partial(MinMax, 8)},
    "ends": {**PLAIN, "patch_conv": True, "final_proj": True},
    "outliers": {**PLAIN, "outliers": OutlierChannels(channels=2, layers="*mlp*")},
    "outliers, zero point": {**PLAIN, "act": partial(MinMax, 4, symmetric=False), "outliers": OutlierChannels(channels=1)},
    # Codes that low-rank factors leave in the columns, and a grid that does not hold the zeros of their inputs.
    "outliers, moved": {"weight": partial(LRQAT, 4, rank=2), "act": partial(LSQPlus, 8), "outliers": OutlierChannels(channels=2)},
}  # fmt: skip
INEXACT: dict[str, tuple[dict[str, Any], str]] = {
    "raana": ({**PLAIN, "weight": partial(RaanA, 4)}, "RaanA has no grid per tensor or output channel"),
    "groups": ({**PLAIN, "weight": partial(MinMax, 4, group_size=8)}, "MinMax has no grid per tensor or output channel"),
    "per token": ({**PLAIN, "act": partial(DynamicMinMax, 8)}, "DynamicMinMax rounds its input with a scale for each"),
    "per channel": ({**PLAIN, "act": partial(MinMax, 8, per_channel=True)}, "MinMax rounds its input with a scale for each"),
    "fp8 weights": ({**PLAIN, "weight": partial(FP8, "e4m3")}, "FP8 rounds its weight to floating-point numbers"),
    "fp8 inputs": ({**PLAIN, "act": partial(FP8, "e5m2")}, "FP8 rounds its input to floating-point numbers"),
    "mx": ({**PLAIN, "weight": partial(MX, "e2m1"), "act": partial(MX, "e2m1")}, "MX rounds its weight to floating-point"),
    "nvfp4": ({**PLAIN, "act": NVFP4}, "NVFP4 rounds its input to floating-point numbers"),
    "weights": ({**PLAIN, "act": None}, "its input is not quantized"),
    "inputs": ({**PLAIN, "weight": None}, "its weight is not quantized"),
    "lora": ({**PLAIN, "adapter": partial(LoRA, rank=2)}, "LoRA beside it reads the full-precision input"),
}  # fmt: skip


def plain_encoder(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 2, "width": width, "patch_size": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).visual.eval()


def built(slots: dict[str, Any], rotated: bool = False) -> nn.Module:
    """A small encoder with quantizers, calibrated, its learned parameters moved from where they start."""
    visual = plain_encoder()
    if rotated:
        visual = Rotation(seed=3)(visual)
    given = dict(slots)
    outliers = given.pop("outliers", None)
    model = quantize(visual, given.pop("weight"), given.pop("act"), **given)
    if outliers is not None:
        outliers(model, [made(16)])
    calibrate(model, [made(16)])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("offset", "low_rank", "adapter")):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def made(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def encoder_of(name: str) -> nn.Module:
    """The quantized encoder of EXACT, INEXACT or "rotation"."""
    if name == "rotation":
        return built(PLAIN, rotated=True)
    return built(EXACT[name] if name in EXACT else INEXACT[name][0])
