"""Outlier channels against plain sums in float64: the layer, the choice, a run's file, training, and options of others."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qatlab
from qatlab.config import ModelConfig, compose
from qatlab.core.errors import UserError
from qatlab.models import clip as clips
from qatlab.models.quantized import fitted_copy, load_quantized, save_quantized
from qatlab.quant import (
    GPTQ,
    LRQAT,
    LSQ,
    LoRA,
    LSQPlus,
    MinMax,
    OutlierChannels,
    calibrate,
    full_precision,
    layer_report,
    merge,
    quant_layers,
    quantize,
    verify,
)
from qatlab.quant.inspect.coverage import coverage
from qatlab.quant.inspect.kept import kept_channels, told
from qatlab.quant.quantizers.dynamic import DynamicMinMax
from qatlab.quant.rewrites.inputs import LayerInputs
from qatlab.quant.rewrites.outlier_channels import OPENING, _measured, within_budget

OUTLIERS = (3, 11)  # the channels that are a hundred times as large as others
W8, A8 = partial(MinMax, 8, per_channel=True), partial(MinMax, 8)


class Two(nn.Module):
    """Two linear layers: the input of the first has OUTLIERS, that of the second none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return the second layer's output."""
        return self.second(self.first(x).tanh())


@pytest.fixture
def plain() -> Two:
    torch.manual_seed(0)
    return Two()


@pytest.fixture
def inputs() -> Tensor:
    x = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(1))
    x[..., list(OUTLIERS)] *= 100
    return x


def made(
    plain: nn.Module, inputs: Tensor, weight: Any = W8, act: Any = A8, adapter: Any = None, **options: Any
) -> nn.Module:
    model = quantize(copy.deepcopy(plain), weight, act, adapter=adapter)
    OutlierChannels(**(options or {"channels": 2, "layers": "first"}))(model, [inputs[:5], inputs[5:]])
    calibrate(model, [inputs])
    return model.eval()


@torch.no_grad()
def test_the_layer_is_its_formula(plain: Two, inputs: Tensor) -> None:
    layer = made(plain, inputs).first
    assert layer.outliers.channels.tolist() == list(OUTLIERS)
    x, weight = inputs.double(), plain.first.weight.detach().double()
    rest = [channel for channel in range(16) if channel not in OUTLIERS]
    # absmax grids of what is left of both
    step = x[..., rest].abs().max() / 127
    rounded = torch.clamp(torch.round(x[..., rest] / step), -128, 127) * step
    steps = weight[:, rest].abs().amax(1, keepdim=True) / 127
    codes = torch.clamp(torch.round(weight[:, rest] / steps), -128, 127) * steps
    expected = rounded @ codes.T + x[..., OUTLIERS] @ weight[:, OUTLIERS].T + plain.first.bias.double()
    torch.testing.assert_close(layer(inputs).double(), expected, rtol=1e-5, atol=1e-4)
    assert float(layer.weight[:, list(OUTLIERS)].abs().max()) == 0
    assert float(layer.weight_codes(torch.int8)[:, list(OUTLIERS)].abs().max()) == 0


@torch.no_grad()
def test_it_is_exact_before_rounding(plain: Two, inputs: Tensor) -> None:
    expected = copy.deepcopy(plain).double()(inputs.double())
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        model = made(plain, inputs, channels=4).to(dtype)
        with full_precision(model):
            output = model(inputs.to(dtype)).double()
        assert float((output - expected).norm() / expected.norm()) < limit


@torch.no_grad()
def test_the_range_is_that_of_the_rest(plain: Two, inputs: Tensor) -> None:
    exact = plain(inputs)
    model, without = made(plain, inputs), quantize(copy.deepcopy(plain), W8, A8)
    calibrate(without, [inputs])
    assert float(model.first.act_quantizer.scale) < float(without.first.act_quantizer.scale) / 20
    assert float((model(inputs) - exact).norm()) < float((without(inputs) - exact).norm()) / 5


@pytest.mark.parametrize(
    "act", [A8, partial(MinMax, 8, symmetric=False), partial(LSQPlus, 8), partial(DynamicMinMax, 8)]
)
@pytest.mark.parametrize("weight", [W8, partial(LSQ, 8), partial(GPTQ, 8)])
@torch.no_grad()
def test_it_goes_with_every_quantizer(plain: Two, inputs: Tensor, weight: Any, act: Any) -> None:
    exact = plain(inputs)
    model = made(plain, inputs, weight, act)
    assert float((model(inputs) - exact).norm() / exact.norm()) < 0.03
    # What the integer product's inputs hold in these channels is nothing that it sees.
    layer, other = model.first, inputs.clone()
    other[..., list(OUTLIERS)] = 7.0
    torch.testing.assert_close(layer.base(other), layer.base(inputs), rtol=0, atol=0)
    verify(model, inputs)


# -- the choice ----------------------------------------------------------------------------------------------------------


def test_a_budget_is_spent_where_it_gains_most() -> None:
    errors = {"a": {0: 1.0, 1: 0.9, 2: 0.1}, "b": {0: 0.5, 1: 0.4}}
    products = {"a": 1.0, "b": 1.0}
    assert within_budget(errors, products, OPENING) == {"a": 0, "b": 0}
    assert within_budget(errors, products, OPENING + 1) == {"a": 1, "b": 0}
    assert within_budget(errors, products, OPENING + 2) == {"a": 2, "b": 0}
    assert within_budget(errors, products, 2 * OPENING + 3) == {"a": 2, "b": 1}
    assert within_budget(errors, {"a": 9.0, "b": 1.0}, 2 * OPENING) == {"a": 0, "b": 1}


@pytest.mark.parametrize("count", [0, 1, 2, 4])
@torch.no_grad()
def test_the_error_of_a_choice_is_its_formula(plain: Two, inputs: Tensor, count: int) -> None:
    layer = quantize(copy.deepcopy(plain), W8, A8).first
    seen = LayerInputs(sampled=True)  # all 40 tokens
    seen.update(inputs)
    found = _measured(layer, seen, len(inputs))
    x, weight = inputs.double().reshape(-1, 16), plain.first.weight.double()
    largest = x.abs().amax(0).argsort(descending=True)[:count]
    rest = x.clone()
    rest[:, largest] = 0
    step = rest.abs().max() / 127
    error = (torch.round(rest / step).clamp(-128, 127) * step - rest) @ weight.T
    expected = (error.square().sum(1) / (x @ weight.T).square().sum(1)).mean()
    assert found.errors[count] == pytest.approx(float(expected), rel=1e-3)
    assert found.products == 12 * 5  # outputs times tokens of an image


def exhaustive(errors: dict[str, dict[int, float]], products: dict[str, float], budget: float) -> float:
    """The least sum of errors that any choice within the budget has."""
    best = [(0.0, 0.0)]
    for name, by_count in errors.items():
        costs = {count: products[name] * (count + OPENING if count else 0) for count in by_count}
        best = [(cost + costs[count], error + by_count[count]) for cost, error in best for count in by_count]
        best = [(cost, error) for cost, error in best if cost <= budget]
    return min(error for _, error in best)


@pytest.mark.parametrize("seed", range(6))
def test_the_greedy_choice_is_near_the_best_and_within_the_budget(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    errors: dict[str, dict[int, float]] = {}
    for name in "abcdef":
        falls = torch.rand(4, generator=generator, dtype=torch.float64).cumsum(0)
        errors[name] = {0: 3.0, **{2**i: 3.0 - float(fall) / 2 for i, fall in enumerate(falls)}}
    products = {name: 1.0 + i % 2 for i, name in enumerate(errors)}
    budget = 3.5 * OPENING
    kept = within_budget(errors, products, budget)
    assert sum(products[name] * (count + OPENING) for name, count in kept.items() if count) <= budget
    found = sum(errors[name][count] for name, count in kept.items())
    best, nothing = exhaustive(errors, products, budget), sum(by_count[0] for by_count in errors.values())
    assert best - 1e-9 <= found <= best + 0.35 * (nothing - best)


def test_a_layer_without_outliers_is_not_opened() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 64))
    x = torch.randn(6, 9, 256, generator=torch.Generator().manual_seed(2))
    x[..., 17] *= 200
    # only the first layer's input has a channel that is worth an opening within this budget
    budget = 1.01 * 64 * (OPENING + 1) / (64 * (256 + 64))
    kept = kept_channels(made(model, x, budget=budget))
    assert kept == {"0": 1}


def test_the_choice_does_not_depend_on_batches(plain: Two, inputs: Tensor) -> None:
    chosen = []
    for size in (1, 3, 8):
        model = quantize(copy.deepcopy(plain), W8, A8)
        OutlierChannels(channels=3)(model, inputs.split(size))
        chosen.append([layer.outliers.channels.tolist() for layer in quant_layers(model).values()])
    assert chosen[0] == chosen[1] == chosen[2]


# -- files ---------------------------------------------------------------------------------------------------------------

BLOCK = {"_target_": "qatlab.quant.OutlierChannels", "channels": 3, "layers": "*mlp*"}


@pytest.fixture(scope="module")
def clip() -> Any:
    return clips.load(ModelConfig())


@pytest.fixture(scope="module")
def images(clip: Any) -> Tensor:
    return clip.preprocess.normalize(qatlab.pixels(qatlab.load_suite(clip, "suite.images=8")["id"]))


@pytest.mark.parametrize(
    "rewrite", ["outlier_channels", "[rotation,outlier_channels]", "[smoothquant,outlier_channels]"]
)
def test_a_file_gives_the_same_model(clip: Any, images: Tensor, tmp_path: Path, rewrite: str) -> None:
    overrides = ["quant.outliers.channels=3", "quant.outliers.budget=null", "quant.outliers.layers=*c_proj"]
    quant = compose("recipe=ptq", f"quant/rewrite={rewrite}", *overrides).quant
    model, planned = fitted_copy(clip.visual, quant, lambda: images.split(4))
    assert set(kept_channels(model).values()) == {3}
    assert len(kept_channels(model)) == len(quant_layers(model)) // 4
    save_quantized(model, tmp_path / "quantized.safetensors", ModelConfig(), planned)
    loaded = load_quantized(tmp_path / "quantized.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    assert kept_channels(loaded) == kept_channels(model)


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        (torch.tensor([1, 2, 192]), "go from 1 to 192"),
        (torch.tensor([-1, 2, 3]), "go from -1 to 3"),
        (torch.tensor([5, 2, 5]), "name a channel twice"),
        (torch.tensor([1.0, 2.0, 3.0]), "expected int64 of one"),
        (torch.tensor([[1, 2, 3]]), "expected int64 of one"),
        (torch.tensor([1, 2]), "size mismatch"),
    ],
)
def test_wrong_channels_of_a_file_are_refused(
    clip: Any, images: Tensor, tmp_path: Path, channels: Tensor, said: str
) -> None:
    quant = compose("recipe=ptq").quant
    quant.outliers = BLOCK
    model, planned = fitted_copy(clip.visual, quant, lambda: images.split(8))
    layer = quant_layers(model)["transformer.resblocks.0.mlp.c_fc"]
    layer.outliers.channels = channels
    save_quantized(model, tmp_path / "quantized.safetensors", ModelConfig(), planned)
    with pytest.raises(UserError, match=said):
        load_quantized(tmp_path / "quantized.safetensors")


def test_a_second_fit_gives_the_same_bits(clip: Any, images: Tensor) -> None:
    quant = compose("recipe=ptq", "quant/rewrite=outlier_channels").quant
    states = [fitted_copy(clip.visual, quant, lambda: images.split(8))[0].state_dict() for _ in range(2)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# -- training ------------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_unfused_layer(plain: Two, inputs: Tensor) -> None:
    layer = made(plain, inputs, partial(LSQ, 8), partial(LSQ, 8)).first.train()
    x = inputs.clone().requires_grad_()
    layer(x).square().sum().backward()
    fused = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()} | {"x": x.grad.clone()}
    layer.zero_grad()
    x.grad = None
    masked = x * torch.tensor([channel not in OUTLIERS for channel in range(16)])
    side = F.linear(x[..., list(OUTLIERS)], layer.outliers.weight)
    y = F.linear(layer.act_quantizer(masked), layer.weight_quantizer(layer.weight), layer.bias) + side
    y.square().sum().backward()
    for name, gradient in fused.items():
        expected = x.grad if name == "x" else layer.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-3)
    assert float(fused["outliers.weight"].abs().max()) > 0
    assert float(fused["weight"][:, list(OUTLIERS)].abs().max()) == 0


def test_what_learns_is_what_has_channels(plain: Two, inputs: Tensor) -> None:
    model = made(plain, inputs, channels=2, layers="first")
    OutlierChannels(channels=2).prepare(model)
    assert not model.first.outliers.weight.requires_grad  # processes would wait for the gradient of what is not used
    model.load_state_dict({**model.state_dict(), **made(plain, inputs, channels=2).state_dict()})
    assert model.first.outliers.weight.requires_grad
    assert model.second.outliers.weight.shape == (8, 2)


def test_a_frozen_layer_keeps_frozen_columns(plain: Two, inputs: Tensor) -> None:
    model = made(plain, inputs, adapter=partial(LoRA, rank=2))
    assert not model.first.outliers.weight.requires_grad
    with torch.no_grad():
        model.first.adapter.up.fill_(0.01)
        expected = model.first.base(inputs) + model.first.outliers(inputs) + model.first.adapter(inputs)
        assert torch.equal(model.first(inputs), expected)


def test_lr_qat_is_merged_as_it_is(plain: Two, inputs: Tensor, train_a_little: Any) -> None:
    model = made(plain, inputs, partial(LRQAT, 8, rank=2), partial(LSQ, 8)).train()
    train_a_little(model, inputs, 0.01)
    model.eval()
    with torch.no_grad():
        before = model(inputs)
        assert torch.equal(merge(model)(inputs), before)


# -- what is told --------------------------------------------------------------------------------------------------------


def test_reports_count_the_channels(clip: Any, images: Tensor) -> None:
    quant = compose("recipe=ptq").quant
    quant.outliers = BLOCK
    model, _ = fitted_copy(clip.visual, quant, lambda: images.split(8))
    rows = {row["layer"]: row for row in layer_report(model, images)}
    assert {name for name, row in rows.items() if row["outlier_channels"]} == set(kept_channels(model))
    name = "transformer.resblocks.0.mlp.c_proj"
    found: list[Tensor] = []
    layer = model.get_submodule(name)
    with layer.register_forward_pre_hook(lambda _, given: found.append(given[0])), full_precision(model):
        model(images)
    rest = found[0].double()
    rest[..., layer.outliers.channels] = 0
    rounded = layer.act_quantizer(rest.float()).double()
    ratio = 10 * torch.log10(rest.square().sum() / (rest - rounded).square().sum()).detach()
    assert rows[name]["act_sqnr_db"] == pytest.approx(float(ratio), abs=1e-3)
    shares = coverage(model, images[:1], {})
    side = [of for of in shares.products if of.layer.endswith(".outliers")]
    assert len(side) == 8
    assert not any(of.weight or of.act for of in side)
    by_name = {of.layer: of.macs for of in shares.products}
    assert by_name[f"{name}.outliers"] / by_name[name] == 3 / layer.in_features
    assert told(kept_channels(model)).startswith("8 layers keep input channels in full precision, 24 of them: ")
    assert told({}) == "No layer keeps an input channel in full precision"


# -- mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"channels": 2, "budget": 0.1}])
def test_channels_or_a_budget(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="give one of the two"):
        OutlierChannels(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"channels": 0}, "channels=0"), ({"budget": 0.0}, "budget=0.0"), ({"budget": 1.5}, "budget=1.5")],
)
def test_values_outside_the_domain(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        OutlierChannels(**options)


def test_what_cannot_be_chosen_is_refused(plain: Two, inputs: Tensor) -> None:
    with pytest.raises(UserError, match=r"layers=third matches no linear layer"):
        made(plain, inputs, channels=2, layers="third")
    with pytest.raises(UserError, match="matches no linear layer whose input is rounded"):
        made(plain, inputs, act=None, channels=2)
    with pytest.raises(UserError, match="no images"):
        OutlierChannels(channels=2)(quantize(copy.deepcopy(plain), W8, A8), [])
    broken = inputs.clone()
    broken[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="layer first, input: it holds NaN"):
        OutlierChannels(channels=2)(quantize(copy.deepcopy(plain), W8, A8), [broken])


def test_more_channels_than_a_layer_has_are_all(plain: Two, inputs: Tensor) -> None:
    model = made(plain, inputs, channels=100)
    assert kept_channels(model) == {"first": 16, "second": 12}
    torch.testing.assert_close(model(inputs), plain(inputs))


def test_convolutions_are_left_alone(visual: nn.Module) -> None:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = quantize(visual, W8, A8, patch_conv=True)
    OutlierChannels(channels=1)(model, [images])
    assert "conv1" in quant_layers(model)
    assert set(kept_channels(model)) == set(quant_layers(model)) - {"conv1"}
