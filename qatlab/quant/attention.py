"""Attention with projections that are called, in the place of classes that read their weights without calling them.

nn.MultiheadAttention keeps its input projection as a bare Parameter and never calls ``out_proj``: a quantized layer put
there does nothing, without an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from open_clip.transformer import Attention as OpenClipAttention
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.errors import UserError

# Given a layer's name and the full-precision layer, returns the layer to use: quantized, or the same.
Make = Callable[[str, nn.Linear], nn.Module]


class QuantAttention(nn.Module):
    """Self-attention as nn.MultiheadAttention computes it, with layers ``in_proj`` (d to 3d) and ``out_proj``.

    Built from an nn.MultiheadAttention of full name ``name``. Raises UserError for what it cannot stand in for:
    ``kdim``/``vdim``, ``bias_k``, ``add_zero_attn``, and in the forward a key or value that is not the query.
    """

    def __init__(self, source: nn.MultiheadAttention, name: str, make: Make) -> None:
        super().__init__()
        if not source._qkv_same_embed_dim or source.bias_k is not None or source.add_zero_attn:
            raise UserError(_cannot(name, "kdim, vdim, add_bias_kv or add_zero_attn is set"))
        self.name = name
        self.num_heads, self.dropout, self.batch_first = source.num_heads, source.dropout, source.batch_first
        self.in_proj = make(f"{name}.in_proj", linear_of(source.in_proj_weight, source.in_proj_bias))
        self.out_proj = make(f"{name}.out_proj", linear_of(source.out_proj.weight, source.out_proj.bias))
        self.train(source.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return (output, None) for one tensor given three times: (B, L, d), or (L, B, d) without ``batch_first``.

        ``attn_mask`` (L, L) or (B * heads, L, L): True forbids, a float is added to the logits.
        """
        if key is not query or value is not query:
            raise UserError(_cannot(self.name, "its key or value is not its query"))
        if need_weights:
            raise UserError(_cannot(self.name, "attention weights are asked for (need_weights=True)"))
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = _heads(self.in_proj(x), self.num_heads)
        mask = _additive(attn_mask, q)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None


class QuantOpenClipAttention(nn.Module):
    """open_clip.transformer.Attention with its projections as layers; all of its options and other names are kept."""

    def __init__(self, source: OpenClipAttention, name: str, make: Make) -> None:
        super().__init__()
        if list(inspect.signature(source.forward).parameters) != ["x", "attn_mask"]:
            raise UserError(_cannot(name, "this version of open_clip.transformer.Attention is not known"))
        self.num_heads, self.logit_scale_max = source.num_heads, source.logit_scale_max
        self.in_proj = make(f"{name}.in_proj", linear_of(source.in_proj_weight, source.in_proj_bias))
        self.ln_q, self.ln_k, self.ln_inner = source.ln_q, source.ln_k, source.ln_inner
        self.logit_scale, self.head_scale = source.logit_scale, source.head_scale
        self.attn_drop, self.out_drop = source.attn_drop, source.out_drop
        self.out_proj = make(f"{name}.out_proj", source.out_proj)
        self.train(source.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Return the output (B, L, d) for x (B, L, d); masks as in QuantAttention."""
        q, k, v = _heads(self.in_proj(x), self.num_heads)
        mask = _additive(attn_mask, q)
        if self.logit_scale is not None:
            # Swin V2's cosine attention; open_clip 3.3 itself stops here, it multiplies four dimensions by torch.bmm.
            temperature = self.logit_scale.clamp(max=self.logit_scale_max).exp()
            logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * temperature
            x = self.attn_drop((logits if mask is None else logits + mask).softmax(dim=-1)) @ v
        else:
            dropout = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, attn_mask=mask, dropout_p=dropout)
        if self.head_scale is not None:
            x = x * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(x.transpose(1, 2).flatten(2))))


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return an nn.Linear that holds these very Parameters, weight (out, in) and bias (out,) or None."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear


def _heads(packed: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(B, L, 3d), queries then keys then values, to three (B, heads, L, d / heads)."""
    return packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as a float to add, broadcastable to (B, heads, L, L): SDPA reads a bool the other way round."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    return mask.to(q.dtype).reshape(q.shape[0], q.shape[1], *mask.shape[1:]) if mask.ndim == 3 else mask.to(q.dtype)


def _cannot(name: str, reason: str) -> str:
    return (
        f"the attention '{name}' cannot be quantized: {reason}. "
        f"Leave it in full precision with '+quant.rules={{{name}.*: null}}'."
    )
