"""A SigLIP of two blocks, as open_clip builds it of a timm tower, and its tensors as transformers names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

NAME = "ViT-siglip-test"
TRUNK = "qatlab_test_siglip"
WIDTH = 32
CONFIG: dict[str, Any] = {
    "embed_dim": WIDTH,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 32, "timm_model_name": TRUNK, "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {
        **{"context_length": 8, "vocab_size": 50, "width": WIDTH, "heads": 2, "layers": 2, "mlp_ratio": 2.0},
        **{"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}},
        **{"hf_tokenizer_name": "timm/ViT-siglip-test", "tokenizer_kwargs": {"clean": "canonicalize"}},
    },
}


def qatlab_test_siglip(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Return SigLIP's image tower in small; timm calls it by its name."""
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    options = {name: value for name, value in options.items() if not name.startswith(("pretrained", "cache"))}
    return VisionTransformer(**{**sizes, "class_token": False, "global_pool": "map", **options})


def register(folder: Path, name: str = NAME, **changes: Any) -> str:
    """Make the small SigLIP known to timm and to open_clip, with ``changes`` of its text tower; return its name."""
    if not timm.is_model(TRUNK):
        qatlab_test_siglip.__module__ = "timm.models.vision_transformer"
        timm.models.register_model(qatlab_test_siglip)
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], **changes}}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    return name


def made(name: str = NAME) -> Any:
    """Return the small SigLIP with weights, biases and norms that are no easy ones."""
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.logit_scale.data.fill_(3.0)
    model.logit_bias.data.fill_(-7.0)
    return model


def transformers_state(model: Any) -> dict[str, Tensor]:
    """Return the tensors of an open_clip SigLIP as transformers' SiglipModel has them."""
    found = {"logit_scale": model.logit_scale.data[None], "logit_bias": model.logit_bias.data[None]}
    return {**found, **_image(model.visual.trunk), **_text(model.text)}


def _image(trunk: Any) -> dict[str, Tensor]:
    found = {"vision_model.embeddings.position_embedding.weight": trunk.pos_embed.data[0].clone()}
    found |= _layer("vision_model.embeddings.patch_embedding", trunk.patch_embed.proj)
    found |= _layer("vision_model.post_layernorm", trunk.norm)
    for i, block in enumerate(trunk.blocks):
        at, qkv = f"vision_model.encoder.layers.{i}", block.attn.qkv
        found |= _layer(f"{at}.layer_norm1", block.norm1) | _layer(f"{at}.layer_norm2", block.norm2)
        found |= _split(at, qkv.weight, qkv.bias) | _layer(f"{at}.self_attn.out_proj", block.attn.proj)
        found |= _layer(f"{at}.mlp.fc1", block.mlp.fc1) | _layer(f"{at}.mlp.fc2", block.mlp.fc2)
    pool, at = trunk.attn_pool, "vision_model.head"
    found[f"{at}.probe"] = pool.latent.data.clone()
    found[f"{at}.attention.in_proj_weight"] = torch.cat([pool.q.weight.data, pool.kv.weight.data])
    found[f"{at}.attention.in_proj_bias"] = torch.cat([pool.q.bias.data, pool.kv.bias.data])
    found |= _layer(f"{at}.attention.out_proj", pool.proj) | _layer(f"{at}.layernorm", pool.norm)
    return found | _layer(f"{at}.mlp.fc1", pool.mlp.fc1) | _layer(f"{at}.mlp.fc2", pool.mlp.fc2)


def _text(text: Any) -> dict[str, Tensor]:
    found = {"text_model.embeddings.token_embedding.weight": text.token_embedding.weight.data.clone()}
    found["text_model.embeddings.position_embedding.weight"] = text.positional_embedding.data.clone()
    for i, block in enumerate(text.transformer.resblocks):
        at = f"text_model.encoder.layers.{i}"
        found |= _layer(f"{at}.layer_norm1", block.ln_1) | _layer(f"{at}.layer_norm2", block.ln_2)
        found |= _split(at, block.attn.in_proj_weight, block.attn.in_proj_bias)
        found |= _layer(f"{at}.self_attn.out_proj", block.attn.out_proj)
        found |= _layer(f"{at}.mlp.fc1", block.mlp.c_fc) | _layer(f"{at}.mlp.fc2", block.mlp.c_proj)
    return (
        found | _layer("text_model.final_layer_norm", text.ln_final) | _layer("text_model.head", text.text_projection)
    )


def _split(at: str, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for kind, part, of in zip("qkv", weight.data.chunk(3), bias.data.chunk(3), strict=True):
        found[f"{at}.self_attn.{kind}_proj.weight"] = part.clone()
        found[f"{at}.self_attn.{kind}_proj.bias"] = of.clone()
    return found


def _layer(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{kind}": tensor.data.clone() for kind, tensor in module.named_parameters(recurse=False)}
