"""The registers of a model, and the neurons that were taken out for them, in words."""

from __future__ import annotations

from torch import nn

from qatlab.quant.layers.attention import QuantAttention
from qatlab.quant.layers.walk import quant_layers


def registers_of(model: nn.Module) -> list[str]:
    """Return the names of the attentions of ``model``, quantized, that find registers beside their tokens."""
    return [name for name, part in model.named_modules() if isinstance(part, QuantAttention) and part.registers]


def silent_neurons(model: nn.Module) -> dict[str, int]:
    """Return how many outputs are always 0, by layer, of the layers of ``model``, quantized, that have any."""
    found: dict[str, int] = {}
    for name, layer in quant_layers(model).items():
        silent = ~layer.weight.detach().flatten(1).any(1)
        if layer.bias is not None:
            silent &= layer.bias.detach() == 0
        if bool(silent.any()):
            found[name] = int(silent.sum())
    return found


def told(model: nn.Module) -> str:
    """Return a line on the registers of ``model``, quantized, and on the neurons that were taken out."""
    silent = silent_neurons(model)
    by_layer = ", ".join(f"{name} ({count})" for name, count in silent.items())
    return f"registers in {len(registers_of(model))} attentions in place of {sum(silent.values())} neurons: {by_layer}"
