"""Whether an exported model is the simulation that was measured: layer by layer on the same input, and block by block in place.

A layer by itself tells every error of its own arithmetic, and nothing of what a runtime makes of several layers together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.deploy.blocks import block_outputs
from qatlab.deploy.integer import MIDDLE
from qatlab.quant.inspect.hooks import on_outputs
from qatlab.quant.layers.linear import QuantConv2d, QuantLayer
from qatlab.quant.layers.walk import full_precision, quant_layers

# The largest accepted error of a layer's output, and share of different codes. Another order of sums gives about 1e-6.
LIMIT = 1e-4
# Codes that may differ in a small layer, where one value midway between two codes is a larger share than that.
TIES = 4
# How many times as far from the simulation's as the simulation's is from full precision a block's output may be in place:
# two programs that round independently are √2 times as far from each other as each of them is from full precision.
IN_PLACE = 1.5


class LayerParity(NamedTuple):
    """The comparison of one layer on the input that it has in the simulation.

    ``error`` is ‖runtime − simulation‖ / ‖simulation‖ of the output, and ``product_error`` the same over the tokens
    whose input codes are all equal. ``mismatch`` is the share of input codes that differ: a value midway between two
    codes may be rounded in either direction, because some runtimes multiply by 1 / s instead of dividing by s.
    ``integer`` says whether the runtime computes the product in integers, ``codes`` how many codes the input has, and
    ``outlier_channels`` how many of its channels are multiplied in floats beside that product.
    """

    layer: str
    error: float
    product_error: float
    mismatch: float
    integer: bool
    codes: int = 0
    outlier_channels: int = 0

    @property
    def passed(self) -> bool:
        """Whether the layer computes what the simulation does, in integers."""
        few = self.mismatch <= LIMIT or self.mismatch * self.codes <= TIES
        return self.integer and self.product_error <= LIMIT and few


class BlockParity(NamedTuple):
    """One block while the whole model runs, on its own inputs, which carry what the blocks before it differ by.

    ``error`` is ‖runtime − simulation‖ / ‖simulation‖ of its output, ``simulated`` ‖simulation − full precision‖ /
    ‖full precision‖. The last "block" of a model is called ``FEATURES`` and is its output as it is served.
    """

    block: str
    error: float
    simulated: float

    @property
    def passed(self) -> bool:
        """Whether the block's output is as near to the simulation's as another order of sums lets it be."""
        return self.error <= max(LIMIT, IN_PLACE * self.simulated)


FEATURES = "features"


class Part(NamedTuple):
    """A layer as a runtime runs it: its output, the codes it rounds its input to, and whether its product is of integers."""

    output: Callable[[np.ndarray], np.ndarray]
    codes: Callable[[np.ndarray], np.ndarray]
    integer: bool


@torch.no_grad()
def compare_layers(simulated: nn.Module, images: Tensor, part: Callable[[str], Part]) -> list[LayerParity]:
    """Return the comparison of every quantized layer of ``simulated`` with ``part(name)``, on its inputs for ``images``.

    ``images`` are normalised, (n, 3, S, S) float32, on the CPU, because the runtimes compute there.
    """
    layers = quant_layers(simulated)
    found: list[LayerParity] = []

    def compare(name: str, layer: QuantLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        of_runtime, x = part(name), inputs[0].contiguous()
        assert layer.act_quantizer is not None
        codes = layer.act_quantizer.codes(x, torch.int16)
        # int16 for both: the runtime has 0 to 255, the simulation -128 to 127.
        theirs = torch.from_numpy(of_runtime.codes(x.numpy()).astype(np.int16)) - MIDDLE
        y, reference = torch.from_numpy(of_runtime.output(x.numpy())).double(), output.double()
        same = _same_inputs(layer, theirs == codes)
        mismatch = float((theirs != codes).double().mean())
        product_error = distance(y[same], reference[same])
        outliers = len(layer.outliers) if layer.outliers else 0
        integer = of_runtime.integer
        found.append(
            LayerParity(name, distance(y, reference), product_error, mismatch, integer, codes.numel(), outliers)
        )

    with on_outputs(layers, compare):
        simulated.eval()(images)
    return found


def _same_inputs(layer: QuantLayer, same: Tensor) -> Tensor:
    """Return which tokens (...), or pixels of a convolution's output (B, channels, H, W), have inputs of the ``same`` codes.

    ``same`` is boolean and of the shape of the layer's input. One different code changes the output of its whole token, so
    the product is compared on the others.
    """
    if not isinstance(layer, QuantConv2d):
        return same.all(-1)
    different = (~same).any(1, keepdim=True).float()
    window = torch.ones(1, 1, *layer.kernel_size)
    touched = F.conv2d(different, window, None, layer.stride, layer.padding, layer.dilation)
    return (touched == 0).expand(-1, layer.out_channels, -1, -1)


@torch.no_grad()
def compare_blocks(
    simulated: nn.Module,
    images: Tensor,
    blocks: Callable[[Sequence[str], np.ndarray], dict[str, np.ndarray]],
    served: Tensor,
) -> list[BlockParity]:
    """Return how the blocks of ``simulated`` fare in a runtime's own graph, and the features that it ``served`` last.

    ``images`` are normalised, (n, 3, S, S) float32 on the CPU, ``served`` the runtime's features of them, (n, D).
    ``blocks(names, images)`` gives the outputs of the blocks in the running model, of the shapes that the simulation's have;
    a block whose output is no tensor of the running model may be missing, and is missing in the result.
    """
    # What changes the model's structure, as a rotation does, is in both, and only rounding tells them apart.
    reference = _outputs(simulated, images)
    with full_precision(simulated):
        full = _outputs(simulated, images)
    names = [name for name in reference if name != FEATURES]
    found = {name: torch.from_numpy(output) for name, output in blocks(names, images.numpy()).items()}
    found[FEATURES] = served
    return [
        BlockParity(name, distance(found[name].double(), each.double()), distance(each.double(), full[name].double()))
        for name, each in reference.items()
        if name in found
    ]


def _outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the outputs of the blocks of ``model`` by name, and its features."""
    return {**block_outputs(model, images), FEATURES: model(images)}


def distance(found: Tensor, reference: Tensor) -> float:
    """Return ‖found − reference‖ / ‖reference‖ over all elements of two tensors of any one shape."""
    return float((found - reference).norm() / reference.norm())
