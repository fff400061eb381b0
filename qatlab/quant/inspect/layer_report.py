"""The error that rounding causes in each layer, measured on a few images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qatlab.quant.inspect.hooks import on_inputs
from qatlab.quant.layers.linear import QuantLayer
from qatlab.quant.layers.products import AttentionProducts
from qatlab.quant.layers.walk import (
    attention_products,
    device_of,
    evaluating,
    full_precision,
    quant_layers,
    require_called,
)
from qatlab.quant.quantizers.base import Quantizer


def layer_report(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Return one row per quantized layer of the calibrated ``model``, each measured alone on its full-precision input.

    ``images`` are normalised (B, 3, S, S). A row holds layer, kind (the last part of the name), in_features,
    out_features, weight_bits, weight_scale (mean), weight_sqnr_db, act_bits, act_scale (mean), act_absmax, act_sqnr_db,
    act_clipped (fraction of the input rounded beyond the grid's ends), output_sqnr_db and outlier_channels (how many
    channels of the input stay in full precision; the act columns are about the others); None where a tensor is not
    quantized. After the layers come the products of attention, <attention>.products.qk and .pv, whose queries and
    softmax stand in the place of the activation, and whose keys and values in that of the weight. The
    signal-to-quantization-noise ratio is 10 log10(sum x^2 / sum (x - x_q)^2) in float64, infinite without error.
    """
    layers = quant_layers(model)
    # The quantizers are read before the layers compute in full precision, because then their slots are empty.
    slots = {name: (layer.weight_quantizer, layer.act_quantizer) for name, layer in layers.items()}
    rows: dict[str, dict[str, Any]] = {}

    def look(name: str, layer: QuantLayer, inputs: tuple[Tensor, ...]) -> None:
        """Add the layer's row, from its input (B, ..., in_features) or the images."""
        rows[name] = _layer_row(name, layer, *slots[name], inputs[0])

    attentions = attention_products(model)

    def look_at_products(name: str, products: AttentionProducts, inputs: tuple[Any, ...]) -> None:
        """Add the rows of both products, from their operands (B, heads, ., .)."""
        query, key, value, mask, _, scale = inputs
        weights = products.weights(query, key, mask, scale)
        rows[f"{name}.qk"] = _product_row(f"{name}.qk", products, ("query", query), ("key", key), key.mT)
        rows[f"{name}.pv"] = _product_row(f"{name}.pv", products, ("softmax", weights), ("value", value), value)

    with (
        evaluating(model),
        full_precision(model),
        on_inputs(layers, look),
        on_inputs(attentions, look_at_products),
    ):
        model(images.to(device_of(model)))
    names = [*layers, *(f"{name}.{kind}" for name in attentions for kind in ("qk", "pv"))]
    require_called(names, set(rows))
    return [rows[name] for name in names]


def rounded_elements(model: nn.Module, image: Tensor) -> tuple[int, int]:
    """Return how many weights, and how many activations of one ``image`` (1, 3, S, S), the quantized layers round."""
    layers = quant_layers(model)
    weights = sum(layer.weight.numel() for layer in layers.values() if layer.weight_quantizer is not None)
    acts = 0

    def count(name: str, layer: QuantLayer, inputs: tuple[Tensor, ...]) -> None:
        """Add the elements of the layer's input (1, ..., in_features) where it is rounded."""
        nonlocal acts
        acts += inputs[0].numel() if layer.act_quantizer is not None else 0

    with evaluating(model), on_inputs(layers, count):
        model(image.to(device_of(model)))
    return weights, acts


def _layer_row(
    name: str, layer: QuantLayer, weight: Quantizer | None, act: Quantizer | None, x: Tensor
) -> dict[str, Any]:
    """Return the row of one layer with input ``x``; the quantizers are given, as the layer's slots are empty now."""
    # What the channels in full precision add to the output is the same on both sides; their inputs are not rounded.
    kept = layer.outliers(x) if layer.outliers else 0.0
    x = layer.to_round(x)
    quantized_weight = layer.weight if weight is None else weight(layer.weight)
    quantized_x = layer.rounded_input(x, act)
    output = layer.compute(x, layer.weight) + kept
    return {
        "layer": name,
        "kind": name.rsplit(".", 1)[-1],
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "weight_bits": weight.bits if weight else None,
        "weight_scale": float(weight.grid(layer.weight)[0].mean()) if weight else None,
        "weight_sqnr_db": _sqnr_db(layer.weight, quantized_weight) if weight else None,
        "act_bits": act.bits if act else None,
        "act_scale": float(act.grid(layer.tokens(x))[0].mean()) if act else None,
        "act_absmax": float(x.abs().max()),
        "act_sqnr_db": _sqnr_db(x, quantized_x) if act else None,
        "act_clipped": float(act.beyond(layer.tokens(x)).double().mean()) if act else None,
        "output_sqnr_db": _sqnr_db(output, layer.compute(quantized_x, quantized_weight) + kept),
        "outlier_channels": len(layer.outliers) if layer.outliers else 0,
    }


def _product_row(
    name: str, products: AttentionProducts, left: tuple[str, Tensor], right: tuple[str, Tensor], factor: Tensor
) -> dict[str, Any]:
    """Return the row of one product of attention: of the operand ``left``, (B, heads, Q, n), with ``right``.

    Operands come with their names; ``factor`` is the right one as it is multiplied, (B, heads, n, m).
    """
    (of_left, a), (of_right, b) = left, right
    rounding = products.quantizers
    rounded_a, rounded_b = products.rounded(of_left, a), products.rounded(of_right, b)
    return {
        "layer": name,
        "kind": name.rsplit(".", 1)[-1],
        "in_features": factor.shape[-2],
        "out_features": factor.shape[-1],
        "weight_bits": products.bits,
        "weight_scale": float(rounding[of_right].scale.mean()),
        "weight_sqnr_db": _sqnr_db(b, rounded_b),
        "act_bits": products.bits,
        "act_scale": float(rounding[of_left].scale.mean()),
        "act_absmax": float(a.abs().max()),
        "act_sqnr_db": _sqnr_db(a, rounded_a),
        "act_clipped": None,
        "output_sqnr_db": _sqnr_db(a @ factor, rounded_a @ (rounded_b if factor is b else rounded_b.mT)),
        "outlier_channels": None,
    }


def _sqnr_db(signal: Tensor, quantized: Tensor) -> float:
    # The sum is made in float64, because a float32 sum over millions of small squares loses digits.
    signal = signal.double()
    noise = (signal - quantized.double()).square().sum()
    return float(10 * torch.log10(signal.square().sum() / noise)) if noise > 0 else float("inf")
