"""CLIP as transformers names its tensors: the inverse of what is tested, written by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


def transformers_state(model: Any) -> State:
    """Return the tensors of an open_clip CLIP as transformers' CLIPModel has them."""
    found: State = {"logit_scale": model.logit_scale.data, "text_projection.weight": model.text_projection.data.T}
    found["text_model.embeddings.token_embedding.weight"] = model.token_embedding.weight.data
    found["text_model.embeddings.position_embedding.weight"] = model.positional_embedding.data
    found |= _norm("text_model.final_layer_norm", model.ln_final) | _blocks("text_model", model.transformer)
    return _copied(found | image_state(model.visual))


def image_state(visual: Any) -> State:
    """Return the tensors of an open_clip image tower as transformers' CLIPVisionModelWithProjection has them."""
    found: State = {"visual_projection.weight": visual.proj.data.T}
    found["vision_model.embeddings.class_embedding"] = visual.class_embedding.data
    found["vision_model.embeddings.patch_embedding.weight"] = visual.conv1.weight.data
    found["vision_model.embeddings.position_embedding.weight"] = visual.positional_embedding.data
    found["vision_model.embeddings.position_ids"] = torch.arange(len(visual.positional_embedding))[None]
    found |= _norm("vision_model.pre_layrnorm", visual.ln_pre) | _norm("vision_model.post_layernorm", visual.ln_post)
    return _copied(found | _blocks("vision_model", visual.transformer))


def _blocks(tower: str, transformer: Any) -> State:
    found: State = {}
    for i, block in enumerate(transformer.resblocks):
        at = f"{tower}.encoder.layers.{i}"
        found |= _norm(f"{at}.layer_norm1", block.ln_1) | _norm(f"{at}.layer_norm2", block.ln_2)
        found |= _norm(f"{at}.mlp.fc1", block.mlp.c_fc) | _norm(f"{at}.mlp.fc2", block.mlp.c_proj)
        found |= _norm(f"{at}.self_attn.out_proj", block.attn.out_proj)
        weights, biases = block.attn.in_proj_weight.data.chunk(3), block.attn.in_proj_bias.data.chunk(3)
        for kind, weight, bias in zip("qkv", weights, biases, strict=True):
            found |= {f"{at}.self_attn.{kind}_proj.weight": weight, f"{at}.self_attn.{kind}_proj.bias": bias}
    return found


def _norm(name: str, module: Any) -> State:
    return {f"{name}.weight": module.weight.data, f"{name}.bias": module.bias.data}


def _copied(state: State) -> State:
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}
