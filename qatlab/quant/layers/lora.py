"""Low-rank adapters, which are trained in the place of a frozen weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.core.domains import Count, Positive, checked
from qatlab.core.errors import UserError


class LowRank(nn.Module):
    """Holds the matrix (alpha / rank) B A, (out_features, in_features), as two factors of the given ``rank``.

    ``down`` is A (rank, in_features), drawn as nn.Linear draws its weight, kaiming_uniform(a=sqrt 5); ``up`` is
    B (out_features, rank), zero, so that the matrix starts as zero. ``scaling`` is alpha / rank (Hu et al. 2021, arXiv
    2106.09685, section 4.1). Raises UserError for a rank that is no whole number from 1 to the smaller of the two sizes
    and for an alpha that is not positive.
    """

    @checked
    def __init__(self, in_features: int, out_features: int, rank: Count, alpha: Positive) -> None:
        super().__init__()
        most = min(in_features, out_features)
        if rank > most:
            raise UserError(
                f"rank={rank}: an adapter of a layer from {in_features} to {out_features} features takes a whole number "
                f"from 1 to {most}."
            )
        self.in_features, self.out_features, self.rank, self.alpha = in_features, out_features, rank, alpha
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @property
    def scaling(self) -> float:
        """The factor alpha / rank."""
        return self.alpha / self.rank

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, alpha={self.alpha}"


class LoRA(LowRank):
    """Returns (alpha / rank) x A^T B^T, (..., in_features) to (..., out_features), to be added to a layer's output.

    QAT-LoRA (arXiv 2509.21173; LoRA of Hu et al. 2021): a term beside a frozen, quantized W, on the unquantized input.
    It cannot be merged: Q_w(W + (alpha / rank) B A) rounds the sum and multiplies Q_a(x), which is another function. At
    inference the adapter stays a float product of 2 * rank * (in + out) operations per row beside the integer product;
    qatlab's LRQAT can be merged. It keeps x, which the layer keeps anyway, and a row of ``rank`` numbers per row of x.
    """

    @checked
    def __init__(self, in_features: int, out_features: int, rank: Count = 8, alpha: Positive = 16) -> None:
        super().__init__(in_features, out_features, rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapter's term (..., out_features) of x (..., in_features), in the dtype of an nn.Linear."""
        # autocast would copy x to bfloat16 and keep the copy for the backward.
        with torch.autocast(x.device.type, enabled=False):
            low = F.linear(x, self.down.to(x.dtype))
        return F.linear(low * self.scaling, self.up)
