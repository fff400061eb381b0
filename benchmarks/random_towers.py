"""Image towers with random weights that are no easy ones to quantize, and images for them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from open_clip.factory import get_model_config
from open_clip.model import _build_vision_tower
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qatlab.quant import MinMax, quant_layers, quantize
from qatlab.quant.inspect.hooks import on_inputs
from qatlab.quant.layers.walk import evaluating, full_precision
from qatlab.towers import open_clip_vit
from qatlab.towers.batch_norms import fold_batch_norms
from qatlab.towers.conv_edges import convolution_edges
from qatlab.towers.edges import edges_of
from qatlab.towers.structure import reads_image

# The least absmax / standard deviation of a layer's input. Gaussian inputs have 4 to 5, trained transformers' 10 to 60.
SPREAD = 6.0
LAYER_SCALES = (0.05, 0.15)
_CHANNEL = 5  # the channel that holds the outliers, as in trained transformers the same few channels do in all blocks
_ROUNDS = 10


def tower_of(name: str, images: int = 8) -> nn.Module:
    """Return the image tower of an architecture of open_clip in eval mode, drawn as ``drawn`` does."""
    torch.manual_seed(0)
    visual = built(name)
    return drawn(visual, images_for(visual, images))


def built(name: str) -> Any:
    """Return the image tower of an architecture of open_clip, as it is before a checkpoint is loaded, giving features alone."""
    config = get_model_config(name)
    if config is None:
        raise SystemExit(f"{name} is no architecture of open_clip")
    visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False))
    if open_clip_vit.matches(visual):
        open_clip_vit.give_features_alone(visual)
    return visual


@torch.no_grad()
def drawn(visual: nn.Module, images: Tensor) -> nn.Module:
    """Return ``visual`` with weights drawn anew and batch norms folded, in eval mode; it is changed in place.

    Weights are N(0, 1 / fan-in), the gains of norms U(0.5, 1.5). One channel has outliers, so that the input of every layer
    has an absmax of at least SPREAD standard deviations on ``images`` (B, 3, S, S).

    Layer scales are LAYER_SCALES, near 0.1 as trained ones, which begin near 0: with more, FastViT's mixers
    x + scale * (mixed - normalised x) take x away.
    """
    for module in visual.modules():
        for name, parameter in module.named_parameters(recurse=False):
            _draw(module, name, parameter)
        if isinstance(module, _BatchNorm):
            module.momentum = None  # the statistics of all batches that were seen count alike
    # Batch norms know the mean and the variance of what they are given, as after a training.
    visual.train()(images)
    fold_batch_norms(visual.eval())
    for _ in range(_ROUNDS):
        ratios = spreads(visual, images)
        if min(ratios.values()) >= SPREAD:
            break
        for place, (name, ratio) in enumerate(ratios.items()):
            if ratio < SPREAD:
                for maker in _makers(visual, name, list(ratios)[:place]):
                    maker[_CHANNEL] *= 1.4 * SPREAD / ratio
    return visual


def _draw(module: nn.Module, name: str, parameter: Tensor) -> None:
    """Draw a parameter that ``module`` holds itself under ``name``."""
    if name.startswith("gamma"):
        parameter.uniform_(*LAYER_SCALES)
    elif name in ("latent", "query"):
        parameter.normal_()[..., _CHANNEL] = 1.2 * SPREAD
    elif parameter.ndim > 1 and "pos" not in name:
        # Of a matrix that is applied as x @ P the inputs are the rows; all others have the outputs first.
        fan_in = parameter.shape[0] if name == "proj" else parameter[0].numel()
        parameter.normal_(std=fan_in**-0.5)
    elif name == "weight":
        parameter.uniform_(0.5, 1.5)


def _makers(visual: nn.Module, reader: str, before: list[str]) -> tuple[Tensor, ...]:
    """Return the tensors with a row for each channel of what the layer ``reader`` reads; layers ``before`` it ran before."""
    for edge in (*edges_of(visual), *convolution_edges(visual)):
        if edge.makers and reader in {each.name for each in edge.readers}:
            return edge.makers
    # Elsewhere it is the last layer before it with as many outputs, such as one that wrote to the residual stream.
    modules: dict[str, Any] = dict(visual.named_modules())
    layer = modules[reader]
    width = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    # The convolution that reads the image is quantized only on request, and comes first.
    first = [part for part in modules.values() if reads_image(part)]
    makers = [*first, *(modules[name] for name in before if name in modules)]
    makers = [part for part in makers if len(part.weight) == width]
    return tuple(part.weight for part in makers[-1:])


def spreads(visual: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the largest absolute value over the standard deviation of the input of each quantized layer, as they run."""
    # In a quantized copy attentions call their layers.
    model = quantize(copy.deepcopy(visual), partial(MinMax, 8), None)
    found: dict[str, float] = {}

    def look(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[name] = float(inputs[0].abs().max() / inputs[0].std())

    with torch.no_grad(), evaluating(model), full_precision(model), on_inputs(quant_layers(model), look):
        model(images)
    return found


def images_for(visual: Any, count: int) -> Tensor:
    """Return random images (count, 3, S, S) with the spectrum of photos: an amplitude of 1 / frequency (Field 1987)."""
    size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    frequencies = torch.fft.fftfreq(size)
    radius = (frequencies[:, None] ** 2 + frequencies**2).sqrt().clamp(min=1 / size)
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    images = torch.fft.ifft2(torch.fft.fft2(noise) / radius).real
    return images / images.std(dim=(1, 2, 3), keepdim=True)
