"""LR-QAT: a frozen weight with a low-rank adapter inside the rounding, which merges into integers exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qatlab.errors import UserError
from qatlab.quant.kernels import widened
from qatlab.quant.layers import QuantLayer, quant_layers
from qatlab.quant.lora import LowRank
from qatlab.quant.lsq import LSQ
from qatlab.quant.minmax import MinMax

# Elements of the weight that are looked at together on a CPU.
PIECE = 2**17


class LRQAT(LSQ):
    """Returns s * clip(round(W / s0 + (alpha / rank) A B), qmin, qmax) of a frozen weight W (Bondarenko 2024, arXiv 2406.06385).

    A (channels, rank), zero at first, B (rank, ``width``) and the step s are learned; s0 is the scale that calibration
    found, where s starts. ``init``, ``percentile`` and ``log_scale`` are LSQ's. W / s0 is computed anew each time and
    not stored. With v the sum inside the rounding: strictly inside the range the gradient passes to A and B, at and
    beyond its ends it is zero, as in LSQ; ds is the code, because v does not depend on s, and has no constant factor.
    The authors' code (Qualcomm-AI-research/lr-qat) masks on round(v), both ends included.

    A and B count in steps of the grid, not in units of W, so that LoRA's learning rate is not theirs: the authors take
    1e-3 for them and 1e-5 for scales, rank 32 and alpha 1. ``width`` is the number of weights per channel. ``merge``
    makes plain quantized layers of trained ones. Raises UserError for activations and what LSQ and LowRank refuse.
    """

    start: Tensor

    def __init__(
        self,
        bits: int,
        *,
        channels: int,
        batched: bool,
        width: int,
        per_channel: bool = True,
        rank: int = 32,
        alpha: float = 1,
        init: str = "absmax",
        percentile: float = 99.99,
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
        """Take ``scale`` as s0 and as the new s, in place."""
        super().store_scale(scale)
        self.start.copy_(self.scale)  # not ``scale``: exp(log s) may differ from it in the last bit

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return the rounded twin of the weight x, in its shape."""
        ends, low_rank, rows = (self.qmin, self.qmax), self.low_rank, x.reshape(self.channels, -1)
        factors = low_rank.up, low_rank.down, low_rank.scaling
        return _RoundedSum.apply(rows, self.start, self.scale, ends, *factors).view(x.shape)

    def _codes(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        low_rank = self.low_rank
        with torch.no_grad():
            v = _sum(rows.reshape(self.channels, -1), self.start, low_rank.up, low_rank.down, low_rank.scaling)
        return v.round_().clamp_(self.qmin, self.qmax).to(dtype)


class _RoundedSum(torch.autograd.Function):
    """LRQAT's forward and backward for rows (channels, n); saves its inputs only and recomputes the rest.

    Some rows at a time: what lies between two passes over them stays in a core's cache.
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
        rows, start, scale, up, down = ctx.saved_tensors
        ends, scaling = ctx.constants
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        grad_up, grad_down = torch.empty_like(up), torch.zeros_like(down, dtype=_wide(rows))
        grad_scale = torch.empty(len(rows), 1, dtype=_wide(rows), device=rows.device)
        for piece in _pieces(rows):
            v = _sum(rows[piece], _of(start, piece), up[piece], down, scaling)
            part = grad[piece].to(v.dtype)
            grad_v = torch.ops.aten.hardtanh_backward(part * _of(scale, piece), v, *ends)  # 0 at the ends and beyond
            with torch.autocast(rows.device.type, enabled=False):
                grad_up[piece] = (grad_v @ down.to(v.dtype).T).mul_(scaling)
                grad_down.addmm_(up[piece].to(v.dtype).T, grad_v, alpha=scaling)
            grad_scale[piece] = v.round_().clamp_(*ends).mul_(part).sum(1, keepdim=True)
            if grad_rows is not None:
                grad_rows[piece] = grad_v.div_(_of(start, piece))
        of_scale = (grad_scale if scale.ndim else grad_scale.sum()).to(scale.dtype)
        return grad_rows, None, of_scale, None, grad_up, grad_down.to(down.dtype), None


def _pieces(rows: Tensor) -> Iterator[slice]:
    step = max(1, PIECE // max(1, rows.shape[1])) if rows.device.type == "cpu" else len(rows)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _of(scale: Tensor, piece: slice) -> Tensor:
    return scale[piece] if scale.ndim else scale


def _wide(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _sum(rows: Tensor, start: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
    """Return W / s0 + scaling * A B, in float32 or wider, a tensor of its own."""
    v = torch.div(widened(rows), start)
    with torch.autocast(rows.device.type, enabled=False):
        return v.addmm_(up.to(v.dtype), down.to(v.dtype), alpha=scaling)


def merge(model: nn.Module) -> nn.Module:
    """Return ``model`` with every LRQAT merged in place: the weight is put on its grid, under a MinMax of the same scale.

    The outputs stay equal bit for bit on the machine that merges, and ``codes`` are the trained integers. The state is
    that of a model quantized with ``MinMax(bits, per_channel=...)`` weights and the same activations, into which it
    loads. Raises UserError where there is no LRQAT; a LoRA beside a quantized weight cannot be merged.
    """
    layers = [layer for layer in quant_layers(model).values() if isinstance(layer.weight_quantizer, LRQAT)]
    if not layers:
        raise UserError("no layer has an LRQAT weight quantizer to merge: quantize with quant/weight=lr_qat.")
    for layer in layers:
        _merge(layer)
    return model


@torch.no_grad()
def _merge(layer: QuantLayer) -> None:
    trained = layer.weight_quantizer
    assert isinstance(trained, LRQAT)
    layer.weight.copy_(trained(layer.weight))
    merged = MinMax(trained.bits, channels=trained.channels, batched=False, per_channel=trained.per_channel)
    merged.to(trained.scale).store_scale(trained.scale)
    merged.kernels = trained.kernels
    layer.weight_quantizer = merged
