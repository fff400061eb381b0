"""timm's EVA attention, whose packed projection is called only on request."""

from __future__ import annotations

from timm.models.eva import EvaAttention
from torch import nn


def call_projections(model: nn.Module) -> None:
    """Have every EVA attention in ``model`` call its packed projection, with the same result up to the order of a sum.

    With biases for queries and values it otherwise gives the projection's weight to a function, so that a quantized layer in
    this place would never run.
    """
    for module in model.modules():
        if isinstance(module, EvaAttention):
            module.qkv_bias_separate = True
