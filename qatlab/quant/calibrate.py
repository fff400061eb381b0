"""Fill the scales of a quantized model from images, and report what each layer loses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qatlab.errors import UserError
from qatlab.quant.layers import QuantLayer, device_of, evaluating, full_precision, quant_layers, require_called
from qatlab.quant.quantizer import Quantizer


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Fill every scale of ``model``: activations from a full-precision pass over ``batches``, weights from themselves.

    ``batches`` are normalised images (B, 3, S, S). Nothing is quantized while observing, so no layer sees the noise of
    those before it. Each module's train or eval mode is restored. Raises UserError naming the layer on NaN or infinite
    values and on a layer that the forward never calls, and when there are no images.
    """
    layers = quant_layers(model)
    acts = {name: layer.act_quantizer for name, layer in layers.items()}
    called: set[str] = set()

    def observe(name: str, x: Tensor) -> None:
        called.add(name)
        if (quantizer := acts[name]) is not None:
            with _naming(name, "input"):
                quantizer.observe(x)

    images = 0
    with evaluating(model), full_precision(model), _on_inputs(layers, observe):
        for batch in batches:
            if len(batch):
                model(batch.to(device_of(model)))
                images += len(batch)
    if images == 0:
        raise UserError("calibration got no images: give the quantizers at least one to find their scales on.")
    require_called(layers, called)
    fit_weights(model)
    for layer in layers.values():
        if layer.act_quantizer is not None:
            layer.act_quantizer.fit()


def fit_weights(model: nn.Module) -> None:
    """Fill the scales of every weight of ``model`` from that weight; raises UserError naming the layer on NaN or infinite ones."""
    for name, layer in quant_layers(model).items():
        if layer.weight_quantizer is not None:
            with _naming(name, "weight"):
                layer.weight_quantizer.observe(layer.weight)
            layer.weight_quantizer.fit()


def layer_report(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Return one row per quantized layer of the calibrated ``model``, each looked at alone on its full-precision input.

    ``images`` are normalised (B, 3, S, S). A row holds layer, kind (the last part of the name), in_features,
    out_features, weight_bits, weight_scale (mean), weight_sqnr_db, act_bits, act_scale (mean), act_absmax, act_sqnr_db,
    act_clipped (fraction of the input rounded beyond the grid's ends) and output_sqnr_db; None where a tensor is not
    quantized. The signal-to-quantization-noise ratio is 10 log10(sum x^2 / sum (x - x_q)^2) in float64, infinite
    without error.
    """
    layers = quant_layers(model)
    slots = {name: (layer.weight_quantizer, layer.act_quantizer) for name, layer in layers.items()}
    rows: dict[str, dict[str, Any]] = {}

    def look(name: str, x: Tensor) -> None:
        rows[name] = _layer_row(name, layers[name], *slots[name], x)

    with evaluating(model), full_precision(model), _on_inputs(layers, look):
        model(images.to(device_of(model)))
    require_called(layers, set(rows))
    return [rows[name] for name in layers]


def rounded_elements(model: nn.Module, image: Tensor) -> tuple[int, int]:
    """Return how many weights the quantized layers of ``model`` round, and how many activations of one ``image`` (1, 3, S, S)."""
    layers = quant_layers(model)
    weights = sum(layer.weight.numel() for layer in layers.values() if layer.weight_quantizer is not None)
    acts = 0

    def count(name: str, x: Tensor) -> None:
        nonlocal acts
        acts += x.numel() if layers[name].act_quantizer is not None else 0

    with evaluating(model), _on_inputs(layers, count):
        model(image.to(device_of(model)))
    return weights, acts


def _layer_row(
    name: str, layer: QuantLayer, weight: Quantizer | None, act: Quantizer | None, x: Tensor
) -> dict[str, Any]:
    quantized_weight = layer.weight if weight is None else weight(layer.weight)
    quantized_x = x if act is None else act(x)
    output = layer.compute(x, layer.weight)
    return {
        "layer": name,
        "kind": name.rsplit(".", 1)[-1],
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "weight_bits": weight.bits if weight else None,
        "weight_scale": float(weight.scale.mean()) if weight else None,
        "weight_sqnr_db": _sqnr_db(layer.weight, quantized_weight) if weight else None,
        "act_bits": act.bits if act else None,
        "act_scale": float(act.grid(x)[0].mean()) if act else None,
        "act_absmax": float(x.abs().max()),
        "act_sqnr_db": _sqnr_db(x, quantized_x) if act else None,
        "act_clipped": _clipped(act, x) if act else None,
        "output_sqnr_db": _sqnr_db(output, layer.compute(quantized_x, quantized_weight)),
    }


def _sqnr_db(signal: Tensor, quantized: Tensor) -> float:
    signal = signal.double()
    noise = (signal - quantized.double()).square().sum()
    return float(10 * torch.log10(signal.square().sum() / noise)) if noise > 0 else float("inf")


def _clipped(act: Quantizer, x: Tensor) -> float:
    scale, zero_point = act.grid(x)
    code = (x / scale + zero_point).round_()
    return float(((code < act.qmin) | (code > act.qmax)).double().mean())


@contextmanager
def _on_inputs(layers: dict[str, QuantLayer], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside this context ``look(name, x)`` is called with the input of every layer that runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: look(name, inputs[0])

    with ExitStack() as handles:
        for name, layer in layers.items():
            handles.enter_context(layer.register_forward_pre_hook(hook(name)))
        yield


@contextmanager
def _naming(name: str, tensor: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"layer {name}, {tensor}: {error}") from error
