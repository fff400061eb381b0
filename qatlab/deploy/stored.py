"""The data stored with an export to find machines that compute wrongly: images with their features, and one layer.

Features alone are not enough. In a deep encoder a difference of 1e-7 becomes a difference of codes within a few layers,
so that the features of two correct machines differ nearly as much as rounding changes them. The output of one layer is
equal to 1e-6 on all correct machines, and its stored input is the one with the largest error on a CPU that adds in
sixteen bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from qatlab.deploy.certified import difference
from qatlab.deploy.integer import integer_layers
from qatlab.deploy.parity import LIMIT
from qatlab.deploy.saturation import ROWS, cut_off, extreme_input
from qatlab.quant.inspect.hooks import on_inputs
from qatlab.quant.layers.linear import QuantLayer
from qatlab.quant.layers.walk import full_precision, quant_layers

IMAGES = 4  # number of images stored with an export; few, because every copy of the export contains them
# A limit is at least this many times the distance between two correct programs, so that a third correct one passes.
ROUNDING = 1.5


class LayerInput(NamedTuple):
    """The input ``x`` of the layer ``name`` that shows best whether a CPU cuts off sums.

    ``limit`` is the largest accepted distance of an output from the right one: half the distance between the right
    output and that of full precision, and at least parity.LIMIT. ``lost`` is the distance of the output that a CPU
    without VNNI gives for signed weights.
    """

    name: str
    x: np.ndarray
    limit: float
    lost: float


@torch.no_grad()
def telling_layer(simulated: nn.Module, integer: nn.Module, images: Tensor) -> LayerInput:
    """Return the linear layer and its input where a CPU that adds in sixteen bits is furthest beyond the limit.

    ``images`` are normalised, (n, 3, S, S); the first one tells the shape of each layer's input.
    """
    inputs = _inputs(simulated, images[:1])
    layers, quantized = integer_layers(integer), quant_layers(simulated)
    found = []
    for name, like in inputs.items():
        layer = layers[name]
        if layer.codes.ndim != 2:  # a convolution: extreme_input makes inputs of linear layers
            continue
        x = extreme_input(layer, like)
        right = layer(x)
        # The limit is half of what quantization itself changes in this output.
        with full_precision(simulated):
            limit = max(LIMIT, difference(_rows(quantized[name](x)), _rows(right)) / 2)
        rows = _rows(right)[:ROWS]  # extreme_input repeats ROWS rows: the rest says nothing new
        codes = layer.rounded(x).reshape(-1, x.shape[-1])[:ROWS]
        lost = cut_off(codes, layer.codes) * (layer.scale * layer.scales)
        found.append(LayerInput(name, x.numpy(), limit, difference(rows + lost.numpy(), rows)))
    # If no layer can be cut off, all ratios are 0, and the layer with the largest limit is taken.
    return max(found, key=lambda of: (of.lost / of.limit, of.limit))


@torch.no_grad()
def features_of(
    model: Callable[[np.ndarray], np.ndarray], integer: nn.Module, fp32: nn.Module, images: Tensor
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return ({"images": (k, 3, S, S), "features": (k, D)} float32, {"limit", "rounding"}) of some of the ``images``.

    ``images`` are (n, 3, S, S), normalised; k is at most 4. The features are those of ``model``. "limit" is half their
    distance from the features of full precision, or if that is larger, 1.5 times their distance "rounding" from the
    features of the same integer model in torch. The images are those for which the first bound is furthest above the
    second, relative to the length of the features.
    """
    features, same, full = model(images.numpy()), integer(images).numpy(), fp32(images).numpy()
    above = np.linalg.norm(full - features, axis=1) / 2 - ROUNDING * np.linalg.norm(same - features, axis=1)
    # The choice is relative to the length of the features, as the limit is; sorting keeps the images in their order.
    chosen = np.sort(np.argsort(-above / np.linalg.norm(features, axis=1))[:IMAGES])
    rounding = difference(same[chosen], features[chosen])
    limit = max(difference(full[chosen], features[chosen]) / 2, ROUNDING * rounding)
    return {"images": images.numpy()[chosen], "features": features[chosen]}, {"limit": limit, "rounding": rounding}


def _rows(values: Tensor) -> np.ndarray:
    return values.reshape(-1, values.shape[-1]).numpy()


def _inputs(simulated: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return {layer: input} of the quantized layers for normalised ``images`` (n, 3, S, S)."""
    found: dict[str, Tensor] = {}

    def keep(name: str, layer: QuantLayer, inputs: tuple[Tensor, ...]) -> None:
        # A layer may be given a transposed view, whose order in memory a runtime does not accept.
        found[name] = inputs[0].contiguous()

    with on_inputs(quant_layers(simulated), keep):
        simulated.eval()(images)
    return found
