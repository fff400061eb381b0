"""Proof that a quantized model is quantized: the quantizers that ran in a forward, and the values each gave."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from qatlab.quant.inspect.hooks import on_outputs
from qatlab.quant.layers.walk import attention_products, device_of, evaluating, quant_layers
from qatlab.quant.quantizers.base import Quantizer
from qatlab.quant.quantizers.logarithmic import LogQuantizer


class VerificationError(RuntimeError):
    """A quantizer did not run in the forward, or gave more values than its bits allow."""


def verify(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Return one row per quantizer of ``model``, as seen in a forward of ``images`` (B, 3, S, S), normalised.

    A text tower takes tokens (B, L) of captions instead. A row holds layer, tensor ("weight" or "act"), bits, calls (how
    often it ran) and distinct, the largest number of distinct values in one result that share a scale. The products of
    an attention are a layer <attention>.products with the tensors "query", "key", "value" and "softmax". Reused weights
    are computed anew. Raises VerificationError naming every layer with a quantizer that did not run, or with more than
    2^bits values.
    """
    rows: dict[str, dict[str, Any]] = {}
    quantizers: dict[str, Quantizer | LogQuantizer] = {}
    layers = quant_layers(model)
    if not layers:
        raise VerificationError(f"{type(model).__name__} holds no quantized layer.")
    for layer in layers.values():
        # With a reused weight the quantizer would not run and would seem unused.
        layer.unfold()
    for name, tensor, quantizer in _quantizers(model):
        quantizers[f"{name} {tensor}"] = quantizer
        rows[f"{name} {tensor}"] = {
            "layer": name,
            "tensor": tensor,
            "bits": quantizer.bits,
            "calls": 0,
            "distinct": 0,
        }

    def count(name: str, quantizer: Quantizer | LogQuantizer, inputs: tuple[Tensor, ...], quantized: Tensor) -> None:
        """Count a run of the quantizer ``name``, and the distinct values of its result (channels, ...) or (B, ...)."""
        values = quantizer.grid_rows(quantized.detach())
        row = rows[name]
        row["calls"] += 1
        row["distinct"] = max(row["distinct"], distinct_values(values, len(values)))

    with evaluating(model), on_outputs(quantizers, count):
        model(images.to(device_of(model)))
    failures = [_failure(row) for row in rows.values() if row["calls"] == 0 or row["distinct"] > 2 ** row["bits"]]
    if failures:
        raise VerificationError(f"{len(failures)} of {len(rows)} quantizers fail: {'; '.join(failures)}.")
    return list(rows.values())


def _quantizers(model: nn.Module) -> Iterator[tuple[str, str, Quantizer | LogQuantizer]]:
    """Yield (layer, tensor, quantizer) of all quantizers in ``model``."""
    for name, layer in quant_layers(model).items():
        for tensor, quantizer in (("weight", layer.weight_quantizer), ("act", layer.act_quantizer)):
            if quantizer is not None:
                yield name, tensor, quantizer
    for name, products in attention_products(model).items():
        for operand, of_operand in products.quantizers.items():
            yield name, operand, of_operand


def distinct_values(quantized: Tensor, rows: int) -> int:
    """Return the largest number of distinct values in a row of ``quantized`` (of any shape), seen as (rows, -1).

    Every NaN counts as a value of its own, because NaN is not equal to NaN.
    """
    # After sorting, equal values are neighbours, so that one pass counts the changes in all rows at once.
    ordered = quantized.detach().reshape(rows, -1).sort(dim=1).values
    return int((ordered.diff(dim=1) != 0).sum(dim=1).max()) + 1


def _failure(row: dict[str, Any]) -> str:
    what = "did not run" if row["calls"] == 0 else f"has {row['distinct']} values, {2 ** row['bits']} allowed"
    return f"{row['layer']} {row['tensor']} {what}"
