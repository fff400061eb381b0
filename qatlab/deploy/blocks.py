"""The blocks of an encoder, and their outputs while a whole model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qatlab.quant.inspect.hooks import on_outputs
from qatlab.quant.layers.walk import blocks_of


@torch.no_grad()
def block_outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the output of every block of a quantized encoder by name, for normalised ``images`` (B, 3, S, S).

    The encoder is a simulation, an ``integer_copy``, or one under a Classifier. A block is left out where it gives no
    tensor, and where what it gives are the features themselves.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            found[name] = output

    with on_outputs(blocks_of(getattr(model, "visual", model)), keep):
        outputs = model(images)
    features = outputs[0] if isinstance(outputs, tuple) else outputs
    return {name: output for name, output in found.items() if output is not features}


@contextmanager
def with_blocks(model: nn.Module, images: Tensor) -> Iterator[list[str]]:
    """Inside this context ``model`` returns its outputs and after them those of its blocks, whose names are given.

    ``images`` (B, 3, S, S) are an input on which the model runs once, to see which blocks give a tensor.
    """
    names = list(block_outputs(model, images))
    found: dict[str, Tensor] = {}
    forward = model.forward

    def forward_with_blocks(images: Tensor) -> tuple[Tensor, ...]:
        outputs = forward(images)
        first = outputs if isinstance(outputs, tuple) else (outputs,)
        return (*first, *(found[name] for name in names))

    modules = {name: module for name, module in blocks_of(getattr(model, "visual", model)).items() if name in names}
    with on_outputs(modules, lambda name, _, inputs, output: found.update({name: output})):
        # The instance's own forward takes the place of the class's, so that every name in the model stays what it is.
        model.forward = forward_with_blocks  # type: ignore[method-assign]
        try:
            yield names
        finally:
            del model.forward
