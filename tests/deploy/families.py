"""The smallest tower of every family, with weights of realistic scale."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import timm
import torch
from open_clip.model import _build_vision_tower
from open_clip.timm_model import TimmModel
from timm.layers import SEModule
from timm.models import vitamin
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.deploy.cpu import lacks_vnni
from qatlab.quant import MinMax, calibrate, quantize
from qatlab.towers.batch_norms import fold_batch_norms

PLAIN = {"layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
TIMM = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
BITS = 7 if lacks_vnni() else 8  # of weights: what this machine's instructions multiply without cutting sums off


def _of_open_clip(size: int, **options: Any) -> nn.Module:
    return _build_vision_tower(16, {"image_size": size, **options})


def _of_timm(name: str, size: int, pool: str, proj: str | None, **options: Any) -> nn.Module:
    create = timm.create_model
    # open_clip gives timm the name alone, so the sizes are added on the way.
    with patch.object(timm, "create_model", lambda name, **given: create(name, **{**given, **options})):
        return TimmModel(name, 16, image_size=size, pool=pool, proj=proj)  # type: ignore[arg-type]


def _vitamin() -> nn.Module:
    convolutions = vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    first = vitamin.VitCfg(
        embed_dim=(16, 32, 48), depths=(1, 1, 1), stem_width=16, conv_cfg=convolutions, head_type="1d"
    )
    sizes = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 2}
    return _of_timm("vitamin_small_224", 64, "avg", "linear", embed_cfg=first, **sizes)


def _fast() -> nn.Module:
    return _of_timm("fastvit_mci0", 64, "avg", None, layers=(1, 1, 1, 1), embed_dims=(8, 16, 16, 32))


def _swin() -> nn.Module:
    sizes = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}
    return _of_timm("swin_tiny_patch4_window7_224", 64, "avg", "linear", **sizes)


POOLER = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": False}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 32}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vit": partial(_of_open_clip, 32, **PLAIN),
    "coca": partial(_of_open_clip, 32, **PLAIN, **POOLER),
    "resnet": partial(_of_open_clip, 64, **RESNET),
    "siglip": partial(_of_timm, "vit_base_patch16_siglip_224", 32, "map", None, **TIMM),
    "eva02": partial(_of_timm, "eva02_base_patch16_clip_224", 32, "token", None, **TIMM),
    "pe_core": partial(_of_timm, "vit_pe_core_tiny_patch16_384", 32, "map", None, **TIMM, ref_feat_shape=(4, 4)),
    "vitamin": _vitamin,
    "convnext": partial(_of_timm, "test_convnext", 64, "", "mlp"),
    "fastvit": _fast,
    "swin": _swin,
}


@torch.no_grad()
def tower(name: str) -> nn.Module:
    """The tower of a family: N(0, 1 / fan-in), gains of norms and layer scales U(0.5, 1.5), batch norms with statistics."""
    torch.manual_seed(0)
    visual = FAMILIES[name]()
    for module in visual.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and "pos" not in attribute:
                inputs = parameter.shape[0] if attribute == "proj" else parameter[0].numel()
                parameter.normal_(std=inputs**-0.5)
            elif attribute == "weight" or attribute.startswith("gamma"):
                parameter.uniform_(0.5, 1.5)
        if isinstance(module, SEModule):
            module.fc1.bias.fill_(0.7)  # its one channel goes through a ReLU, which must be open for some image
    visual.train()(images(visual))
    return fold_batch_norms(visual.eval().requires_grad_(True))


def images(visual: Any, count: int = 8) -> Tensor:
    """Smooth random images, which resemble photos more than independent pixels do."""
    size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    coarse = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size=(size, size), mode="bicubic")


def quantized(name: str, weight: Any = None, act: Any = None, **options: Any) -> nn.Module:
    """The calibrated tower of a family with every layer quantized, first and last ones too."""
    visual = tower(name)
    weight, act = weight or partial(MinMax, BITS, per_channel=True), act or partial(MinMax, 8)
    model = quantize(visual, weight, act, patch_conv=True, final_proj=True, **options)
    calibrate(model, [images(visual)])
    return model
