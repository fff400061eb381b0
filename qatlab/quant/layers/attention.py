"""Attention that calls its projections, in the place of classes that read the weights without calling the layers.

nn.MultiheadAttention keeps its input projection as a bare Parameter and never calls ``out_proj``: a quantized layer in
that place would do nothing, without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.core.errors import UserError
from qatlab.quant.layers.products import AttentionProducts
from qatlab.quant.layers.registers import Registers
from qatlab.towers import open_clip_resnet, open_clip_vit, timm_eva
from qatlab.towers.structure import joined

# A Make takes a layer's name and the full-precision layer, and returns the layer to use: a quantized one, or the same.
Make = Callable[[str, nn.Linear], nn.Module]


class QuantAttention(nn.Module):
    """Self-attention as nn.MultiheadAttention computes it, with layers ``in_proj`` (d to 3d) and ``out_proj``.

    Built from an nn.MultiheadAttention of full name ``name``. Raises UserError for options that it does not support:
    ``kdim``/``vdim``, ``bias_k``, ``add_zero_attn``, and in the forward a key or value that is not the query.
    """

    layers = ("in_proj", "out_proj")
    products: AttentionProducts | None

    def __init__(self, source: nn.MultiheadAttention, name: str, make: Make) -> None:
        super().__init__()
        self.products = None
        if not source._qkv_same_embed_dim or source.bias_k is not None or source.add_zero_attn:
            raise UserError(_cannot(name, "kdim, vdim, add_bias_kv or add_zero_attn is set"))
        self.name = name
        self.num_heads, self.dropout, self.batch_first = source.num_heads, source.dropout, source.batch_first
        self.in_proj = make(f"{name}.in_proj", linear_of(source.in_proj_weight, source.in_proj_bias))
        self.out_proj = make(f"{name}.out_proj", linear_of(source.out_proj.weight, source.out_proj.bias))
        self.registers = source.registers if isinstance(source, RegisteredAttention) else None
        # A new module is in train mode, and the attention that it replaces may not be.
        self.train(source.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return (output, None) for one tensor given three times: (B, L, d), or (L, B, d) without ``batch_first``.

        ``attn_mask`` (L, L) or (B * heads, L, L): True forbids, a float is added to the logits.
        """
        # One packed projection serves queries, keys and values, so all three must come from the same tokens.
        if key is not query or value is not query:
            raise UserError(_cannot(self.name, "its key or value is not its query"))
        if need_weights:
            raise UserError(_cannot(self.name, "attention weights are asked for (need_weights=True)"))
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = _heads(self.in_proj(x), self.num_heads)
        mask = _additive(attn_mask, q)
        if self.registers is not None:
            k, v, mask = self.registers(k, v, mask)
        x = _attended(self.products, q, k, v, mask, self.dropout if self.training else 0.0)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None

    def extra_repr(self) -> str:
        """Return the number of heads shown by ``print(model)``."""
        return f"num_heads={self.num_heads}"


class RegisteredAttention(nn.MultiheadAttention):
    """Self-attention of an nn.MultiheadAttention, in full precision and with its Parameters, in which there are ``registers``."""

    registers: Registers

    def __init__(self, source: nn.MultiheadAttention, registers: Registers) -> None:
        # The state of the source, and no weights of its own, which would be allocated only to be replaced.
        nn.Module.__init__(self)
        self.__dict__.update(source.__dict__)
        self._parameters, self._modules = dict(source._parameters), dict(source._modules)
        self.registers = registers

    def forward(self, *tokens: Tensor, **options: Any) -> Any:  # type: ignore[override]
        """Return what ``QuantAttention`` does with layers in full precision."""
        return QuantAttention(self, "attention", lambda _, layer: layer)(*tokens, **options)


class QuantOpenClipAttention(nn.Module):
    """open_clip.transformer.Attention that calls its projections as layers; options and other names are kept."""

    layers = ("in_proj", "out_proj")
    products: AttentionProducts | None

    def __init__(self, source: Any, name: str, make: Make) -> None:
        super().__init__()
        self.products = None
        if not open_clip_vit.takes_what_is_known(source):
            raise UserError(_cannot(name, "this version of open_clip.transformer.Attention is not known"))
        self.num_heads, self.logit_scale_max = source.num_heads, source.logit_scale_max
        self.in_proj = make(f"{name}.in_proj", linear_of(source.in_proj_weight, source.in_proj_bias))
        self.ln_q, self.ln_k, self.ln_inner = source.ln_q, source.ln_k, source.ln_inner
        self.logit_scale, self.head_scale = source.logit_scale, source.head_scale
        self.attn_drop, self.out_drop = source.attn_drop, source.out_drop
        self.out_proj = make(f"{name}.out_proj", source.out_proj)
        self.train(source.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Return the output (B, L, d) for x (B, L, d); ``attn_mask`` is that of QuantAttention."""
        q, k, v = _heads(self.in_proj(x), self.num_heads)
        mask = _additive(attn_mask, q)
        if self.logit_scale is not None:
            # Swin V2's cosine attention. In open_clip 3.3 this branch raises an error, because it gives tensors of four
            # dimensions to torch.bmm, which takes three.
            temperature = self.logit_scale.clamp(max=self.logit_scale_max).exp()
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            if self.products is not None:
                x = self.products(q, k, v, mask, self.attn_drop.p if self.training else 0.0, temperature)
            else:
                logits = q @ k.transpose(-1, -2) * temperature
                x = self.attn_drop((logits if mask is None else logits + mask).softmax(dim=-1)) @ v
        else:
            x = _attended(
                self.products, self.ln_q(q), self.ln_k(k), v, mask, self.attn_drop.p if self.training else 0.0
            )
        if self.head_scale is not None:
            x = x * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(x.transpose(1, 2).flatten(2))))

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        bound = "" if self.logit_scale is None else f", logit_scale_max={self.logit_scale_max}"
        return f"num_heads={self.num_heads}{bound}"


class QuantCrossAttention(nn.Module):
    """Attention of queries to other tokens, as nn.MultiheadAttention computes it, with a layer for each of its projections.

    Built from an nn.MultiheadAttention of full name ``name``, whose keys and values are of any width. Where it holds its
    projections as one weight (3d, d), the layers have copies of the three parts. Raises UserError for ``bias_k`` and
    ``add_zero_attn``, and in the forward for a mask.
    """

    layers = ("q_proj", "k_proj", "v_proj", "out_proj")
    products: AttentionProducts | None
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(self, source: nn.MultiheadAttention, name: str, make: Make) -> None:
        super().__init__()
        self.products = None
        if source.bias_k is not None or source.add_zero_attn:
            raise UserError(_cannot(name, "add_bias_kv or add_zero_attn is set"))
        self.name = name
        self.num_heads, self.dropout, self.batch_first = source.num_heads, source.dropout, source.batch_first
        for part, layer in zip(("q_proj", "k_proj", "v_proj"), _three_projections(source), strict=True):
            setattr(self, part, make(f"{name}.{part}", layer))
        self.out_proj = make(f"{name}.out_proj", linear_of(source.out_proj.weight, source.out_proj.bias))
        self.train(source.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return (output, None), (B, Q, d), for queries (B, Q, d), keys and values (B, L, ...); L first without ``batch_first``."""
        if need_weights or attn_mask is not None:
            raise UserError(_cannot(self.name, "attention weights are asked for, or a mask is given"))
        tokens = [x if self.batch_first else x.transpose(0, 1) for x in (query, key, value)]
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (_split(layer(x), self.num_heads) for layer, x in zip(layers, tokens, strict=True))
        x = _attended(self.products, q, k, v, None, self.dropout if self.training else 0.0)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None

    def extra_repr(self) -> str:
        """Return the number of heads shown by ``print(model)``."""
        return f"num_heads={self.num_heads}"


class QuantAttentionPool(nn.Module):
    """open_clip.modified_resnet.AttentionPool2d with its four projections as layers that are called, under their own names."""

    layers = ("k_proj", "q_proj", "v_proj", "c_proj")
    products: AttentionProducts | None
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    c_proj: nn.Module

    def __init__(self, source: Any, name: str, make: Make) -> None:
        super().__init__()
        self.products = None
        self.num_heads, self.positional_embedding = source.num_heads, source.positional_embedding
        for part in self.layers:
            setattr(self, part, make(f"{name}.{part}", getattr(source, part)))
        self.train(source.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return one feature (B, output width) of each map x (B, width, H, W): what the mean of its pixels attends to."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)
        # Only the feature of the mean is returned, so no other token has a query.
        q, k, v = (_split(part, self.num_heads) for part in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)))
        return self.c_proj(_attended(self.products, q, k, v).transpose(1, 2).flatten(2))[:, 0]

    def extra_repr(self) -> str:
        """Return the number of heads shown by ``print(model)``."""
        return f"num_heads={self.num_heads}"


StandIn = type[QuantAttention] | type[QuantOpenClipAttention] | type[QuantCrossAttention] | type[QuantAttentionPool]


def stand_in(module: nn.Module, owner: nn.Module) -> StandIn | None:
    """Return the class that replaces ``module``, a child of ``owner``, or None where it is no attention to be replaced.

    An attention needs a replacement if it reads the weights of its projections without calling these layers. Instances are
    made as ``QuantAttention`` is; ``layers`` are the names of the projections in them.
    """
    if isinstance(module, nn.MultiheadAttention):
        return QuantCrossAttention if open_clip_vit.is_pooler(owner) else QuantAttention
    if open_clip_resnet.is_pool(module):
        return QuantAttentionPool
    return QuantOpenClipAttention if open_clip_vit.is_attention(module) else None


@contextmanager
def calling(model: nn.Module) -> Iterator[nn.Module]:
    """Inside this context every attention in ``model`` calls the layers of its projections, so that hooks on them run."""
    timm_eva.call_projections(model)
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for owner_name, owner in list(model.named_modules()):
            for attribute, module in list(owner.named_children()):
                kind = stand_in(module, owner)
                if kind is not None:
                    replaced.append((owner, attribute, module))
                    # With layers in full precision it computes the same output.
                    setattr(owner, attribute, kind(module, joined(owner_name, attribute), lambda _, layer: layer))
        yield model
    finally:
        for owner, attribute, module in replaced:
            setattr(owner, attribute, module)


def _three_projections(source: nn.MultiheadAttention) -> list[nn.Linear]:
    """Return the projections of queries, keys and values as layers."""
    biases: Any = [None] * 3 if source.in_proj_bias is None else source.in_proj_bias.detach().chunk(3)
    if source._qkv_same_embed_dim:
        weights = [nn.Parameter(part.clone()) for part in source.in_proj_weight.detach().chunk(3)]
    else:
        weights = [source.q_proj_weight, source.k_proj_weight, source.v_proj_weight]
    return [
        linear_of(weight, None if bias is None else nn.Parameter(bias.clone()))
        for weight, bias in zip(weights, biases, strict=True)
    ]


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return an nn.Linear that holds these very Parameters, weight (out, in) and bias (out,) or None."""
    # On the meta device no weight is allocated and drawn only to be replaced.
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear


def _heads(packed: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Return queries, keys and values, each (B, heads, L, d / heads), from ``packed`` (B, L, 3d) in this order."""
    return packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _split(x: Tensor, heads: int) -> Tensor:
    """Return x (B, L, d) as (B, heads, L, d / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attended(
    products: AttentionProducts | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return the heads' outputs (B, heads, Q, d): by ``products``, or by torch's function where these are not quantized."""
    if products is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return products(q, k, v, mask, dropout, None)


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return ``mask`` as floats to add to the logits, broadcastable to (B, heads, L, L)."""
    if mask is None:
        return None
    # True forbids in nn.MultiheadAttention and allows in
    # scaled_dot_product_attention, but added floats are the same in both.
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    # A mask of three dimensions is (B * heads, L, L), one for each head of each image.
    return mask.to(q.dtype).reshape(q.shape[0], q.shape[1], *mask.shape[1:]) if mask.ndim == 3 else mask.to(q.dtype)


def _cannot(name: str, reason: str) -> str:
    return (
        f"the attention '{name}' cannot be quantized: {reason}. "
        f"Leave it in full precision with '+quant.rules={{{name}.*: null}}'."
    )
