"""GPTQ: the grid of MinMax, with each weight's code chosen so that the layer's output, and not the weight, is near."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from qatlab.core.domains import Between, Count, OneOf, checked
from qatlab.core.errors import UserError
from qatlab.quant.quantizers.base import Bits
from qatlab.quant.quantizers.grids import OBSERVERS, Percentile
from qatlab.quant.quantizers.minmax import MinMax

BLOCK = 128  # columns after which what they leave to later ones is added to these at once


class GPTQ(MinMax):
    """Returns a weight on the grid of MinMax, in whose ``rounded`` form the errors of columns are made up by later columns.

    Frantar et al. 2023 (arXiv 2210.17323), and with ``alpha`` > 0 GPTAQ (Li et al. 2025, arXiv 2504.02692), which also makes
    up for the errors of the layer's input. The grid is that of a MinMax with the same ``per_channel``, ``group_size``,
    ``observer`` and ``percentile``, found before anything is rounded. ``round_weights`` then replaces the weight by its
    rounded form, which lies on the grid: from there on this is a MinMax.

    ``damping`` is added to the diagonal of the Hessian, as a multiple of its mean; "search" takes the one that loses least
    on every fourth image, which is left out for that. ``act_order`` rounds the columns of the largest inputs first.

    Raises UserError for activations, and for options that do not go together.
    """

    @checked
    def __init__(
        self,
        bits: Bits,
        *,
        channels: int,
        batched: bool,
        width: int | None = None,
        per_channel: bool = True,
        group_size: Count | None = None,
        observer: Annotated[str, OneOf(*OBSERVERS)] = "mse",
        percentile: Percentile = 99.99,
        damping: Annotated[float, Between(0, 10, above=True)] | Annotated[str, OneOf("search")] = "search",
        act_order: bool = True,
        alpha: Annotated[float, Between(0, 1)] = 0.0,
    ) -> None:
        if batched:
            raise UserError("GPTQ rounds weights: choose another quant/act, such as mse.")
        super().__init__(
            bits,
            channels=channels,
            batched=batched,
            width=width,
            per_channel=per_channel,
            group_size=group_size,
            observer=observer,
            percentile=percentile,
        )
        self.damping, self.act_order, self.alpha = damping, act_order, alpha

    def column_steps(self, width: int) -> Tensor:
        """Return the step of every weight, float64, (channels, ``width``)."""
        if self.group_size is None:
            return self.scale.double().reshape(-1, 1).expand(self.channels, width)
        return self.scale.double().reshape(self.channels, -1).repeat_interleave(self.group_size, dim=1)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper triangular U (n, n) with U^T U the inverse of ``hessian`` (n, n), which is positive definite."""
    # With the order of rows and columns turned round, the lower factor is an upper factor R of H = R R^T, and U = R^-1.
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    upper = lower.flip(0, 1)
    return torch.linalg.solve_triangular(
        upper, torch.eye(len(upper), dtype=upper.dtype, device=upper.device), upper=True
    )


def gptq(
    weight: Tensor,
    scale: Tensor,
    ends: tuple[int, int],
    hessian: Tensor,
    drift: Tensor | None = None,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    alpha: float = 0.0,
) -> Tensor:
    """Return ``weight`` (m, n) rounded to whole multiples of ``scale`` (m, n) between ``ends``, float64, column by column.

    With U^T U the inverse of H + damping * mean(diag H) * I, column i is rounded, and e = (w_i - q_i) / U_ii is taken from
    the later columns j as e U_ij. ``alpha`` > 0 also adds w_i P_ij to them, P = alpha * triu(D U^T, 1) U, with the ``drift`` D
    and w_i before its rounding (Li et al. 2025, Algorithm 1). ``hessian`` H and D are (n, n). An input that was always 0 gets
    weights of 0.
    """
    weight, hessian = weight.double().clone(), hessian.double().clone()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else None
    dead = hessian.diagonal() == 0
    weight[:, dead] = 0
    hessian[dead, dead] = 1
    if order is not None:
        weight, hessian, scale = weight[:, order], hessian[order][:, order], scale[:, order]
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    factor = inverse_factor(hessian)
    ahead = None
    if alpha > 0 and drift is not None:
        drift = drift.double().clone()
        drift[:, dead] = 0
        drift = drift if order is None else drift[order][:, order]
        ahead = alpha * (drift @ factor.T).triu(1) @ factor
    rounded = _rounded_columns(weight, scale.double(), ends, factor, ahead)
    if order is None:
        return rounded
    return rounded[:, torch.argsort(order)]


def _rounded_columns(
    weight: Tensor, scale: Tensor, ends: tuple[int, int], factor: Tensor, ahead: Tensor | None
) -> Tensor:
    """Return the rounded columns of ``weight`` (m, n), which is changed in place, in the order in which they stand."""
    rounded = torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        errors, before = torch.empty_like(weight[:, start:end]), torch.empty_like(weight[:, start:end])
        for i in range(start, end):
            column, step = weight[:, i], scale[:, i]
            before[:, i - start] = column
            rounded[:, i] = (column / step).round_().clamp_(*ends) * step
            error = (column - rounded[:, i]) / factor[i, i]
            errors[:, i - start] = error
            weight[:, i:end] -= torch.outer(error, factor[i, i:end])
            if ahead is not None:
                weight[:, i:end] += torch.outer(before[:, i - start], ahead[i, i:end])
        weight[:, end:] -= errors @ factor[start:end, end:]
        if ahead is not None:
            weight[:, end:] += before @ ahead[start:end, end:]
    return rounded
