"""Merging of adapters that were trained inside the rounding into plain quantized layers."""

from __future__ import annotations

import torch
from torch import nn

from qatlab.core.errors import UserError
from qatlab.quant.layers.linear import QuantLayer
from qatlab.quant.layers.walk import quant_layers
from qatlab.quant.quantizers.lr_qat import LRQAT
from qatlab.quant.quantizers.minmax import MinMax


def merge(model: nn.Module) -> nn.Module:
    """Return ``model`` with every LRQAT merged in place: the weight lies on its grid, with a MinMax of the same scale.

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
    """Put the weight of ``layer`` on the grid of its LRQAT, and a MinMax of the same grid in the LRQAT's place."""
    trained = layer.weight_quantizer
    assert isinstance(trained, LRQAT)
    layer.weight.copy_(trained(layer.weight))
    # Rounding does not move a weight that lies on the grid, so the MinMax gives the twin that the LRQAT gave.
    merged = MinMax(trained.bits, channels=trained.channels, batched=False, per_channel=trained.per_channel)
    merged.to(trained.scale).store_scale(trained.scale)
    merged.kernels = trained.kernels
    layer.weight_quantizer = merged
