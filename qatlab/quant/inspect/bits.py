"""The bits of a quantized model, read off its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from qatlab.quant.layers.linear import QuantLayer
from qatlab.quant.layers.walk import quant_layers


def planned_bits(model: nn.Module) -> str:
    """Return a line on the bits of the weights: "bits of the weights: 4 in 30 layers, 8 in 18; 4.61 on average"."""
    layers = list(quant_layers(model).values())
    counts = Counter(layer.weight_quantizer.bits for layer in layers if layer.weight_quantizer)
    shown = ", ".join(f"{bits} in {count}" for bits, count in sorted(counts.items()))
    return f"bits of the weights: {shown} layers; {average_bits(layers, 'weight'):.2f} on average"


def average_bits(layers: Iterable[QuantLayer], slot: str) -> float | None:
    """Return the mean bits of ``slot`` (weight or act) per weight of the layers that round it, None where none does.

    The mean is a whole number where all layers have the same bits.
    """
    weights_by_bits: Counter[int] = Counter()
    for layer in layers:
        quantizer = layer.weight_quantizer if slot == "weight" else layer.act_quantizer
        if quantizer is not None:
            weights_by_bits[quantizer.bits] += layer.weight.numel()
    # Equal bits are returned as they are, because the division would make the float 8.0 of 8.
    if len(weights_by_bits) < 2:
        return next(iter(weights_by_bits), None)
    return sum(bits * size for bits, size in weights_by_bits.items()) / weights_by_bits.total()
