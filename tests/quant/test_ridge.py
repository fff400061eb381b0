"""The ridge correction against scikit-learn's Ridge and a plain float64 formula, and what becomes of a model that has it."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedded_images import embedded_images
from sklearn.linear_model import Ridge as RidgeRegression
from torch import Tensor, nn

from qatlab.config import ModelConfig, compose
from qatlab.core.errors import UserError
from qatlab.deploy.integer import integer_copy, integer_layers
from qatlab.models import clip as clips
from qatlab.models.quantized import check_quantizers, fitted_copy, load_quantized, quantized_copy, save_quantized
from qatlab.quant import GPTQ, MinMax, QuantLayer, Ridge, calibrate, quant_layers, quantize
from qatlab.quant.ptq.ridge import STRENGTHS, ridge

IMAGES, WIDTH = 16, 24
WEIGHT, ACT = partial(MinMax, 8, per_channel=True, observer="mse"), partial(MinMax, 3, symmetric=False, observer="mse")


class Network(nn.Module):
    """A grouped convolution and linear layers behind it, the last of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, WIDTH, 3, stride=2, padding=1, groups=2)
        self.first, self.second = nn.Linear(WIDTH, 64), nn.Linear(64, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.gelu(self.first(self.convolution(x).flatten(2).mT))).mean(1)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(4, 4, generator=generator)
    return torch.einsum("bchw,cd->bdhw", torch.randn(2 * IMAGES, 4, 12, 12, generator=generator), mixing)


def calibrated(
    network: nn.Module, images: Tensor, compensation: Ridge | None, weight: Any = WEIGHT, act: Any = ACT, parts: int = 2
) -> nn.Module:
    model = quantize(copy.deepcopy(network), weight, act)
    if compensation is not None:
        compensation.prepare(model)
    calibrate(model, iter(images.chunk(parts)), compensation)  # one pass, as a loader that can be read once gives it
    return model


def distance(model: nn.Module, network: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        right = network(images)
        return float((model(images) - right).norm() / right.norm())


def inputs_of(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """The inputs (B, tokens, in) of a linear layer in a forward of all images."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen[0].double()


def by_formula(rounded: Tensor, errors: Tensor, weight: Tensor, strength: float) -> Tensor:
    """(A^T A / N + lambda I)^-1 A^T R / N of rows (N, n), transposed."""
    a = torch.cat([rounded, torch.ones(len(rounded), 1, dtype=torch.float64)], dim=1)
    gram = a.T @ a / len(a)
    damped = gram + strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return (torch.linalg.inv(damped) @ a.T @ (errors @ weight.T) / len(a)).T


@pytest.mark.parametrize("strength", STRENGTHS)
def test_equal_to_ridge_regression(strength: float) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(300, WIDTH, generator=generator, dtype=torch.float64).exp()
    rounded = exact.round()
    weight = torch.randn(7, WIDTH, generator=generator, dtype=torch.float64)
    a = torch.cat([rounded, torch.ones(300, 1, dtype=torch.float64)], dim=1)
    # 2 / N, as the moments are kept: the factor is the same in both and has no effect.
    found = ridge(weight, 2 / 300 * a.T @ a, 2 / 300 * (exact - rounded).T @ a, strength)
    penalty = strength * float((a.T @ a).diagonal().mean())
    peer = RidgeRegression(alpha=penalty, fit_intercept=False).fit(a.numpy(), ((exact - rounded) @ weight.T).numpy())
    np.testing.assert_allclose(found.numpy(), peer.coef_, atol=1e-9)
    assert float((found - by_formula(rounded, exact - rounded, weight, strength)).abs().max()) < 1e-9


def test_a_layer_is_corrected_behind_corrected_layers(network: nn.Module, images: Tensor) -> None:
    """The second layer's weight and bias are those of the formula for the inputs that it has in the corrected model."""
    model = calibrated(network, images, Ridge(0.01), weight=None)
    second: QuantLayer = quant_layers(model)["second"]
    assert second.act_quantizer is not None
    assert second.bias is not None
    rounded = second.act_quantizer(inputs_of(model, "second", images).float()).double().flatten(0, 1)
    exact = inputs_of(network, "second", images).flatten(0, 1)
    weight: Tensor = network.get_submodule("second").weight.detach().double()  # type: ignore[assignment,operator,union-attr]
    right = by_formula(rounded, exact - rounded, weight, 0.01)
    assert float((second.weight.detach() - weight - right[:, :-1]).abs().max()) < 1e-5
    assert float((second.bias.detach() - right[:, -1]).abs().max()) < 1e-5


def test_a_group_of_a_convolution_is_corrected_by_itself(network: nn.Module, images: Tensor) -> None:
    model = calibrated(network, images, Ridge(0.1), weight=None)
    layer: QuantLayer = quant_layers(model)["convolution"]
    exact: nn.Conv2d = network.get_submodule("convolution")  # type: ignore[assignment]
    x = layer.rounded_input(images, layer.act_quantizer)
    half = slice(WIDTH // 2, None)  # the second group reads the last two channels
    patches = [nn.functional.unfold(each[:, 2:], 3, 1, 1, 2).mT.flatten(0, 1).double() for each in (x, images)]
    rows = exact.weight.detach()[half].flatten(1).double()
    right = by_formula(patches[0], patches[1] - patches[0], rows, 0.1)
    assert float((layer.weight.detach()[half].flatten(1) - rows - right[:, :-1]).abs().max()) < 1e-5
    assert layer.bias is not None
    assert exact.bias is not None
    assert float((layer.bias.detach()[half] - exact.bias.detach()[half] - right[:, -1]).abs().max()) < 1e-5


@pytest.mark.parametrize("weight", [None, WEIGHT, partial(GPTQ, 4)])
def test_new_images_are_nearer_than_without(network: nn.Module, images: Tensor, weight: Any) -> None:
    seen, new = images[:IMAGES], images[IMAGES:]
    plain, corrected = (calibrated(network, seen, each, weight) for each in (None, Ridge()))
    assert distance(corrected, network, new) < 0.9 * distance(plain, network, new)


def test_the_grid_of_a_weight_is_that_of_the_corrected_weight(network: nn.Module, images: Tensor) -> None:
    model = calibrated(network, images, Ridge(), partial(MinMax, 4, per_channel=True))
    for name, layer in quant_layers(model).items():
        assert layer.weight_quantizer is not None
        largest = layer.weight.flatten(1).abs().amax(1, keepdim=True)
        torch.testing.assert_close(layer.weight_quantizer.scale, largest / 7)
        assert not torch.equal(layer.weight, network.get_submodule(name).weight)  # type: ignore[arg-type]


def test_what_gptq_rounds_is_the_corrected_weight(network: nn.Module, images: Tensor) -> None:
    """With damping that leaves no room for other columns, GPTQ rounds to nearest: what it rounds is then seen."""
    plain = calibrated(network, images, Ridge(), partial(MinMax, 4, per_channel=True, observer="mse"))
    rounded = calibrated(network, images, Ridge(), partial(GPTQ, 4, damping=10.0))
    first = [quant_layers(model)["convolution"].quantized_weight() for model in (plain, rounded)]
    assert float((first[0] != first[1]).float().mean()) < 0.2
    for layer in quant_layers(rounded).values():
        assert layer.weight_quantizer is not None
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)


def test_no_correction_where_none_lowers_the_error(network: nn.Module, images: Tensor) -> None:
    """Tokens of noise whose errors have nothing to do with them: what fits three quarters of the images fits no other."""
    layer = copy.deepcopy(quant_layers(calibrated(network, images, Ridge(), None))["second"])
    layer.act_quantizer = None
    noise, errors = torch.randn(2, 40, 1, 64, generator=torch.Generator().manual_seed(5))
    before = layer.weight.clone()
    with torch.no_grad():
        Ridge().correct(layer, layer, [noise], [noise + errors])
        assert torch.equal(layer.weight, before)
        Ridge(0.01).correct(layer, layer, [noise], [noise + errors])
    assert not torch.equal(layer.weight, before)


def test_batches_change_nothing_but_the_last_bits(network: nn.Module, images: Tensor) -> None:
    """The images that are held out are the same however they are batched."""
    one, other = (calibrated(network, images, Ridge(), parts=parts) for parts in (1, 4))
    first = [quant_layers(model)["convolution"].weight for model in (one, other)]
    torch.testing.assert_close(*first, atol=1e-5, rtol=1e-5)
    assert abs(distance(one, network, images) - distance(other, network, images)) < 1e-2


def test_one_image_is_enough(network: nn.Module, images: Tensor) -> None:
    model = calibrated(network, images[:1], Ridge(), parts=1)
    assert distance(model, network, images) < 1


def test_layers_whose_input_is_not_rounded_stay_as_they_are(network: nn.Module, images: Tensor) -> None:
    rules = {"first": {"act": None}}
    model = quantize(copy.deepcopy(network), WEIGHT, ACT, rules=rules)
    Ridge().prepare(model)
    calibrate(model, [images], Ridge())
    assert torch.equal(quant_layers(model)["first"].weight, network.first.weight)  # type: ignore[arg-type]
    assert quant_layers(model)["second"].bias is not None


@pytest.mark.parametrize(
    ("recipe", "options", "sentence"),
    [
        ("recipe=weight_only", [], "quant.compensate makes up for rounded inputs of layers, and none is rounded"),
        (
            "recipe=ptq",
            ["quant/weight=gptq", "quant.weight.alpha=0.25"],
            "makes up for the errors of inputs, as quant.compensate does",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(recipe: str, options: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_quantizers(compose(recipe, "quant/compensate=ridge", *options).quant)


@pytest.mark.parametrize("strength", [0, -1, "most"])
def test_a_strength_is_a_positive_number(strength: Any) -> None:
    with pytest.raises(UserError, match="strength"):
        Ridge(strength)


# -- in a tower ---------------------------------------------------------------------------------------------------------

LAST = ("quant.first=true", "quant.last=true")


@pytest.mark.parametrize("options", [("quant/weight=mse",), ("quant/weight=gptq", "quant/rewrite=rotation"), LAST])
def test_what_a_run_leaves_gives_its_outputs_bit_for_bit(tmp_path: Path, options: tuple[str, ...]) -> None:
    config = compose("recipe=ptq", "quant/act=mse", "quant.act.bits=4", "quant/compensate=ridge", *options).quant
    clip = clips.load(ModelConfig())
    seen = embedded_images(clip)
    model, config = fitted_copy(clip.visual, config, lambda: seen.split(4))
    assert all(layer.bias is not None for layer in quant_layers(model).values())
    save_quantized(model, tmp_path / "quantized.safetensors", ModelConfig(), config)
    with torch.no_grad():
        assert torch.equal(load_quantized(tmp_path)(seen), model.eval()(seen))
        assert float(torch.cosine_similarity(model(seen), clip.visual(seen)).min()) > 0.7


def test_bits_are_planned_before_layers_are_corrected() -> None:
    clip = clips.load(ModelConfig())
    images = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model, config = fitted_copy(
        clip.visual, compose("recipe=mixed_precision", "quant/compensate=ridge").quant, lambda: [images]
    )
    assert len({layer.weight_quantizer.bits for layer in quant_layers(model).values()}) > 1
    assert all(layer.bias is not None for layer in quant_layers(model).values())
    assert config.rules


def test_a_copy_without_values_takes_the_state(tmp_path: Path) -> None:
    config = compose("recipe=ptq", "quant/compensate=ridge", "quant.last=true").quant
    clip = clips.load(ModelConfig())
    names = set(quantized_copy(clip.visual, config).state_dict())
    assert "proj.bias" in names
    assert "proj.bias" not in quantized_copy(clip.visual, compose("recipe=ptq", "quant.last=true").quant).state_dict()


@torch.no_grad()
def test_an_export_multiplies_the_corrected_layers_in_integers() -> None:
    """The final projection, which had no bias, and a norm that was given one range are exported like any layer."""
    options = ("quant/act=mse", "quant.act.symmetric=false", "quant.act.bits=4", "quant/rewrite=repq", *LAST)
    clip = clips.load(ModelConfig())
    seen = embedded_images(clip)
    config = compose("recipe=ptq", "quant/compensate=ridge", "quant.compensate.strength=0.1", *options).quant
    model, _ = fitted_copy(clip.visual, config, lambda: seen.split(4))
    assert bool(quant_layers(model)["proj"].bias.any())  # type: ignore[union-attr]
    simulated = model.eval()(seen)
    exported = integer_copy(model)
    assert len(integer_layers(exported)) == len(quant_layers(model))
    # A sum of another order may fall on the other side of a rounding somewhere.
    assert float((exported(seen) - simulated).norm() / simulated.norm()) < 0.02
