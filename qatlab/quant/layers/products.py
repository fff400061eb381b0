"""The two products of attention, QK^T and PV, with quantized operands."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.core.domains import OneOf, checked
from qatlab.core.errors import UserError
from qatlab.quant.quantizers.base import Bits
from qatlab.quant.quantizers.grids import OBSERVERS
from qatlab.quant.quantizers.logarithmic import LogQuantizer
from qatlab.quant.quantizers.minmax import MinMax

OPERANDS = ("query", "key", "value", "softmax")
PER_HEAD = ("absmax", "ema")
SOFTMAX = ("uniform", "log_sqrt2", "adalog")


class AttentionProducts(nn.Module):
    """Returns Q(softmax(Q(q) Q(k)^T / sqrt(d))) Q(v), with a static grid of ``bits`` for each of the four operands.

    Queries, keys and values are rounded as activations are: by ``observer``, with a zero point unless ``symmetric``. The
    attention weights that the softmax gives are rounded on an even grid from 0 to the largest weight seen ("uniform"),
    or by their logarithm (``LogQuantizer``): to powers of the square root of 2 ("log_sqrt2") or of a base that is
    searched ("adalog"). With ``per_head`` each of the ``heads`` has grids of its own. Where a mask forbids a token its
    weight stays 0. Without rounding, ``rounds`` False, the result is that of scaled_dot_product_attention up to the
    order of sums. Raises UserError for options that do not go together.
    """

    @checked
    def __init__(
        self,
        bits: Bits,
        *,
        heads: int,
        softmax: Annotated[str, OneOf(*SOFTMAX)] = "uniform",
        per_head: bool = False,
        symmetric: bool = False,
        observer: Annotated[str, OneOf(*OBSERVERS)] = "absmax",
    ) -> None:
        super().__init__()
        if per_head and observer not in PER_HEAD:
            raise UserError(
                f"quant.attention.observer={observer} gives one grid per tensor: with per_head=true it is {' or '.join(PER_HEAD)}."
            )
        self.bits, self.per_head, self.softmax = bits, per_head, softmax
        self.rounds = True
        grid = partial(MinMax, bits, channels=heads, batched=True, per_channel=per_head)
        for operand in ("query", "key", "value"):
            setattr(self, f"{operand}_quantizer", grid(symmetric=symmetric, observer=observer))
        if softmax == "uniform":
            self.softmax_quantizer: nn.Module = grid(symmetric=False)
        else:
            self.softmax_quantizer = LogQuantizer(
                bits, channels=heads, per_channel=per_head, searched=softmax == "adalog"
            )

    @property
    def quantizers(self) -> dict[str, MinMax | LogQuantizer]:
        """The quantizers by the OPERANDS that they round."""
        return {operand: getattr(self, f"{operand}_quantizer") for operand in OPERANDS}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        scale: float | Tensor | None,
    ) -> Tensor:
        """Return the heads' outputs (B, heads, Q, d) for queries (B, heads, Q, d), keys and values (B, heads, L, d).

        ``mask``, broadcastable to (B, heads, Q, L), is added to the logits; one of bool allows where it is True.
        ``dropout`` is the share of weights that are set to 0, ``scale`` multiplies the logits in the place of 1 / sqrt(d).
        """
        if not self.rounds:
            return F.dropout(self.weights(query, key, mask, scale), dropout) @ value
        weights = self.weights(self.rounded("query", query), self.rounded("key", key), mask, scale)
        weights = self.rounded("softmax", weights)
        if mask is not None:
            # No logarithm reaches 0: without this a token would see what its mask hides.
            weights = weights.masked_fill(_forbidden(mask), 0)
        return F.dropout(weights, dropout) @ self.rounded("value", value)

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | Tensor | None) -> Tensor:
        """Return the attention weights (B, heads, Q, L) of queries and keys as they are, (B, heads, Q or L, d)."""
        logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
        return logits.softmax(-1)

    def rounded(self, operand: str, x: Tensor) -> Tensor:
        """Return x (B, heads, ., .) rounded as the ``operand`` is."""
        quantizer = self.quantizers[operand]
        return quantizer(x.movedim(1, -1)).movedim(-1, 1) if self.per_head else quantizer(x)

    def observe(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | Tensor | None
    ) -> None:
        """Show the operands of a forward in full precision, of its shapes, to the quantizers."""
        seen = (query, key, value, self.weights(query, key, mask, scale))
        for quantizer, x in zip(self.quantizers.values(), seen, strict=True):
            quantizer.observe(x.movedim(1, -1) if self.per_head else x)

    def fit(self) -> None:
        """Set all grids from what was observed."""
        for quantizer in self.quantizers.values():
            quantizer.fit()

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        return f"bits={self.bits}, softmax={self.softmax}, per_head={self.per_head}"


def _forbidden(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask.isneginf()
