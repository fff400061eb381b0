"""GPTQ against the plain loop over columns in float64, its losses against rounding to nearest, and what becomes of the model."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from embedded_images import embedded_images
from torch import Tensor, nn

from qatlab.config import ModelConfig, compose
from qatlab.core.errors import UserError
from qatlab.models import clip as clips
from qatlab.models.quantized import fitted_copy, load_quantized, save_quantized
from qatlab.quant import GPTQ, MinMax, QuantLayer, calibrate, quant_layers, quantize
from qatlab.quant.quantizers.gptq import gptq, inverse_factor

ROWS, WIDTH, IMAGES = 12, 150, 16  # more columns than one block of them


def correlated(width: int = WIDTH, count: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (count, width) that are correlated, and the same with an error of rounding."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    exact = torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing
    return exact, (exact * 4).round() / 4


def moments(exact: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    return 2 / len(exact) * rounded.T @ rounded, 2 / len(exact) * (exact - rounded).T @ rounded


def column_by_column(
    weight: Tensor, step: Tensor, hessian: Tensor, drift: Tensor, damping: float, act_order: bool, alpha: float
) -> Tensor:
    """The papers' algorithm without blocks: every column's error goes to all later columns at once."""
    weight, hessian, drift = weight.clone(), hessian.clone(), drift.clone()
    for i in range(len(hessian)):
        if hessian[i, i] == 0:
            hessian[i, i], weight[:, i], drift[:, i] = 1, 0, 0
    order = sorted(range(len(hessian)), key=lambda i: -float(hessian[i, i])) if act_order else list(range(len(hessian)))
    weight, hessian, drift = weight[:, order], hessian[order][:, order], drift[order][:, order]
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    ahead = alpha * torch.triu(drift @ upper.T, 1) @ upper
    result = torch.empty_like(weight)
    for i in range(len(hessian)):
        before = weight[:, i].clone()
        result[:, order[i]] = step[:, 0] * torch.clamp(torch.round(before / step[:, 0]), -4, 3)
        error = (before - result[:, order[i]]) / upper[i, i]
        for j in range(i, len(hessian)):
            weight[:, j] += before * ahead[i, j] - error * upper[i, j]
    return result


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_equal_to_the_loop_over_columns(act_order: bool, alpha: float, damping: float) -> None:
    exact, rounded = correlated()
    exact[:, 3] = rounded[:, 3] = 0  # an input that is always 0
    hessian, drift = moments(exact, rounded)
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = weight.abs().amax(1, keepdim=True) / 3
    right = column_by_column(weight, step, hessian, drift, damping, act_order, alpha)
    options = {"damping": damping, "act_order": act_order, "alpha": alpha}
    found = gptq(weight, step.expand_as(weight), (-4, 3), hessian, drift, **options)  # type: ignore[arg-type]
    # The error is below that of one code anywhere.
    assert float((found - right).abs().max()) < 1e-9
    assert not found[:, 3].any()


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian, _ = moments(*correlated())
    factor = inverse_factor(hessian)
    assert torch.equal(factor, factor.triu())
    assert float((factor.T @ factor @ hessian - torch.eye(WIDTH)).abs().max()) < 1e-6


@pytest.mark.parametrize("bits", [3, 4])
def test_it_loses_less_than_rounding_to_nearest(bits: int) -> None:
    exact, rounded = correlated()
    hessian, _ = moments(exact, rounded)
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = (weight.abs().amax(1, keepdim=True) / ends[1]).expand_as(weight)
    losses = []
    for found in (gptq(weight, step, ends, hessian), (weight / step).round().clamp(*ends) * step):
        error = found - weight
        losses.append(float(((error @ hessian) * error).sum()))
    assert losses[0] < 0.5 * losses[1]


# -- in a model -------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A convolution, a depthwise one, and linear layers behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, padding="valid", groups=4)
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.convolution(x).relu())
        return self.second(self.first(x.flatten(2).mT).relu()).mean(1)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(IMAGES, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def calibrated(network: nn.Module, images: Tensor, weight: Any, parts: int = 2) -> nn.Module:
    model = quantize(copy.deepcopy(network), weight, partial(MinMax, 8), patch_conv=isinstance(network, Network))
    calibrate(model, iter(images.chunk(parts)))  # one pass, as a loader that can be read once gives it
    return model


def distance(model: nn.Module, network: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        right = network(images)
        return float((model(images) - right).norm() / right.norm())


@pytest.mark.parametrize("options", [{}, {"alpha": 0.25}, {"damping": 0.1}, {"act_order": False}])
def test_a_model_is_nearer_than_by_rounding_to_nearest(
    network: nn.Module, images: Tensor, options: dict[str, Any]
) -> None:
    nearest = distance(
        calibrated(network, images, partial(MinMax, 3, per_channel=True, observer="mse")), network, images
    )
    model = calibrated(network, images, partial(GPTQ, 3, **options))
    assert distance(model, network, images) < 0.6 * nearest
    for layer in quant_layers(model).values():
        assert layer.weight_quantizer is not None
        # What is stored lies on the grid: rounding it again changes no bit.
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)


def test_groups_have_their_own_steps(images: Tensor) -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(2), nn.Linear(144, 24)).eval()
    found = []
    for weight in (
        partial(MinMax, 3, group_size=16, observer="mse"),
        partial(GPTQ, 3, per_channel=False, group_size=16),
    ):
        found.append(distance(calibrated(linear, images, weight), linear, images))
    assert found[1] < 0.8 * found[0]


def test_batches_change_nothing_but_the_last_bits(network: nn.Module, images: Tensor) -> None:
    """The images that are held out are the same however they are batched."""
    one, other = (calibrated(network, images, partial(GPTQ, 4), parts) for parts in (1, 4))
    assert abs(distance(one, network, images) - distance(other, network, images)) < 1e-3
    codes = [torch.cat([each.weight.flatten() for each in quant_layers(model).values()]) for model in (one, other)]
    assert float((codes[0] != codes[1]).float().mean()) < 0.02


def test_layers_see_the_rounded_layers_before_them(network: nn.Module, images: Tensor) -> None:
    """The second layer alone, rounded for the inputs that it has in the rounded model, gives the same weight."""
    model = calibrated(network, images, partial(GPTQ, 3, damping=0.01), 1)
    inputs: list[Tensor] = []
    second: QuantLayer = quant_layers(model)["second"]
    hook = second.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    assert second.act_quantizer is not None
    assert second.weight_quantizer is not None
    x = second.act_quantizer(inputs[0]).flatten(0, 1).double()
    step = second.weight_quantizer.scale.double().expand(-1, 64)
    right = gptq(network.second.weight.detach(), step, (-4, 3), 2 / len(x) * x.T @ x)  # type: ignore[union-attr,operator]
    assert float((right.float() != second.weight).float().mean()) < 0.01


def test_other_layers_stay_as_they_are(network: nn.Module, images: Tensor) -> None:
    rules = {"first": {"weight": None}, "second": None}
    model = quantize(copy.deepcopy(network), partial(GPTQ, 3), partial(MinMax, 8), rules=rules)
    calibrate(model, [images])
    assert torch.equal(quant_layers(model)["first"].weight, network.first.weight)  # type: ignore[arg-type]
    assert not torch.equal(quant_layers(model)["depthwise"].weight, network.depthwise.weight)  # type: ignore[arg-type]


def test_one_image_is_enough(network: nn.Module, images: Tensor) -> None:
    model = calibrated(network, images[:1], partial(GPTQ, 4), 1)
    assert distance(model, network, images) < 1


def test_what_a_run_leaves_gives_its_outputs_bit_for_bit(tmp_path: Path) -> None:
    options = ("recipe=ptq", "quant/rewrite=rotation", "quant/weight=gptq", "quant.weight.bits=4", "quant/act=mse")
    config = compose(*options).quant
    clip = clips.load(ModelConfig())
    seen = embedded_images(clip)
    model, config = fitted_copy(clip.visual, config, lambda: seen.split(4))
    save_quantized(model, tmp_path / "quantized.safetensors", ModelConfig(), config)
    with torch.no_grad():
        assert torch.equal(load_quantized(tmp_path)(seen), model.eval()(seen))
        assert float(torch.cosine_similarity(model(seen), clip.visual(seen)).min()) > 0.9


def test_activations_are_refused(network: nn.Module) -> None:
    with pytest.raises(UserError, match="GPTQ rounds weights: choose another quant/act"):
        quantize(copy.deepcopy(network), None, partial(GPTQ, 4))
