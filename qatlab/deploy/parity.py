"""Whether an exported model is the simulation that was measured: layer by layer on the same input."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from qatlab.deploy.integer import MIDDLE
from qatlab.quant.layers import QuantLayer, quant_layers

LIMIT = 1e-4


class LayerParity(NamedTuple):
    """One layer on the simulation's input.

    ``error`` is ‖runtime − simulation‖ / ‖simulation‖ of its output, ``product_error`` that of the tokens whose input has
    the same codes, ``mismatch`` the share of codes that differ: a value midway between two codes goes either way, where a
    runtime multiplies by 1 / s in place of dividing by s. ``integer`` says whether its product is one of integers.
    """

    layer: str
    error: float
    product_error: float
    mismatch: float
    integer: bool

    @property
    def passed(self) -> bool:
        """Whether the layer computes what the simulation does, in integers."""
        return self.integer and self.product_error <= LIMIT and self.mismatch <= LIMIT


class Part(NamedTuple):
    """A layer as a runtime runs it: its output, the codes it rounds its input to, and whether its product is of integers."""

    output: Callable[[np.ndarray], np.ndarray]
    codes: Callable[[np.ndarray], np.ndarray]
    integer: bool


@torch.no_grad()
def compare_layers(simulated: nn.Module, images: Tensor, part: Callable[[str], Part]) -> list[LayerParity]:
    """Return how every quantized layer of ``simulated`` fares as ``part(name)`` on the inputs that ``images`` give it there."""
    layers = quant_layers(simulated)
    found: list[LayerParity] = []

    def compare(name: str) -> Callable[..., None]:
        def hook(layer: QuantLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            of_runtime, x = part(name), inputs[0].contiguous()
            assert layer.act_quantizer is not None
            codes = layer.act_quantizer.codes(x, torch.int16)
            theirs = torch.from_numpy(of_runtime.codes(x.numpy()).astype(np.int16)) - MIDDLE
            y, reference = torch.from_numpy(of_runtime.output(x.numpy())).double(), output.double()
            same = (theirs == codes).all(-1) if y.ndim == x.ndim else torch.ones(y.shape[:-1], dtype=torch.bool)
            mismatch = float((theirs != codes).double().mean())
            product_error = distance(y[same], reference[same])
            found.append(LayerParity(name, distance(y, reference), product_error, mismatch, of_runtime.integer))

        return hook

    hooks = [layer.register_forward_hook(compare(name)) for name, layer in layers.items()]
    try:
        simulated.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def distance(found: Tensor, reference: Tensor) -> float:
    """Return ‖found − reference‖ / ‖reference‖."""
    return float((found - reference).norm() / reference.norm())
