"""The tensors of a CLIP from transformers, renamed as open_clip names them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qatlab.core.errors import UserError
from qatlab.models.transformers_siglip import from_siglip, is_siglip

_TOWERS = {"vision_model": "visual.", "text_model": ""}
# {part of a name in transformers: part in open_clip}; the spelling "pre_layrnorm" is transformers' own.
_RENAMED = {
    **{"embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.weight": "conv1.weight"},
    **{"embeddings.position_embedding.weight": "positional_embedding"},
    **{"embeddings.token_embedding.weight": "token_embedding.weight"},
    **{"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "final_layer_norm": "ln_final"},
    **{"encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2"},
    **{"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"},
}
# Matrices that transformers multiplies from the other side.
_TURNED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_QUERY = re.compile(r"(.*)\.self_attn\.q_proj\.(weight|bias)")


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict names its tensors as transformers does."""
    return is_siglip(state) or any(name.partition(".")[0] in _TOWERS for name in state)


def from_transformers(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors of transformers' CLIPModel, CLIPVisionModelWithProjection or SigLIP models, under open_clip's names.

    Raises UserError, naming the file ``path``, for a model of another kind.
    """
    if is_siglip(state):
        return from_siglip(state, path)
    if "visual_projection.weight" not in state:
        raise UserError(
            f"{path} is a model without a projection to the space of texts in the format of transformers, of which CLIPModel, "
            "CLIPVisionModelWithProjection, SiglipModel and SiglipVisionModel are read: give the weights of open_clip's release "
            "of it."
        )
    found = {}
    for name, tensor in state.items():
        if name in _TURNED:
            found[_TURNED[name]] = tensor.T.contiguous()
        elif match := _QUERY.fullmatch(name):
            # open_clip holds query, key and value in one matrix.
            block, kind = match.groups()
            parts = [state.get(f"{block}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            if any(part is None for part in parts):
                raise UserError(f"{path} lacks keys or values of {block}: fetch it again.")
            found[f"{_renamed(block)}.attn.in_proj_{kind}"] = torch.cat([part for part in parts if part is not None])
        # Positions are counted, not learned; keys and values stand with their queries.
        elif not re.search(r"\.position_ids$|\.self_attn\.[kv]_proj\.", name):
            found[_renamed(name)] = tensor
    return found


def _renamed(name: str) -> str:
    tower, _, rest = name.partition(".")
    if tower not in _TOWERS:
        return name
    for theirs, ours in _RENAMED.items():
        rest = rest.replace(theirs, ours)
    return f"{_TOWERS[tower]}{rest}"
