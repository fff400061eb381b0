"""open_clip's own VisionTransformer, and the blocks that it shares with open_clip's text towers."""

from __future__ import annotations

import inspect
from typing import Any

from open_clip.transformer import Attention as OpenClipAttention
from open_clip.transformer import (
    AttentionalPooler,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from qatlab.towers.structure import Block, Projections, Stream, Tower, joined, place


def matches(module: nn.Module) -> bool:
    """Return whether ``module`` is a tower of this family."""
    return isinstance(module, VisionTransformer)


def describe(module: nn.Module, name: str = "") -> Tower:
    """Return the tower ``module``, which is called ``name`` in the model."""
    assert isinstance(module, VisionTransformer)
    height, width = module.image_size
    return Tower(
        module,
        projections=(place(module, "proj", name),) if module.proj is not None else (),
        blocks=tuple(blocks_of(module, name)),
        stream=Stream(module.transformer.width, place(module, "ln_pre", name), place(module, "ln_post", name)),
        patch_conv=place(module, "conv1", name),
        pool=module.attn_pool,
        extra_tokens=1,  # the class token
        output_dim=module.output_dim,
        image_size=(height, width),
    )


def give_features_alone(module: nn.Module) -> None:
    """Make the tower ``module`` of this family return its features alone, as CLIP's do; CoCa's returns its tokens too."""
    assert isinstance(module, VisionTransformer)
    # Only CoCa's decoder of captions reads the tokens, which nothing here runs.
    module.output_tokens = False


def blocks_of(module: nn.Module, name: str = "") -> list[Block]:
    """Return the blocks of this family anywhere in ``module``, in order; it is an encoder or a part of one."""
    kinds = (ResidualAttentionBlock, CustomResidualAttentionBlock)
    return [_block(joined(name, path), part) for path, part in module.named_modules() if isinstance(part, kinds)]


def _block(name: str, module: nn.Module) -> Block:
    return Block(
        name,
        module,
        norm_1=place(module, "ln_1", name),
        attention=place(module, "attn", name),
        norm_after=place(module, "ln_attn", name) if isinstance(module, CustomResidualAttentionBlock) else None,
        scale_1=place(module, "ls_1", name),
        norm_2=place(module, "ln_2", name),
        mlp=place(module, "mlp", name),
        fc1=place(module, "mlp.c_fc", name),
        fc2=place(module, "mlp.c_proj", name),
        scale_2=place(module, "ls_2", name),
        projections=_projections(module.get_submodule("attn")),
    )


def is_plain(block: Block) -> bool:
    """Return whether ``block`` is CLIP's own, without the additions of open_clip's CustomResidualAttentionBlock."""
    return isinstance(block.module, ResidualAttentionBlock)


def is_attention(module: nn.Module) -> bool:
    """Return whether ``module`` is open_clip's own attention, which reads in_proj's weight without calling a layer."""
    return isinstance(module, OpenClipAttention)


def is_pooler(module: nn.Module) -> bool:
    """Return whether ``module`` pools tokens by an attention of learned queries, as CoCa's image tower does."""
    return isinstance(module, AttentionalPooler)


def takes_what_is_known(attention: nn.Module) -> bool:
    """Return whether the forward of open_clip's attention takes exactly the arguments that it takes in release 3.3."""
    # A later release may add an argument that a stand-in would ignore, and only the signature shows such an argument.
    return list(inspect.signature(attention.forward).parameters) == ["x", "attn_mask"]


def _projections(attention: nn.Module) -> Projections | None:
    # After quantization the block holds a QuantAttention, whose projections are no plain tensors.
    if not isinstance(attention, (nn.MultiheadAttention, OpenClipAttention)):
        return None
    inner = getattr(attention, "ln_inner", None)
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    assert isinstance(weight, Tensor)
    registers: Any = getattr(attention, "registers", None)
    # ``called`` is False, because both classes give the weights of their projections to a function.
    return Projections(
        attention.num_heads,
        weight,
        bias,
        attention.out_proj,
        inner if isinstance(inner, nn.LayerNorm) else None,
        called=False,
        own_values=registers.values if registers else None,
    )
