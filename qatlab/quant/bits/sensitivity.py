"""The error of the features that rounding each layer causes, estimated from one gradient or measured by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.core.errors import UserError
from qatlab.quant.inspect.hooks import on_outputs
from qatlab.quant.layers.linear import QuantLayer
from qatlab.quant.layers.walk import device_of, evaluating, full_precision, quant_layers, require_called
from qatlab.quant.quantizers.base import Quantizer


def gradient_sensitivities(model: nn.Module, batches: Iterable[Tensor], seed: int = 0) -> dict[str, float]:
    """Return RaanA's coefficient of every quantized layer by name; the features' error is about coefficient * 2^-bits.

    ``batches`` are normalised images (B, 3, S, S), or tokens (B, L) of captions; a batch takes one forward and one
    backward, and each image or caption counts by itself. The model computes in full precision and needs no scales. The
    coefficient is mean_i |dL_i/dY|_F / sqrt(numel Y_i), times sqrt(mean |x|^2) over the rows x of the layer's inputs,
    times |W|_F / sqrt(in_features) (Yang et al. 2025, arXiv 2504.03717). In that paper L_i is the loss of a language
    model. Here L_i is the product of the normalised features with a Gaussian vector, drawn for each image from ``seed``:
    on average its squared gradient is that of the features. (The obvious loss, 1 - cosine to the unquantized features,
    has no gradient where nothing is quantized.)

    Raises UserError when there are no images.
    """
    layers = quant_layers(model)
    gradient, square = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    rows, images = dict.fromkeys(layers, 0), 0  # the number of rows of each layer's inputs so far
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[str, Tensor] = {}

    def look(name: str, layer: QuantLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Add the layer's input (B, ..., in) to the sums, and note its ``output`` (B, ..., out) for the backward."""
        x = inputs[0].detach()
        square[name] += float(torch.linalg.vector_norm(x, dtype=torch.float64).square())
        rows[name] += x.numel() // layer.in_features  # the number of tokens, or of patches for a patch convolution
        # Tokens of a text take no gradient, so that before the first layer of a text tower nothing asks for one.
        outputs[name] = output if output.requires_grad else output.requires_grad_()

    with evaluating(model), full_precision(model), _frozen(model), on_outputs(layers, look), torch.enable_grad():
        for batch in batches:
            if not len(batch):
                continue
            given = batch.to(device_of(model)).detach()
            # No Parameter asks for a gradient, so the images have to:
            # without them the outputs of the layers would have no graph.
            if given.is_floating_point():
                given.requires_grad_()
            features = F.normalize(model(given), dim=-1)
            # The vectors are drawn one by one, so that the numbers do not depend on the size of the batch.
            direction = torch.stack([torch.randn(len(row), generator=generator) for row in features]).to(features)
            found = torch.autograd.grad((features * direction).sum(), list(outputs.values()))
            for name, grad in zip(outputs, found, strict=True):
                norms = torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=torch.float64)
                gradient[name] += float(norms.sum()) / (grad[0].numel() ** 0.5)
            outputs.clear()
            images += len(batch)
    _require_images(images)
    require_called(layers, {name for name in layers if rows[name]})
    coefficients: dict[str, float] = {}
    for name, layer in layers.items():
        input_rms = (square[name] / rows[name]) ** 0.5
        weight_norm = float(torch.linalg.vector_norm(layer.weight.detach(), dtype=torch.float64))
        coefficients[name] = gradient[name] / images * input_rms * weight_norm / layer.weight[0].numel() ** 0.5
    return coefficients


def measured_sensitivities(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """Return by layer name the mean of 1 - cosine between the features with only that layer quantized and without any.

    ``batches`` are normalised images (B, 3, S, S), or tokens (B, L) of captions. ``model`` is calibrated; a layer is
    measured with all the quantizers that it has. To compare numbers of bits, quantize and measure the model once for
    each. A batch costs one forward per layer and one more; only sums are kept, in float64. Raises UserError when there
    are no images.
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
                # Half the squared distance of unit vectors is 1 - cosine, and stays exact where both are close.
                total[name] += float((features - exact).square().sum()) / 2
            images += len(batch)
    _require_images(images)
    return {name: error / images for name, error in total.items()}


@contextmanager
def _quantized(layer: QuantLayer, weight: Quantizer | None, act: Quantizer | None) -> Iterator[None]:
    """Inside this context ``layer`` has its quantizers; afterwards it is in full precision and keeps no weight."""
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


def _require_images(images: int) -> None:
    if images == 0:
        raise UserError("there are no images to measure the layers' sensitivities on: give at least one.")
