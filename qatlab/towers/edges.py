"""Where a factor of each input channel can go: between the layers that read an input and what makes that input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, GluMlp, Mlp, RmsNorm, SwiGLU
from timm.models.eva import AttentionRope, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from qatlab.towers import hugging_face, open_clip_vit
from qatlab.towers.structure import Block, Place, joined, place

# A block reads the residual stream twice, through a norm each time, and adds an attention and an mlp to it. A post-norm block
# has its norms behind these, so nothing stands before them that could take a factor.
PRE_NORM = (TimmBlock, EvaBlock, RelPosBlock, SwinTransformerBlock)
ATTENTIONS = (TimmAttention, EvaAttention, AttentionRope, RelPosAttention, WindowAttention)
MLPS = (Mlp, GluMlp, SwiGLU, GeGluMlp)


class ChannelScale(nn.Module):
    """Returns x * factor, x (..., channels), in x's dtype; the factor is 1 / s, which no earlier tensor can take."""

    factor: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., channels) with each channel multiplied by its factor, in its shape and dtype."""
        return (x * self.factor).to(x.dtype)


@dataclass(frozen=True)
class Reader:
    """A layer called ``name`` in the model, whose ``weight`` (out, in) or (out, in, kH, kW) reads the input of an edge."""

    name: str
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Edge:
    """An input, the layers that read it, and what makes it.

    ``group`` is in_proj, out_proj, c_fc or c_proj, as open_clip names these layers, or conv. Each channel of the input is
    divided by dividing the rows of ``makers`` (in, ...): the weight and bias of a norm, or the rows of a layer. Where an
    activation function makes the input, a ChannelScale is put at ``slot``: into an nn.Sequential before what lies there, or
    in the place of an nn.Identity.
    """

    group: str
    readers: tuple[Reader, ...]
    makers: tuple[Tensor, ...] = ()
    slot: Place | None = None


def edges_of(visual: nn.Module) -> list[Edge]:
    """Return the edges of all transformer blocks and pools in ``visual`` whose form is known, in the model's order."""
    found: list[Edge] = []
    for block in open_clip_vit.blocks_of(visual):
        found += _open_clip(block)
    for name, module in visual.named_modules():
        if isinstance(module, PRE_NORM):
            found += [*_reading(module.norm1, module, "attn", name), *_inside(module.attn, joined(name, "attn"))]
            found += [*_reading(module.norm2, module, "mlp", name), *_inside(module.mlp, joined(name, "mlp"))]
        elif isinstance(module, EvaBlockPostNorm):
            found += [*_inside(module.attn, joined(name, "attn")), *_inside(module.mlp, joined(name, "mlp"))]
        elif isinstance(module, AttentionPoolLatent):
            found += _pool(module, name)
    for group, layers, makers in hugging_face.readings(visual):
        found.append(Edge(group, tuple(Reader(name, layer.weight) for name, layer in layers.items()), makers))
    return found


def _open_clip(block: Block) -> Iterator[Edge]:
    """Yield the edges of one of open_clip's blocks, whose attention is not quantized."""
    projections = block.projections
    if projections is None or not isinstance(block.fc2.part, nn.Linear):
        return
    attention = block.attention.name
    norm = affine(block.norm_1.part)
    if norm:
        yield Edge("in_proj", (Reader(f"{attention}.in_proj", projections.in_weight),), norm)
    inner = projections.inner_norm
    values = affine(inner) if inner is not None else values_of(projections.in_weight, projections.in_bias)
    if inner is None and projections.own_values is not None:
        values = (*values, projections.own_values)
    if values:
        yield Edge("out_proj", (Reader(f"{attention}.out_proj", projections.out.weight),), values)
    norm = affine(block.norm_2.part)
    if norm:
        yield Edge("c_fc", (Reader(block.fc1.name, block.fc1.part.weight),), norm)
    yield Edge("c_proj", (Reader(block.fc2.name, block.fc2.part.weight),), slot=block.fc2)


def _reading(norm: nn.Module, block: nn.Module, part: str, name: str) -> Iterator[Edge]:
    """Yield the edge between a norm of ``block``, which is called ``name``, and the first layers of the ``part`` behind it."""
    module = block.get_submodule(part)
    # An mlp of ViTamin has a norm of its own, and that of the block is an nn.Identity.
    norm = module.norm if isinstance(module, GeGluMlp) else norm
    makers = affine(norm)
    readers = tuple(reader_of(module, layer, joined(name, part)) for layer in first_layers(module))
    if makers and readers:
        yield Edge("in_proj" if part == "attn" else "c_fc", readers, makers)


def first_layers(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers in one of timm's attentions or mlps that read its input; none for a form not known."""
    if isinstance(module, ATTENTIONS):
        names = ("qkv", "q_proj", "k_proj", "v_proj", "gate")
    elif isinstance(module, MLPS):
        names = ("fc1", "fc1_g", "fc1_x", "w0", "w1")
    else:
        return ()
    return tuple(part for part in names if isinstance(getattr(module, part, None), nn.Linear))


def _inside(module: Any, name: str) -> Iterator[Edge]:
    """Yield the edge before the last layer of an attention or an mlp called ``name``."""
    if isinstance(module, ATTENTIONS):
        # A gate multiplies channel by channel, so a factor passes it.
        inner = getattr(module, "norm", None)
        makers = affine(inner) if is_norm(inner) else _attention_values(module)
        if makers and isinstance(module.proj, nn.Linear):
            yield Edge("out_proj", (reader_of(module, "proj", name),), makers)
    elif isinstance(module, MLPS):
        yield from before_last(module, name)


def before_last(mlp: Any, name: str) -> Iterator[Edge]:
    """Yield the edge before the last layer of an mlp: behind a norm, a product with a gate, or an activation function."""
    last = "w2" if isinstance(mlp, GeGluMlp) else "fc2"
    # The norm of a GeGluMlp lies before its first layers.
    inner = None if isinstance(mlp, GeGluMlp) else mlp.norm
    if not isinstance(getattr(mlp, last), nn.Linear):
        return
    readers = (reader_of(mlp, last, name),)
    if is_norm(inner):
        makers = affine(inner)
        if makers:
            yield Edge("c_proj", readers, makers)
    elif isinstance(mlp, GeGluMlp):
        yield Edge("c_proj", readers, rows_of(mlp.w1))
    elif isinstance(mlp, SwiGLU):
        yield Edge("c_proj", readers, rows_of(mlp.fc1_x))
    elif isinstance(mlp, GluMlp) and isinstance(mlp.fc1, nn.Linear):
        # One layer makes the gate and what it multiplies, in halves.
        half = mlp.fc1.out_features // 2
        part = slice(0, half) if mlp.gate_last else slice(half, None)
        yield Edge("c_proj", readers, tuple(tensor[part] for tensor in rows_of(mlp.fc1)))
    elif isinstance(mlp, Mlp):
        yield Edge("c_proj", readers, slot=place(mlp, "norm", name))


def _pool(pool: AttentionPoolLatent, name: str) -> Iterator[Edge]:
    """Yield the edges inside an attention that pools tokens, whose own input is read by nothing else that is known."""
    if isinstance(pool.proj, nn.Linear) and isinstance(pool.kv, nn.Linear):
        yield Edge("out_proj", (reader_of(pool, "proj", name),), values_of(pool.kv.weight, pool.kv.bias, parts=2))
    if pool.mlp is not None:
        yield from _reading(pool.norm, pool, "mlp", name)
        yield from _inside(pool.mlp, joined(name, "mlp"))


def _attention_values(attention: Any) -> tuple[Tensor, ...]:
    """Return the rows of the weight and of the bias that make the values of one of timm's attentions."""
    if isinstance(getattr(attention, "v_proj", None), nn.Linear):
        # With fewer heads for the values than for the queries, a row makes several channels of the output.
        same = attention.v_proj.out_features == attention.proj.in_features
        return rows_of(attention.v_proj) if same else ()
    if not isinstance(attention.qkv, nn.Linear):
        return ()
    separate = getattr(attention, "v_bias", None)
    return values_of(attention.qkv.weight, attention.qkv.bias) + (() if separate is None else (separate,))


def values_of(weight: Tensor, bias: Tensor | None, parts: int = 3) -> tuple[Tensor, ...]:
    """Return the last of ``parts`` equal parts of a weight's rows and of its bias: the values after queries and keys."""
    rows = len(weight) // parts
    return tuple(tensor[-rows:] for tensor in (weight, bias) if tensor is not None)


def rows_of(layer: Any) -> tuple[Tensor, ...]:
    """Return the weight and the bias of a layer, whose rows make the channels of its output."""
    return tuple(tensor for tensor in (layer.weight, layer.bias) if tensor is not None)


def is_norm(module: nn.Module | None) -> bool:
    """Return whether something that may change tokens stands at the place of a norm."""
    return module is not None and not isinstance(module, (nn.Identity, ChannelScale))


def affine(norm: nn.Module | None) -> tuple[Tensor, ...]:
    """Return the weight and bias of a norm that multiplies and adds channel by channel; none where it has no weight."""
    if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm, RmsNorm)) or norm.weight is None:
        return ()
    bias = getattr(norm, "bias", None)
    return (norm.weight,) if bias is None else (norm.weight, bias)


def reader_of(owner: nn.Module, path: str, name: str) -> Reader:
    """Return the layer at ``path`` below ``owner``, whose own name in the model is ``name``."""
    weight: Any = owner.get_submodule(path).weight
    return Reader(joined(name, path), weight)
