"""Fill the scales of a quantized model from images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from qatlab.core.errors import UserError, naming
from qatlab.quant.inspect.hooks import on_inputs
from qatlab.quant.layers.products import AttentionProducts
from qatlab.quant.layers.walk import (
    attention_products,
    evaluating,
    full_precision,
    quant_layers,
    require_called,
    run_all,
)
from qatlab.quant.ptq.round_weights import Compensation, reads_inputs, round_weights


def calibrate(model: nn.Module, batches: Iterable[Tensor], compensation: Compensation | None = None) -> None:
    """Fill every scale of ``model`` from the weights and from a full-precision pass over ``batches``.

    ``batches`` are normalised images (B, 3, S, S) or, for a text tower, tokens (B, L). Nothing is quantized while
    observing, so no layer sees the noise of earlier layers. Then layers are corrected by ``compensation``, and weights are
    rounded whose quantizer chooses codes by the inputs of its layer (``round_weights``); for both, ``batches`` are kept in
    memory. Each module's mode is restored. Raises UserError naming the layer on NaN or infinite values and on a layer that
    the forward never calls, and when there are no images.
    """
    layers = quant_layers(model)
    if reads_inputs(model, compensation):
        batches = list(batches)
    acts = {name: layer.act_quantizer for name, layer in layers.items()}
    called: set[str] = set()

    def observe(name: str, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        """Show the layer's input to its activation quantizer, (B, ..., channels)."""
        called.add(name)
        # The quantizer cannot be read from the layer, whose slots are empty while it computes in full precision.
        quantizer = acts[name]
        if quantizer is not None:
            with naming(f"layer {name}, input"):
                quantizer.observe(layer.tokens(layer.to_round(inputs[0])))

    attentions = attention_products(model)

    def observe_products(name: str, products: AttentionProducts, inputs: tuple[Any, ...]) -> None:
        """Show the operands (B, heads, ., .) of an attention's products to their quantizers."""
        called.add(name)
        query, key, value, mask, _, scale = inputs
        with naming(f"layer {name}, operands"):
            products.observe(query, key, value, mask, scale)

    with (
        evaluating(model),
        full_precision(model),
        on_inputs(layers, observe),
        on_inputs(attentions, observe_products),
    ):
        images = run_all(model, batches)
    if images == 0:
        raise UserError("calibration got no images: give the quantizers at least one to find their scales on.")
    # A layer that was not called has no scale, and would raise an error only in the middle of a run.
    require_called([*layers, *attentions], called)
    fit_weights(model)
    for layer in layers.values():
        if layer.act_quantizer is not None:
            layer.act_quantizer.fit()
    for products in attentions.values():
        products.fit()
    round_weights(model, batches, compensation)


def fit_weights(model: nn.Module) -> None:
    """Fill the scales of every weight of ``model`` from that weight.

    Raises UserError naming the layer where a weight holds NaN or infinite values.
    """
    for name, layer in quant_layers(model).items():
        if layer.weight_quantizer is not None:
            with naming(f"layer {name}, weight"):
                layer.weight_quantizer.observe(layer.weight)
            layer.weight_quantizer.fit()
