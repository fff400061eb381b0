"""timm's attentions whose two products a module computes, in the place of the function that they call for these."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from timm.layers.attention import Attention
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class _InPlace(TorchFunctionMode):
    """Inside this context ``products`` computes what scaled_dot_product_attention is asked for."""

    def __init__(self, products: nn.Module) -> None:
        super().__init__()
        self.products = products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._attended(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)

    def _attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Return the heads' outputs (B, heads, Q, d), as torch's function takes its arguments."""
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        found: Tensor = self.products(query, key, value, attn_mask, dropout_p, scale)
        return found


class _Given:
    """An attention whose two products ``products`` computes."""

    products: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the attention of full precision returns, with its arguments."""
        with _InPlace(self.products):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class TimmAttentionOfProducts(_Given, Attention):
    """timm's attention of ViTs with products of a module."""


class EvaAttentionOfProducts(_Given, EvaAttention):
    """timm's attention of EVA towers with products of a module, behind their rotary embedding."""


class LatentPoolOfProducts(_Given, AttentionPoolLatent):
    """timm's pool of SigLIP's and PE's towers with products of a module."""


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    Attention: TimmAttentionOfProducts,
    EvaAttention: EvaAttentionOfProducts,
    AttentionPoolLatent: LatentPoolOfProducts,
}


def is_known(module: nn.Module) -> bool:
    """Return whether ``module`` is an attention of timm that ``give_products`` takes."""
    # A subclass may compute its products in another way.
    return type(module) in _KINDS


def give_products(module: Any, products: nn.Module) -> None:
    """Let ``module``, an attention of timm that ``is_known``, compute its products by ``products``, its new part."""
    module.products = products
    # The class is changed and no new module is made, so that all parts stay where they are, under their names.
    module.__class__ = _KINDS[type(module)]
    # Only this way asks torch's function for the products.
    module.fused_attn = True
