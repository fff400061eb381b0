"""SigLIP as transformers names its tensors and options, in open_clip's words: an image tower of timm and its own text tower."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qatlab.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("siglip", "siglip_vision_model")
# transformers' own defaults, which its files leave out (SiglipVisionConfig, SiglipTextConfig).
_VISION = {"hidden_size": 768, "image_size": 224, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_TEXT = {
    **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 64},
    **{"vocab_size": 32000, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
_TANH = {"gelu_pytorch_tanh": True, "gelu": False}
_IMAGE = {
    "vision_model.embeddings.patch_embedding": "visual.trunk.patch_embed.proj",
    "vision_model.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
    "vision_model.encoder.layers": "visual.trunk.blocks",
    "vision_model.post_layernorm": "visual.trunk.norm",
    "vision_model.head.probe": "visual.trunk.attn_pool.latent",
    "vision_model.head.attention.out_proj": "visual.trunk.attn_pool.proj",
    "vision_model.head.layernorm": "visual.trunk.attn_pool.norm",
    "vision_model.head": "visual.trunk.attn_pool",
    **{"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"},
}
_WORDS = {
    "text_model.embeddings.token_embedding": "text.token_embedding",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.encoder.layers": "text.transformer.resblocks",
    "text_model.final_layer_norm": "text.ln_final",
    "text_model.head": "text.text_projection",
    **{"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"},
    **{"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
}
_QUERY = re.compile(r"(.*)\.self_attn\.q_proj\.(weight|bias)")
_SKIPPED = re.compile(r"\.position_ids$|\.self_attn\.[kv]_proj\.")  # keys and values stand with their queries


def is_siglip(state: Mapping[str, Tensor]) -> bool:
    """Return whether tensors that transformers named are a SiglipModel's, or a SiglipVisionModel's."""
    return "vision_model.head.probe" in state or "head.probe" in state


def from_siglip(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors of transformers' SiglipModel, or SiglipVisionModel, under open_clip's names.

    Raises UserError, naming the file ``path``, for one that lacks a part of an attention.
    """
    import torch  # a plan of a sweep reads the options here, and loads no torch

    if "head.probe" in state:  # a SiglipVisionModel names its parts without the tower
        state = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    found = {}
    for name, tensor in state.items():
        if match := _QUERY.fullmatch(name):
            block, kind = match.groups()
            parts = [state.get(f"{block}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            if any(part is None for part in parts):
                raise UserError(f"{path} lacks keys or values of {block}: fetch it again.")
            # timm has a layer for the three, and open_clip's text tower a parameter.
            packed = f"qkv.{kind}" if block.startswith("vision_model") else f"in_proj_{kind}"
            found[f"{_renamed(block)}.attn.{packed}"] = torch.cat([part for part in parts if part is not None])
        elif pool := re.fullmatch(r"vision_model\.head\.attention\.in_proj_(weight|bias)", name):
            # The queries of the pool are a layer of their own in timm.
            query, keys_values = tensor.tensor_split([len(tensor) // 3])
            found[f"visual.trunk.attn_pool.q.{pool[1]}"] = query.contiguous()
            found[f"visual.trunk.attn_pool.kv.{pool[1]}"] = keys_values.contiguous()
        elif not _SKIPPED.search(name):
            found[_renamed(name)] = tensor
    if (positions := found.get("visual.trunk.pos_embed")) is not None:
        found["visual.trunk.pos_embed"] = positions[None]
    return found


def siglip_model(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return open_clip's model_cfg of transformers' ``config``, the content of ``file``, with "gelu_tanh" beside it.

    Raises UserError for options of transformers that open_clip's SigLIP does not have.
    """
    alone = config["model_type"] == "siglip_vision_model"
    vision = _VISION | (config if alone else config.get("vision_config") or {})
    text = None if alone else _TEXT | (config.get("text_config") or {})
    towers = [tower for tower in (vision, text) if tower]
    acts = {tower["hidden_act"] for tower in towers}
    if len(acts) > 1 or not acts <= _TANH.keys():
        raise UserError(
            f"{file} says hidden_act: {', '.join(sorted(acts))}; it takes gelu_pytorch_tanh or gelu, for both towers."
        )
    if other := [tower["layer_norm_eps"] for tower in towers if tower["layer_norm_eps"] != 1e-6]:
        raise UserError(f"{file} says layer_norm_eps: {other[0]}; open_clip's SigLIP has 1e-06, and other features.")
    found: dict[str, Any] = {
        "quick_gelu": False,
        "gelu_tanh": _TANH[acts.pop()],
        "embed_dim": vision["hidden_size"],
        "vision_cfg": {"image_size": vision["image_size"]},
    }
    if text:
        found["text_cfg"] = {
            "width": text["hidden_size"],
            "layers": text["num_hidden_layers"],
            "heads": text["num_attention_heads"],
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
        }
    return found


def _renamed(name: str) -> str:
    for theirs, ours in (_IMAGE if name.startswith("vision_model") else _WORDS).items():
        name = name.replace(theirs, ours)
    return name
