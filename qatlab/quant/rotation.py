"""Rotation: rewrite a ViT so that no feature stands out for a quantizer, the outputs staying what they are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import Attention as OpenClipAttention
from open_clip.transformer import CustomResidualAttentionBlock, LayerScale, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from qatlab.errors import UserError
from qatlab.quant.hadamard import RandomHadamard


class ToRotated(nn.Module):
    """Returns R (x - mean(x)) for x (..., width): the features as a rotated residual stream holds them, R of ``seed``.

    A LayerNorm ignores the mean of what it reads, so it reads the same from a stream without one; there it is RMSNorm,
    which commutes with every rotation.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.rotation = RandomHadamard(width, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features rotated, without their mean, in the shape and dtype of x."""
        return self.rotation(x - x.mean(dim=-1, keepdim=True))


class FromRotated(nn.Module):
    """Returns R^T x for x (..., width), R of ``seed``: ToRotated undone, but for the mean."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.rotation = RandomHadamard(width, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features rotated back, in the shape and dtype of x."""
        return self.rotation.inverse(x)


@dataclass
class Rotation:
    """Returns an open_clip image tower, rewritten in place: the same outputs, but no outliers in what layers read.

    Random Hadamard rotations R, decided by ``seed``, are multiplied into the weights on both sides of where they act
    (Ashkboos et al. 2024, "QuaRot", arXiv 2404.00456):

    * ``residual``: the residual stream. ln_1's and ln_2's weight and bias go into in_proj and c_fc, which leaves
      RMSNorm; out_proj, c_proj and the end of ln_pre write R (x - mean) in place of x; ln_post reads it rotated back.
    * ``mlp``: the input of c_proj. An activation function lies before it, so this is a transform in every forward,
      ``mlp.rotation``; R^T goes into c_proj.
    * ``heads``: the values inside each head. R goes into in_proj's value rows, R^T into out_proj.

    Layers keep their names and Parameters (a LayerScale goes into its layer); folds are computed in float64 and rounded
    to the weights' dtype once. Outputs agree to float rounding; what the blocks give (``forward_intermediates``) is
    rotated with ``residual``, unless normalised. Unlike QuaRot: any width, no transform across the heads before
    out_proj, and ln_post stays a LayerNorm, because ``proj`` has no bias to take in its own.

    Raises UserError, before anything is changed, for a tower without open_clip blocks, with ``residual`` for one that
    is not its VisionTransformer with LayerNorm, for what is quantized or rotated already, and for a norm between a
    rotation and its inverse.
    """

    seed: int = 0
    residual: bool = True
    mlp: bool = True
    heads: bool = True

    def __post_init__(self) -> None:
        if not (self.residual or self.mlp or self.heads):
            raise UserError("residual, mlp and heads of a rotation are all false: set one to true, or leave it out.")

    def prepare(self, visual: nn.Module) -> nn.Module:
        """Return ``visual`` in the form that a rewritten state dict loads into: rotated, since that needs no data."""
        return self(visual)

    @torch.no_grad()
    def __call__(self, visual: nn.Module, batches: Iterable[Tensor] = ()) -> nn.Module:
        """Return ``visual``, rewritten; the calibration images ``batches`` are not read, a rotation needs no data."""
        blocks = self._require_rewritable(visual)
        generator = torch.Generator().manual_seed(self.seed)
        stream_seed, *seeds = torch.randint(2**62, (1 + 2 * len(blocks),), generator=generator).tolist()
        if self.residual:
            _rotate_ends(visual, stream_seed)
        for block, mlp_seed, head_seed in zip(blocks, seeds[::2], seeds[1::2], strict=True):
            if self.residual:
                _rotate_stream(block, stream_seed)
            if self.mlp:
                _rotate_mlp(block, mlp_seed)
            if self.heads:
                _rotate_heads(block.attn, head_seed)
        return visual

    def _require_rewritable(self, visual: nn.Module) -> list[Any]:
        """The blocks of ``visual``, in order."""
        kinds = (ResidualAttentionBlock, CustomResidualAttentionBlock)
        blocks = {name: module for name, module in visual.named_modules() if isinstance(module, kinds)}
        tower = type(visual).__name__
        if not blocks:
            raise UserError(
                f"{tower} has no transformer blocks of open_clip, which a rotation rewrites: leave the rotation out, "
                "and meet outliers with an asymmetric or per-token grid."
            )
        if self.residual and (not isinstance(visual, VisionTransformer) or visual.attn_pool is not None):
            pooled = " with attentional pooling" if isinstance(visual, VisionTransformer) else ""
            raise UserError(
                f"{tower}{pooled} is not the tower whose residual stream is rotated, open_clip's VisionTransformer "
                "without attentional pooling: set residual=false."
            )
        for name, block in blocks.items():
            self._require_rewritable_block(name, block)
        return list(blocks.values())

    def _require_rewritable_block(self, name: str, block: Any) -> None:
        known = isinstance(block.attn, nn.MultiheadAttention | OpenClipAttention)
        if not known or not isinstance(block.mlp.c_proj, nn.Linear) or hasattr(block.mlp, "rotation"):
            raise UserError(f"'{name}' is quantized or rewritten already: rotate the full-precision model, and first.")
        norms = [norm for norm in (block.ln_1, block.ln_2) if not isinstance(norm, nn.LayerNorm)]
        if self.residual and norms:
            raise UserError(
                f"'{name}' reads the residual stream by {type(norms[0]).__name__} and not LayerNorm (is it rotated "
                "already?): set residual=false."
            )
        if self.residual and isinstance(getattr(block, "ln_attn", None), nn.LayerNorm):
            raise UserError(f"'{name}' has a norm between out_proj and the residual stream: set residual=false.")
        if self.heads and isinstance(getattr(block.attn, "ln_inner", None), nn.LayerNorm):
            raise UserError(f"'{name}' has a norm between the values and out_proj: set heads=false.")


def _rotate_ends(visual: Any, seed: int) -> None:
    """Let ln_pre write to the rotated stream and ln_post read from it."""
    like, width = visual.class_embedding, visual.transformer.width
    to_rotated, from_rotated = ToRotated(width, seed).to(like), FromRotated(width, seed).to(like)
    mode = visual.training
    visual.ln_pre = nn.Sequential(OrderedDict(norm=visual.ln_pre, rotation=to_rotated)).train(mode)
    visual.ln_post = nn.Sequential(OrderedDict(rotation=from_rotated, norm=visual.ln_post)).train(mode)


def _rotate_stream(block: Any, seed: int) -> None:
    """Let a block read from the rotated stream and write to it."""
    rotation = RandomHadamard(block.mlp.c_fc.in_features, seed).to(block.mlp.c_fc.weight.device)
    attn, mlp = block.attn, block.mlp
    block.ln_1 = _absorbed(block.ln_1, attn.in_proj_weight, attn.in_proj_bias)
    block.ln_2 = _absorbed(block.ln_2, mlp.c_fc.weight, mlp.c_fc.bias)
    for weight in (attn.in_proj_weight, mlp.c_fc.weight):
        weight.copy_(rotation(weight.double()))
    for scale, writer in (("ls_1", attn.out_proj), ("ls_2", mlp.c_proj)):
        layer_scale = getattr(block, scale)
        for tensor in (writer.weight, writer.bias):
            # Seen as (in_features, out_features), a bias as (1, out_features).
            rows = torch.atleast_2d(tensor.double().t())
            if isinstance(layer_scale, LayerScale):
                rows = rows * layer_scale.gamma.double()
            tensor.copy_(rotation(rows - rows.mean(dim=-1, keepdim=True)).t().reshape(tensor.shape))
        setattr(block, scale, nn.Identity().train(block.training))


def _absorbed(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> nn.RMSNorm:
    """Put the affine part of ``norm`` into the layer that reads it; returns what stays of it where means are zero."""
    if norm.bias is not None:
        bias.copy_(bias.double() + weight.double() @ norm.bias.double())
    if norm.weight is not None:
        weight.copy_(weight.double() * norm.weight.double())
    return nn.RMSNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False).train(norm.training)


def _rotate_mlp(block: Any, seed: int) -> None:
    """Rotate what c_proj reads, in the forward, and its weight back."""
    layers = OrderedDict(block.mlp.named_children())
    c_proj = layers.pop("c_proj")
    rotation = RandomHadamard(c_proj.in_features, seed).to(c_proj.weight)
    c_proj.weight.copy_(rotation(c_proj.weight.double()))
    block.mlp = nn.Sequential(OrderedDict(**layers, rotation=rotation, c_proj=c_proj)).train(block.mlp.training)


def _rotate_heads(attn: Any, seed: int) -> None:
    """Rotate the values of every head alike, and out_proj back."""
    width = attn.out_proj.in_features
    rotation = RandomHadamard(width // attn.num_heads, seed).to(attn.out_proj.weight.device)
    for values in (attn.in_proj_weight[2 * width :], attn.in_proj_bias[2 * width :]):
        rows = values.double().reshape(attn.num_heads, rotation.width, -1).transpose(1, 2)
        values.copy_(rotation(rows).transpose(1, 2).reshape(values.shape))
    outputs = attn.out_proj.weight
    outputs.copy_(rotation(outputs.double().unflatten(1, (attn.num_heads, -1))).flatten(1))
