"""A tiny image tower of every family, with random weights of realistic scale."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from timm.layers import Attention, RmsNorm
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

_EVA = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 8}
_EVA02 = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True, "global_pool": "token"}
_VIT = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 8}
_CLIP = {"image_size": 28, "layers": 2, "width": 48, "patch_size": 14, "head_width": 12}


def _open_clip(features: int = 8, **vision: Any) -> nn.Module:
    tower: nn.Module = _build_vision_tower(features, CLIPVisionCfg(**{**_CLIP, **vision}))
    return tower


def _gated() -> nn.Module:
    tower = VisionTransformer(**_VIT)
    for block in tower.blocks:
        block.attn = Attention(48, num_heads=2, gated=True)
    return tower


def _fastvit() -> nn.Module:
    mixers = ("repmixer", "attention")
    options = {"layers": (1, 1), "embed_dims": (32, 64), "mlp_ratios": (2, 2), "token_mixers": mixers}
    return FastVit(**options, downsamples=(False, True), pos_embs=(None, None), num_classes=8, lkc_use_act=True)


# How a tower is made, and the size of its images.
TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "clip": (_open_clip, 28),
    "clip, layer scale": (partial(_open_clip, ls_init_value=0.5), 28),
    "coca": (partial(_open_clip, attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=2), 28),
    "coca of its paper": (partial(_open_clip, 48, attentional_pool="parallel", attn_pooler_heads=2), 28),
    "timm vit": (partial(timm.create_model, "test_vit", num_classes=8), 160),
    "timm vit, mean behind a norm": (partial(VisionTransformer, **_VIT, global_pool="avg", class_token=False), 28),
    "timm vit, q and k norms, layer scale": (partial(VisionTransformer, **_VIT, qk_norm=True, init_values=0.3), 28),
    "timm vit, RMSNorm": (partial(VisionTransformer, **_VIT, norm_layer=RmsNorm, qkv_bias=False), 28),
    "timm vit, norms in between": (
        partial(VisionTransformer, **_VIT, scale_attn_norm=True, scale_mlp_norm=True),
        28,
    ),
    "siglip": (partial(VisionTransformer, **_VIT, class_token=False, global_pool="map"), 28),
    "gap": (partial(VisionTransformer, **_VIT, class_token=False, global_pool="avg", fc_norm=False), 28),
    "mobileclip-b": (
        partial(timm.create_model, "vit_base_mci_224", img_size=64, depth=2, mlp_ratio=1, num_classes=8),
        64,
    ),
    "vitamin": (partial(timm.create_model, "vitamin_small_224", img_size=64, depth=2, num_classes=8), 64),
    "eva01": (partial(Eva, **_EVA, global_pool="avg"), 28),
    "eva02": (partial(Eva, **_EVA, **_EVA02, scale_attn_inner=True), 28),
    "eva02, packed, layer scale": (partial(Eva, **_EVA, swiglu_mlp=True, init_values=0.3, use_rot_pos_emb=True), 28),
    "eva02-e": (partial(Eva, **_EVA, use_post_norm=True), 28),
    "pe": (
        partial(
            *(Eva,),
            **_EVA,
            use_rot_pos_emb=True,
            attn_type="rope",
            use_pre_transformer_norm=True,
            global_pool="map",
            init_values=0.3,
            qk_norm=True,
        ),
        28,
    ),
    "shared keys and values": (
        partial(Eva, **_EVA, use_rot_pos_emb=True, attn_type="rope", qkv_fused=False, num_kv_heads=1),
        28,
    ),
    "gated": (_gated, 28),
    "relative positions": (
        partial(
            *(timm.create_model, "vit_relpos_medium_patch16_cls_224"),
            img_size=32,
            depth=2,
            embed_dim=48,
            num_heads=2,
            num_classes=8,
        ),
        32,
    ),
    "swin": (
        partial(SwinTransformer, 64, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 2), num_classes=8),
        64,
    ),
}
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (partial(_open_clip, image_size=64, layers=[1, 1, 1, 1], width=16, patch_size=None, head_width=64), 64),
    "convnext": (partial(ConvNeXt, depths=(1, 1, 2, 1), dims=(16, 32, 48, 64), num_classes=8), 64),
    "fastvit": (_fastvit, 64),
}
FAMILIES = {**TRANSFORMERS, **CONVOLUTIONS}


def tower(name: str) -> nn.Module:
    """The tower, in eval mode and double precision; every tensor that training would change is drawn."""
    make, _ = FAMILIES[name]
    torch.manual_seed(0)
    visual = make().double().requires_grad_(False)
    for path, module in visual.named_modules():
        if "rel_pos" in path:
            continue  # these numbers are added to attention's logits, which would leave all weight to one token
        for parameter_name, parameter in module.named_parameters(recurse=False):
            _draw(module, parameter_name, parameter)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the statistics of all batches count alike
    visual.train()(images(name))
    return visual.eval()


def _draw(module: nn.Module, name: str, parameter: Tensor) -> None:
    if parameter.ndim > 1 and not name.endswith(("gamma", "table", "embed", "embedding", "token", "latent", "query")):
        fan_in = parameter.shape[0] if name == "proj" else parameter[0].numel()
        parameter.normal_(std=fan_in**-0.5)
        # Some channels are as large as the outlier features of trained transformers.
        parameter[::17] *= 2
    elif name == "weight" or name.startswith("gamma"):
        parameter.uniform_(0.5, 1.5)
        parameter[:1] *= 4
    else:
        parameter.add_(0.3 * torch.randn_like(parameter))


def images(name: str, count: int = 4) -> Tensor:
    """Random images (count, 3, S, S) in double precision."""
    size = FAMILIES[name][1]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
