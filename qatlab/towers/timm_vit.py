"""timm's VisionTransformer under open_clip's head."""

from __future__ import annotations

from dataclasses import replace

from open_clip.timm_model import TimmModel
from timm.models import vision_transformer as vit
from torch import nn

from qatlab.towers import timm_trunk
from qatlab.towers.structure import Block, Projections, Stream, Tower, joined, place


def matches(module: nn.Module) -> bool:
    """Return whether ``module`` is a tower of this family."""
    return isinstance(module, TimmModel) and isinstance(module.trunk, vit.VisionTransformer)


def describe(module: nn.Module, name: str = "") -> Tower:
    """Return the tower ``module``, which is called ``name`` in the model."""
    assert isinstance(module, TimmModel)
    trunk = module.trunk
    blocks = [_block(joined(name, path), part) for path, part in module.named_modules() if isinstance(part, vit.Block)]
    # Where timm averages the tokens, its last norm comes after the average and is called fc_norm.
    last_norm = "trunk.fc_norm" if isinstance(trunk.norm, nn.Identity) else "trunk.norm"
    return replace(
        timm_trunk.describe(module, name),
        blocks=tuple(blocks),
        stream=Stream(trunk.embed_dim, place(module, "trunk.norm_pre", name), place(module, last_norm, name)),
        patch_conv=place(module, "trunk.patch_embed.proj", name),
        pool=trunk.attn_pool,
        extra_tokens=trunk.num_prefix_tokens,
    )


def _block(name: str, module: vit.Block) -> Block:
    return Block(
        name,
        module,
        norm_1=place(module, "norm1", name),
        attention=place(module, "attn", name),
        norm_after=None,
        scale_1=place(module, "ls1", name),
        norm_2=place(module, "norm2", name),
        mlp=place(module, "mlp", name),
        fc1=place(module, "mlp.fc1", name),
        fc2=place(module, "mlp.fc2", name),
        scale_2=place(module, "ls2", name),
        projections=_projections(module.attn),
    )


def _projections(attention: nn.Module) -> Projections | None:
    # A gate multiplies the output of the heads, and ``Projections`` has no field for a gate.
    if not isinstance(attention, vit.Attention) or attention.gate is not None:
        return None
    if not isinstance(attention.qkv, nn.Linear) or not isinstance(attention.proj, nn.Linear):
        return None
    inner = attention.norm if isinstance(attention.norm, nn.LayerNorm) else None
    # timm's attention calls qkv and proj, so quantized layers can take their places.
    return Projections(
        attention.num_heads, attention.qkv.weight, attention.qkv.bias, attention.proj, inner, called=True
    )
