"""Patch features of an image tower, as the score GL-MCM needs them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.core.errors import UserError
from qatlab.quant.inspect.hooks import on_inputs
from qatlab.quant.layers.attention import QuantAttention
from qatlab.towers import open_clip_vit
from qatlab.towers.registry import tower_of
from qatlab.towers.structure import Block, Tower


def with_patches(visual: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features (B, D) of one forward of ``visual``, as it gives them, and patch features (B, P, D), unit rows.

    ``images`` are normalised, (B, 3, S, S). The patch path is that of GL-MCM's authors: in the last block every token
    attends to itself alone, so that the projected values stand for the attention's output; residuals, MLP, the final norm
    and the projection follow. It costs one block more. Modules are called as the forward calls them, quantized ones
    included, whose static scales were calibrated on tokens that attend to others. Raises UserError for a tower that is no
    open_clip VisionTransformer of plain residual blocks.
    """
    tower = patches_of(visual)
    assert (
        tower.stream is not None
    )  # true of the open_clip VisionTransformers, and patches_of lets no other tower through
    block, last_norm, projection = tower.blocks[-1], tower.stream.last_norm.part, tower.projections[0].part
    attention = block.attention.part
    entering: list[Tensor] = []

    def keep(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        entering.append(inputs[0])

    # One forward serves features and patches: the tokens that enter the last block are kept.
    with on_inputs({block.name: block.module}, keep):
        features = visual(images)
    tokens = entering[0] if attention.batch_first else entering[0].transpose(0, 1)
    tokens = tokens[:, tower.extra_tokens :]  # without the class token, which is no patch
    # The last block is computed a second time without attention between tokens. Norm and projection follow, as the
    # tower applies them to its class token.
    tokens = tokens + block.scale_1.part(_values(block, block.norm_1.part(tokens)))
    tokens = tokens + block.scale_2.part(block.mlp.part(block.norm_2.part(tokens)))
    return features, F.normalize(last_norm(tokens) @ projection, dim=-1)


def patches_of(visual: nn.Module) -> Tower:
    """Return the description of ``visual`` if patch features can be read from its last block; else raises UserError."""
    tower = tower_of(visual)
    if tower is None or not open_clip_vit.matches(visual):
        raise UserError(_cannot(f"it is a {type(visual).__name__}"))
    if tower.pool is not None:
        raise UserError(_cannot("it pools by attention"))
    block = tower.blocks[-1]
    if not open_clip_vit.is_plain(block):
        raise UserError(_cannot(f"its blocks are {type(block.module).__name__}s"))
    attention = block.attention.part
    if not isinstance(attention, (nn.MultiheadAttention, QuantAttention)):
        raise UserError(_cannot(f"its attention is a {type(attention).__name__}"))
    return tower


def _values(block: Block, x: Tensor) -> Tensor:
    """Return the output (B, L, d) of the block's attention for x (B, L, d) if every token attended to itself alone."""
    # Attention packs the projections of queries, keys and values into one, in this order: the last third is the values'.
    width, projections = x.shape[-1], block.projections
    if projections is None:  # a QuantAttention, whose layers are called as modules, so that their quantizers round
        attention = block.attention.part
        return attention.out_proj(attention.in_proj(x)[..., 2 * width :])
    bias = None if projections.in_bias is None else projections.in_bias[2 * width :]
    values = F.linear(x, projections.in_weight[2 * width :], bias)
    return F.linear(values, projections.out.weight, projections.out.bias)


def _cannot(reason: str) -> str:
    return (
        f"gl_mcm needs patch features, and this image tower gives none: {reason}. It reads open_clip's plain "
        "VisionTransformers; leave the score out."
    )
