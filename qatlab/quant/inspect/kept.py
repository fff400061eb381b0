"""The channels that layers keep in full precision, in words."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from qatlab.quant.layers.walk import quant_layers

NAMED = 3  # how many layers a line names


def kept_channels(model: nn.Module) -> dict[str, int]:
    """Return how many input channels stay in full precision, by layer, of the layers of ``model`` that keep any."""
    return {name: len(layer.outliers) for name, layer in quant_layers(model).items() if layer.outliers}


def told(channels: Mapping[str, int]) -> str:
    """Return a line on the number of ``channels`` by layer that stay in full precision, the layers with most of them named."""
    if not channels:
        return "No layer keeps an input channel in full precision"
    most = sorted(channels, key=lambda name: -channels[name])
    named = ", ".join(f"{name} ({channels[name]})" for name in most[:NAMED])
    more = f" and {len(most) - NAMED} more" if len(most) > NAMED else ""
    layers = "layer" if len(channels) == 1 else "layers"
    return f"{len(channels)} {layers} keep input channels in full precision, {sum(channels.values())} of them: {named}{more}"
