"""Proof that a quantized model is quantized: what ran in a real forward, and on how many values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from qatlab.quant.layers import evaluating, quant_layers
from qatlab.quant.quantizer import Quantizer


class VerificationError(RuntimeError):
    """A quantizer did not run in the forward, or gave more values than its bits allow."""


def verify(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Return one row per quantizer of ``model``, as seen in a forward of ``images`` (B, 3, S, S), normalised.

    A row holds layer, tensor ("weight" or "act"), bits, calls (how often it ran) and distinct, the largest number of
    distinct values in one result that share a scale. Reused weights are computed anew. Raises VerificationError naming
    every layer with a quantizer that did not run, or with more than 2^bits values.
    """
    rows: list[dict[str, Any]] = []
    layers = quant_layers(model)
    if not layers:
        raise VerificationError(f"{type(model).__name__} holds no quantized layer.")
    with evaluating(model), ExitStack() as handles:
        for name, layer in layers.items():
            layer.unfold()
            for tensor, quantizer in (("weight", layer.weight_quantizer), ("act", layer.act_quantizer)):
                if quantizer is not None:
                    row = {"layer": name, "tensor": tensor, "bits": quantizer.bits, "calls": 0, "distinct": 0}
                    rows.append(row)
                    handles.enter_context(quantizer.register_forward_hook(_counting(row)))
        model(images.to(next(model.parameters()).device))
    failures = [_failure(row) for row in rows if row["calls"] == 0 or row["distinct"] > 2 ** row["bits"]]
    if failures:
        raise VerificationError(f"{len(failures)} of {len(rows)} quantizers fail: {'; '.join(failures)}.")
    return rows


def distinct_values(quantized: Tensor, rows: int) -> int:
    """Return the largest number of distinct values in a row of ``quantized`` seen as (rows, -1); each NaN counts."""
    ordered = quantized.detach().reshape(rows, -1).sort(dim=1).values
    return int((ordered.diff(dim=1) != 0).sum(dim=1).max()) + 1


def _counting(row: dict[str, Any]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(quantizer: nn.Module, _: tuple[Tensor, ...], quantized: Tensor) -> None:
        assert isinstance(quantizer, Quantizer)
        rows = quantizer.grid_rows(quantized.detach())
        row["calls"] += 1
        row["distinct"] = max(row["distinct"], distinct_values(rows, len(rows)))

    return hook


def _failure(row: dict[str, Any]) -> str:
    what = "did not run" if row["calls"] == 0 else f"has {row['distinct']} values, {2 ** row['bits']} allowed"
    return f"{row['layer']} {row['tensor']} {what}"
