"""The text towers of open_clip: within a CLIP, as a module of its own, or from Hugging Face."""

from __future__ import annotations

from typing import Any

import torch
from open_clip import CLIP
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

from qatlab.towers import open_clip_vit
from qatlab.towers.structure import CausalText, Place, Tower, joined, linear_places, place

# A CLIP has no module for its text tower, but holds the parts of the tower itself.
TOWERS = (CLIP, TextTransformer)


def matches(module: nn.Module) -> bool:
    """Return whether ``module`` is a tower of this family."""
    return isinstance(module, (*TOWERS, HFTextEncoder))


def describe(module: nn.Module, name: str = "") -> Tower:
    """Return the tower ``module``, called ``name`` in the model: its blocks, where they are open_clip's, and its projections."""
    if isinstance(module, HFTextEncoder):
        return Tower(module, linear_places(module, module.proj, name))
    # The blocks of a CLIP's image tower lie in the same module, but not in the transformer of its text tower.
    blocks = open_clip_vit.blocks_of(module.get_submodule("transformer"), joined(name, "transformer"))
    return Tower(module, _projections(module, name), tuple(blocks))


def beside(model: nn.Module) -> list[nn.Module]:
    """Return the parts of a CLIP that no text goes through on its way to its features.

    These are the image tower, and the decoder by which a CoCa writes captions.
    """
    parts = [getattr(model, name, None) for name in ("visual", "text_decoder")]
    return [part for part in parts if part is not None]


def tables(tower: Any) -> tuple[nn.Parameter, ...]:
    """Return the Parameters (..., width) of open_clip's own text ``tower`` whose sum is what its first block reads.

    They are the embeddings of tokens and positions, and in a CoCa the class token behind the text.
    """
    found = (tower.token_embedding.weight, tower.positional_embedding, getattr(tower, "cls_emb", None))
    return tuple(table for table in found if table is not None)


def is_told_from_matrix(layer: nn.Module, owner: nn.Module) -> bool:
    """Return whether ``owner`` calls ``layer`` only because it is an nn.Linear, and computes ``x @ layer`` for all else."""
    return isinstance(owner, TOWERS) and layer is owner.text_projection


def _projections(module: Any, name: str) -> tuple[Place, ...]:
    """Return the place of the text projection: a Parameter, an nn.Linear where it has a bias, or none at all."""
    known = isinstance(module.text_projection, (nn.Parameter, nn.Linear))
    return (place(module, "text_projection", name),) if known else ()


def causal_text(model: Any) -> CausalText | None:
    """Return the text tower of ``model`` if no text's features depend on tokens behind the text's end, else None."""
    # A model with a separate text tower has it as ``text``; a CLIP is its own text tower.
    text = getattr(model, "text", model)
    mask, (pooling, end) = getattr(text, "attn_mask", None), _pooling(text)
    # A feature that is read at a fixed place, or from a class
    # embedding behind the text, depends on tokens after the end.
    if mask is None or pooling not in ("argmax", "eos") or getattr(text, "cls_emb", None) is not None:
        return None
    later = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if not bool(mask[later].isneginf().all()):
        return None

    def ends(tokens: Tensor) -> Tensor:
        """Return the place (N,), int64, at which each text's feature is read, for ``tokens`` (N, context)."""
        # open_clip's pooling is called with every token's place as its feature, so it returns the place that it reads.
        places = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        return text_global_pool(places[..., None], tokens, pooling, end).flatten()

    return CausalText(text, len(text.positional_embedding), {"positional_embedding": 1, "attn_mask": 2}, ends)


def _pooling(text: Any) -> tuple[str | None, int | None]:
    """Return open_clip's name for the place where a text's feature is read, and the id of the end token."""
    # A CLIP has these attributes with the prefix "text_", because its image tower has a pooling too.
    if hasattr(text, "text_pool_type"):
        return text.text_pool_type, text.text_eos_id
    return getattr(text, "pool_type", None), getattr(text, "eos_id", None)
