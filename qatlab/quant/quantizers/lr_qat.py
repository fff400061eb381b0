"""LR-QAT: a frozen weight with a low-rank adapter inside the rounding, which merges into integers exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qatlab.core.domains import Count, Positive, checked
from qatlab.core.errors import UserError
from qatlab.quant.layers.lora import LowRank
from qatlab.quant.quantizers.base import Bits
from qatlab.quant.quantizers.grids import Percentile
from qatlab.quant.quantizers.kernels import widened
from qatlab.quant.quantizers.lsq import LSQ, Init

# Elements of the weight that a CPU computes together, so that the temporaries between two passes stay in its cache.
PIECE = 2**17


class LRQAT(LSQ):
    """Returns s * clip(round(W / s0 + (alpha / rank) A B), qmin, qmax) of a frozen weight W (arXiv 2406.06385).

    Source: Bondarenko 2024. A (channels, rank), zero at first, B (rank, ``width``) and the step s are learned; s0 is
    the scale that calibration
    found, where s starts. ``init``, ``percentile`` and ``log_scale`` are LSQ's. W / s0 is computed anew each time and
    not stored. With v the sum inside the rounding: strictly inside the range the gradient passes to A and B, at and
    beyond its ends it is zero, as in LSQ; ds is the code, because v does not depend on s, and has no constant factor.
    The authors' code (Qualcomm-AI-research/lr-qat) masks on round(v), both ends included.

    A and B count in steps of the grid, not in units of W, so they need another learning rate than LoRA: the authors
    take 1e-3 for A and B and 1e-5 for scales, rank 32 and alpha 1. ``width`` is the number of weights per channel.
    ``merge`` makes plain quantized layers of trained ones. Raises UserError for activations and for what LSQ and
    LowRank refuse.
    """

    start: Tensor

    @checked
    def __init__(
        self,
        bits: Bits,
        *,
        channels: int,
        batched: bool,
        width: int,
        per_channel: bool = True,
        rank: Count = 32,
        alpha: Positive = 1,
        init: Init = "absmax",
        percentile: Percentile = 99.99,
        log_scale: bool = True,
    ) -> None:
        if batched:
            raise UserError("LRQAT learns the codes of a weight: choose another quantizer for activations.")
        super().__init__(
            bits,
            channels=channels,
            batched=batched,
            per_channel=per_channel,
            init=init,
            percentile=percentile,
            log_scale=log_scale,
        )
        self.low_rank = LowRank(width, channels, rank, alpha)
        self.register_buffer("start", self._empty_scale())

    @torch.no_grad()
    def store_scale(self, scale: Tensor) -> None:
        """Store ``scale``, () or (channels, 1), as s0 and as the new s, in place."""
        super().store_scale(scale)
        # s0 must equal s, so it is read back: the stored exp(log s) may differ from ``scale`` in the last bit.
        self.start.copy_(self.scale)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return the rounded twin of the weight x, (channels, ...) or (channels, width), in its shape."""
        ends, low_rank, rows = (self.qmin, self.qmax), self.low_rank, x.reshape(self.channels, -1)
        factors = low_rank.up, low_rank.down, low_rank.scaling
        return _RoundedSum.apply(rows, self.start, self.scale, ends, *factors).view(x.shape)

    def _codes(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        low_rank = self.low_rank
        with torch.no_grad():
            v = _sum(rows.reshape(self.channels, -1), self.start, low_rank.up, low_rank.down, low_rank.scaling)
        return v.round_().clamp_(self.qmin, self.qmax).to(dtype)


class _RoundedSum(torch.autograd.Function):
    """LRQAT's forward and backward for rows (channels, n); it saves its inputs only and computes the rest again.

    Both go over some rows at a time (``_pieces``).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        start: Tensor,
        scale: Tensor,
        ends: tuple[int, int],
        up: Tensor,
        down: Tensor,
        scaling: float,
    ) -> Tensor:
        """Return the quantized ``rows`` (channels, n), in their dtype."""
        ctx.save_for_backward(rows, start, scale, up, down)
        ctx.constants = ends, scaling
        result = torch.empty_like(rows)
        for piece in _pieces(rows):
            v = _sum(rows[piece], _of(start, piece), up[piece], down, scaling)
            result[piece] = v.round_().clamp_(*ends).mul_(_of(scale, piece))
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients to the inputs of ``forward``, given that of its result, (channels, n)."""
        rows, start, scale, up, down = ctx.saved_tensors
        ends, scaling = ctx.constants
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        grad_up, grad_down = torch.empty_like(up), torch.zeros_like(down, dtype=_wide(rows))
        grad_scale = torch.empty(len(rows), 1, dtype=_wide(rows), device=rows.device)
        for piece in _pieces(rows):
            v = _sum(rows[piece], _of(start, piece), up[piece], down, scaling)
            part = grad[piece].to(v.dtype)
            # The gradient of clip(round(v)) * s to v is s strictly inside the range, and 0 at its ends and beyond.
            grad_v = torch.ops.aten.hardtanh_backward(part * _of(scale, piece), v, *ends)
            with torch.autocast(rows.device.type, enabled=False):
                # A has one row for each of these rows, but B is shared
                # by all rows, so its gradient is a sum over all pieces.
                grad_up[piece] = (grad_v @ down.to(v.dtype).T).mul_(scaling)
                grad_down.addmm_(up[piece].to(v.dtype).T, grad_v, alpha=scaling)
            # The result is code * s and v does not depend on s, so the gradient of s is the code.
            grad_scale[piece] = v.round_().clamp_(*ends).mul_(part).sum(1, keepdim=True)
            if grad_rows is not None:
                # v is W / s0 plus the adapter's part. The division may be in place, because grad_v is not needed again.
                grad_rows[piece] = grad_v.div_(_of(start, piece))
        of_scale = (grad_scale if scale.ndim else grad_scale.sum()).to(scale.dtype)
        return grad_rows, None, of_scale, None, grad_up, grad_down.to(down.dtype), None


def _pieces(rows: Tensor) -> Iterator[slice]:
    step = max(1, PIECE // max(1, rows.shape[1])) if rows.device.type == "cpu" else len(rows)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _of(scale: Tensor, piece: slice) -> Tensor:
    """Return the scales of the rows in ``piece``: of (channels, 1) those rows, of () the one scale."""
    return scale[piece] if scale.ndim else scale


def _wide(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _sum(rows: Tensor, start: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
    """Return W / s0 + scaling * A B (n, width) in a new tensor, float32 or wider."""
    v = torch.div(widened(rows), start)
    # autocast would compute in bfloat16, whose neighbouring values are up to half a step of the grid apart.
    with torch.autocast(rows.device.type, enabled=False):
        return v.addmm_(up.to(v.dtype), down.to(v.dtype), alpha=scaling)
