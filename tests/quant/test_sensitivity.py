"""Sensitivities against autograd image by image and against models quantized in one layer alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qatlab.core.errors import UserError
from qatlab.quant import MinMax, calibrate, full_precision, quant_layers, quantize
from qatlab.quant.bits.sensitivity import gradient_sensitivities, measured_sensitivities


@pytest.fixture
def model(build_visual, images: torch.Tensor) -> nn.Module:
    model = quantize(
        build_visual(), partial(MinMax, 4, per_channel=True), partial(MinMax, 4), patch_conv=True, final_proj=True
    )
    calibrate(model, [images])
    return model


def by_definition(model: nn.Module, images: torch.Tensor, name: str) -> float:
    """The coefficient of one layer from a forward and backward for each image."""
    layer = quant_layers(model)[name]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    gradients, rows = [], []
    generator = torch.Generator().manual_seed(3)
    with full_precision(model):
        for image in images.split(1):
            features = F.normalize(model(image), dim=-1)
            loss = (features * torch.randn(features.shape[1], generator=generator)).sum()
            x, y = seen[-1]
            gradients.append(torch.autograd.grad(loss, y)[0].norm() / y.numel() ** 0.5)
            patches = F.unfold(x, layer.kernel_size, stride=layer.stride).transpose(1, 2) if x.ndim == 4 else x
            rows.append(patches.detach().reshape(-1, layer.in_features))
    handle.remove()
    x = torch.cat(rows)
    per_row = layer.weight.detach().square().sum() / layer.in_features
    return float(torch.stack(gradients).mean() * x.square().sum(1).mean().sqrt() * per_row.sqrt())


def test_coefficients_are_those_of_the_definition(model: nn.Module, images: torch.Tensor) -> None:
    found = gradient_sensitivities(model, images.split(1), seed=3)
    assert list(found) == list(quant_layers(model))
    for name, value in found.items():
        assert value == pytest.approx(by_definition(model, images, name), rel=1e-4)
        assert value > 0


def test_batches_do_not_matter_and_nothing_is_left_behind(model: nn.Module, images: torch.Tensor) -> None:
    model.train()
    one_by_one = gradient_sensitivities(model, images.split(1))
    together = gradient_sensitivities(model, [images, images[:0]])
    assert together == pytest.approx(one_by_one, rel=1e-4)
    assert model.training
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(layer.weight.requires_grad for layer in quant_layers(model).values())
    assert all(layer.act_quantizer is not None for layer in quant_layers(model).values())
    assert not any(layer._forward_hooks for layer in quant_layers(model).values())


def test_measured_is_the_error_with_one_layer_quantized(model: nn.Module, build_visual, images: torch.Tensor) -> None:
    found = measured_sensitivities(model, images.split(2))
    assert list(found) == list(quant_layers(model))
    with torch.no_grad():
        exact = build_visual()(images)
        for name, value in found.items():
            if name == "proj":  # a rule cannot leave all other layers out and keep open_clip's bare Parameter
                continue
            rules = {name: {}, "*": None}
            alone = quantize(
                build_visual(), partial(MinMax, 4, per_channel=True), partial(MinMax, 4), rules, patch_conv=True
            )
            calibrate(alone, [images])
            expected = 1 - F.cosine_similarity(alone(images).double(), exact.double(), dim=-1)
            assert value == pytest.approx(float(expected.mean()), rel=1e-3, abs=1e-9)
    again = measured_sensitivities(model, [images])
    assert again == pytest.approx(found, rel=1e-5)


def test_no_images(model: nn.Module, images: torch.Tensor) -> None:
    for measure in (gradient_sensitivities, measured_sensitivities):
        with pytest.raises(UserError, match="no images"):
            measure(model, [images[:0]])
