"""What the rounding of each layer costs the features, estimated from one gradient or measured layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.errors import UserError
from qatlab.quant.layers import QuantLayer, device_of, evaluating, full_precision, quant_layers, require_called
from qatlab.quant.quantizer import Quantizer


def gradient_sensitivities(model: nn.Module, batches: Iterable[Tensor], seed: int = 0) -> dict[str, float]:
    """Return RaanA's coefficient of every quantized layer by name: the error of the features is some coefficient * 2^-bits.

    ``batches`` are normalised images (B, 3, S, S), each taken alone and one forward and backward per batch; the model
    computes in full precision and needs no scales. The coefficient is mean_i |dL_i/dY|_F / sqrt(numel Y_i), times
    sqrt(mean |x|^2) over the rows x of the layer's inputs, times |W|_F / sqrt(in_features) (Yang et al. 2025, arXiv
    2504.03717). L_i is there the loss of a language model. Here it is the product of the normalised features
    with a Gaussian vector, drawn anew for each image from ``seed``: its squared gradient is that of the features
    themselves on average, where 1 - cosine to the unquantized features has none.

    Raises UserError when there are no images.
    """
    layers = quant_layers(model)
    gradient, square = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    rows, images = dict.fromkeys(layers, 0), 0
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[str, Tensor] = {}

    def look(name: str, x: Tensor, y: Tensor) -> None:
        square[name] += float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64).square())
        rows[name] += x.numel() // layers[name].in_features  # of a patch convolution: its patches
        outputs[name] = y

    with evaluating(model), full_precision(model), _frozen(model), _on_outputs(layers, look), torch.enable_grad():
        for batch in batches:
            if not len(batch):
                continue
            features = F.normalize(model(batch.to(device_of(model)).detach().requires_grad_()), dim=-1)
            # One by one: torch draws other numbers for another shape.
            direction = torch.stack([torch.randn(len(row), generator=generator) for row in features]).to(features)
            found = torch.autograd.grad((features * direction).sum(), list(outputs.values()))
            for name, grad in zip(outputs, found, strict=True):
                norms = torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=torch.float64)
                gradient[name] += float(norms.sum()) / (grad[0].numel() ** 0.5)
            outputs.clear()
            images += len(batch)
    _require_images(images)
    require_called(layers, {name for name in layers if rows[name]})
    return {
        name: gradient[name]
        / images
        * (square[name] / rows[name]) ** 0.5
        * float(torch.linalg.vector_norm(layer.weight.detach(), dtype=torch.float64))
        / layer.weight[0].numel() ** 0.5
        for name, layer in layers.items()
    }


def measured_sensitivities(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """Return the mean of 1 - cosine of the features, with one layer quantized to those of full precision, by layer name.

    ``batches`` are normalised images (B, 3, S, S). The quantizers of ``model`` are fitted, and every layer is looked at
    with its own, weight and activation: for a choice among bits it is made and measured once for each number of them. A
    batch costs one forward per layer and one more; nothing is kept but sums, float64. Raises UserError when there are no
    images.
    """
    layers = quant_layers(model)
    slots = {name: (layer.weight_quantizer, layer.act_quantizer) for name, layer in layers.items()}
    total, images = dict.fromkeys(layers, 0.0), 0
    with evaluating(model), full_precision(model):
        for batch in batches:
            if not len(batch):
                continue
            batch = batch.to(device_of(model))
            exact = F.normalize(model(batch).double(), dim=-1)
            for name, layer in layers.items():
                with _quantized(layer, *slots[name]):
                    features = F.normalize(model(batch).double(), dim=-1)
                # Half the squared distance: 1 - cosine by itself is rounding where the two are close.
                total[name] += float((features - exact).square().sum()) / 2
            images += len(batch)
    _require_images(images)
    return {name: error / images for name, error in total.items()}


@contextmanager
def _quantized(layer: QuantLayer, weight: Quantizer | None, act: Quantizer | None) -> Iterator[None]:
    """Inside this context ``layer`` has its quantizers; then it computes in full precision and keeps no rounded weight."""
    layer.weight_quantizer, layer.act_quantizer = weight, act
    try:
        yield
    finally:
        layer.weight_quantizer = layer.act_quantizer = None
        layer.unfold()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside this context no Parameter of ``model`` asks for a gradient."""
    held = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in held:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


@contextmanager
def _on_outputs(layers: Mapping[str, QuantLayer], look: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside this context ``look(name, x, y)`` is called with the input and the output of every layer that runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda _, inputs, output: look(name, inputs[0], output)

    with ExitStack() as handles:
        for name, layer in layers.items():
            handles.enter_context(layer.register_forward_hook(hook(name)))
        yield


def _require_images(images: int) -> None:
    if images == 0:
        raise UserError("there are no images to measure the layers' sensitivities on: give at least one.")
