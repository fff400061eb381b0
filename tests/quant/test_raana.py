"""RaanA against brute force, Max's table of uniform quantizers, and dense matrices."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn

from qatlab.core.errors import UserError
from qatlab.quant import MinMax, calibrate, layer_report, quant_layers, quantize
from qatlab.quant.layers.linear import QuantLinear
from qatlab.quant.layers.trainable import prepare_training
from qatlab.quant.quantizers.raana import RaanA
from qatlab.quant.quantizers.rabitq import best_scales, rabitq_levels

CHANNELS, WIDTH = 32, 48


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fitted(weight: torch.Tensor, bits: int, **options: object) -> RaanA:
    quantizer = RaanA(bits, channels=len(weight), width=weight[0].numel(), **options)
    quantizer.observe(weight)
    quantizer.fit()
    return quantizer


def squared_cosine(levels: torch.Tensor, rows: torch.Tensor, bits: int) -> torch.Tensor:
    y, rows = levels.double() - (2**bits - 1) / 2, rows.double()
    return (y * rows).sum(1) ** 2 / (y.square().sum(1) * rows.square().sum(1))


def swept_cosine(row: torch.Tensor, bits: int) -> float:
    """The best squared cosine after each and every breakpoint, in order, float64."""
    o, top = row.double().abs(), 2 ** (bits - 1) - 1
    breakpoints = sorted((k / float(value), i) for i, value in enumerate(o) if value > 0 for k in range(1, top + 1))
    y = torch.full_like(o, 0.5)
    best = float((y @ o) ** 2 / (y @ y))
    for _, i in breakpoints:
        y[i] += 1
        best = max(best, float((y @ o) ** 2 / (y @ y)))
    return best / float(o @ o)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_cosine_is_that_of_the_whole_sweep(bits: int) -> None:
    small = (
        gaussian(8, 16),
        gaussian(6, 33, seed=1) ** 3,
        torch.rand(4, 5, generator=torch.Generator().manual_seed(2)),
    )
    # From 6 bits on only the authors' window is looked at, where rows of a layer's width have their best.
    for rows in small if bits < 6 else (gaussian(3, 256), gaussian(2, 256, seed=1).abs()):
        found = squared_cosine(rabitq_levels(rows, bits), rows, bits)
        expected = torch.tensor([swept_cosine(row, bits) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)


def test_no_other_codes_are_closer() -> None:
    rows = gaussian(5, 4, seed=3)
    grid = torch.tensor(list(itertools.product([-1.5, -0.5, 0.5, 1.5], repeat=4)), dtype=torch.float64)
    cosines = (rows.double() @ grid.T).clamp(min=0) ** 2 / grid.square().sum(1) / rows.double().square().sum(1, True)
    torch.testing.assert_close(squared_cosine(rabitq_levels(rows, 2), rows, 2), cosines.amax(1), rtol=0, atol=2e-7)


def test_levels_are_the_vector_nearest_to_a_vector_on_the_grid() -> None:
    levels = torch.randint(0, 16, (7, 50), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    levels[:, 0] = 15
    for factor in (1.0, 1e-6, 3e5):
        assert torch.equal(rabitq_levels((levels.float() - 7.5) * factor, 4), levels)


# Max 1960, "Quantizing for minimum distortion", table II: the error of the best uniform quantizer of 2^b levels of a
# Gaussian; at 1 bit it is 1 - 2 / pi. A row of 768 has a scale of its own, so it does a little better, most at many bits.
MAX_1960 = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}


@pytest.mark.parametrize(("bits", "error"), MAX_1960.items())
def test_the_error_is_that_of_the_best_uniform_quantizer(bits: int, error: float) -> None:
    rows = gaussian(64, 768, seed=5)
    unexplained = 1 - squared_cosine(rabitq_levels(rows, bits), rows, bits).mean()
    assert 0.93 * error < unexplained < 1.02 * error


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_step_unbiased_or_of_least_squares(bits: int) -> None:
    weight = gaussian(CHANNELS, WIDTH)
    plain = {"centralize": False, "kept": 0.0}
    unbiased, least = fitted(weight, bits, **plain), fitted(weight, bits, rescale="least_squares", **plain)
    assert torch.equal(unbiased.levels, least.levels)
    square = weight.square().sum(1)
    torch.testing.assert_close((unbiased(weight) * weight).sum(1), square, rtol=1e-5, atol=0)
    error = (least(weight) - weight).square().sum(1)
    for factor in (0.99, 1.01):
        assert ((least(weight) * factor - weight).square().sum(1) > error).all()
    cosine = squared_cosine(least.levels, least.rotation(weight), bits).float()
    torch.testing.assert_close(error / square, 1 - cosine, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        (unbiased(weight) - weight).square().sum(1) / square, 1 / cosine - 1, rtol=1e-3, atol=1e-6
    )


def test_twin_against_dense_matrices_in_float64() -> None:
    weight = gaussian(CHANNELS, WIDTH, seed=6) + 3 * gaussian(WIDTH, seed=7)
    quantizer = fitted(weight, 3, kept=0.1, seed=11)
    rotation = quantizer.rotation(torch.eye(WIDTH)).double().T
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(WIDTH, dtype=torch.float64), atol=1e-6, rtol=0)
    mean = weight.double().mean(0)
    norms = (weight.double() - mean).norm(dim=1)
    assert quantizer.kept_channels.tolist() == norms.topk(3).indices.sort().values.tolist()
    expected = mean + (quantizer.step.double() * (quantizer.levels.double() - 3.5)) @ rotation
    expected[quantizer.kept_channels] = weight[quantizer.kept_channels].double()
    result = quantizer(weight)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(result[quantizer.kept_channels], weight[quantizer.kept_channels])
    # What a deployed layer computes: codes times the rotated input, and x . mu.
    x = gaussian(5, WIDTH, seed=8)
    online = quantizer.rotation(x) @ (quantizer.step * (quantizer.levels - 3.5)).T + (x @ quantizer.mean)[:, None]
    others = [i for i in range(CHANNELS) if i not in quantizer.kept_channels]
    torch.testing.assert_close(online[:, others], (x @ result.T)[:, others], rtol=1e-4, atol=1e-4)


def test_an_outlier_column_is_spread() -> None:
    weight = gaussian(64, 256, seed=9)
    weight[:, 17] *= 50
    absmax = MinMax(4, channels=64, batched=False, per_channel=True)
    absmax.observe(weight)
    absmax.fit()
    error = {q: (q(weight) - weight).square().sum() / weight.square().sum() for q in (absmax, fitted(weight, 4))}
    assert error.popitem()[1] < 0.02
    assert error.popitem()[1] > 0.05


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_state_dict_round_trip_and_idempotence(bits: int) -> None:
    weight = gaussian(CHANNELS, WIDTH, seed=10)
    quantizer = fitted(weight, bits, seed=5, kept=0.1)
    loaded = RaanA(bits, channels=CHANNELS, width=WIDTH, seed=6, kept=0.1)
    with pytest.raises(UserError, match="calibrate"):
        loaded(weight)
    state = quantizer.state_dict()
    assert state["levels"].dtype == torch.uint8
    assert int(state["levels"].max()) <= 2**bits - 1
    loaded.load_state_dict(state)
    once = quantizer(weight)
    assert torch.equal(loaded(weight), once)
    assert torch.equal(copy.deepcopy(quantizer)(weight), once)
    assert torch.equal(quantizer(once), once)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_rotated_back_there_are_two_to_the_bits_values(bits: int) -> None:
    weight = gaussian(CHANNELS, WIDTH, seed=12)
    quantizer = fitted(weight, bits, kept=0.1)
    result = quantizer(weight)
    ratio = quantizer.rotation(result - quantizer.mean) / quantizer.step
    coded = [i for i in range(CHANNELS) if i not in quantizer.kept_channels]
    levels = ratio[coded] + (2**bits - 1) / 2
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert levels.round().min() >= 0
    assert levels.round().max() <= 2**bits - 1
    assert torch.equal(levels.round(), quantizer.levels[coded].float())
    assert torch.equal(quantizer.grid_rows(result), quantizer.levels[coded].short())
    assert torch.equal(quantizer.grid_rows(result + 1), result + 1)


def test_seed_decides_the_rotation() -> None:
    weight = gaussian(CHANNELS, WIDTH, seed=13)
    assert torch.equal(fitted(weight, 3, seed=1)(weight), fitted(weight, 3, seed=1)(weight))
    assert not torch.equal(fitted(weight, 3, seed=1)(weight), fitted(weight, 3, seed=2)(weight))


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("rescale", ["unbiased", "least_squares"])
def test_zeros_and_constants_are_exact(bits: int, rescale: str) -> None:
    zero = torch.zeros(CHANNELS, WIDTH)
    assert torch.equal(fitted(zero, bits, rescale=rescale)(zero), zero)
    one_row = gaussian(CHANNELS, WIDTH)
    one_row[3] = 0
    result = fitted(one_row, bits, rescale=rescale, centralize=False)(one_row)
    assert torch.equal(result[3], torch.zeros(WIDTH))
    assert result.isfinite().all()
    equal = gaussian(WIDTH).expand(CHANNELS, WIDTH)
    torch.testing.assert_close(fitted(equal, bits, rescale=rescale)(equal), equal, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_result_has_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight = gaussian(CHANNELS, WIDTH).to(dtype)
    quantizer = fitted(weight, 8)
    assert quantizer(weight).dtype == dtype
    torch.testing.assert_close(quantizer(weight).float(), weight.float(), rtol=0.02, atol=0.05)
    assert torch.equal(quantizer.grid_rows(quantizer(weight)), quantizer.levels.short())


def test_a_layer_trains_its_input_and_not_its_weight() -> None:
    source = nn.Linear(WIDTH, CHANNELS)
    layer = QuantLinear(source, RaanA(3, channels=CHANNELS, width=WIDTH), None)
    layer.weight_quantizer.observe(layer.weight)
    layer.weight_quantizer.fit()
    x = gaussian(6, WIDTH, seed=14).requires_grad_()
    layer(x).square().sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    twin = layer.weight_quantizer(layer.weight).detach()
    reference = x.detach().clone().requires_grad_()
    nn.functional.linear(reference, twin, source.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)
    with pytest.raises(UserError, match=r"quant\.matmul=float"):
        layer.weight_quantizer.codes(layer.weight)


def test_a_tower_with_fractional_bits_beside_quantized_activations(build_visual, images: torch.Tensor) -> None:
    rules = {"*c_fc": {"weight": {"bits": 1}}, "*c_proj": {"weight": {"bits": 8}}}
    model = quantize(build_visual(), partial(RaanA, 4), partial(MinMax, 8), rules=rules, patch_conv=True)
    calibrate(model, [images])
    bits = {name: layer.weight_quantizer.bits for name, layer in quant_layers(model).items()}
    assert set(bits.values()) == {1, 4, 8}
    for layer in quant_layers(model).values():
        quantizer = layer.weight_quantizer
        assert len(quantizer.grid_rows(layer.quantized_weight()).unique()) <= 2**quantizer.bits
    assert model(images).isfinite().all()
    assert {row["weight_bits"] for row in layer_report(model, images)} == {1, 4, 8}
    with pytest.raises(UserError, match=r"quant\.matmul=int8 .*quant\.weight"):
        prepare_training(model, "eager", "int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "1 to 8"),
        ({"bits": 9}, "1 to 8"),
        ({"bits": True}, "1 to 8"),
        ({"bits": 4.0}, "1 to 8"),
        ({"batched": True}, "no activations"),
        ({"rescale": "unbiassed"}, "did you mean 'unbiased'"),
        ({"kept": 1.0}, "kept=1.0"),
        ({"kept": -0.1}, "kept=-0.1"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RaanA(**{"bits": 4, "channels": CHANNELS, "width": WIDTH, **options})


def test_bad_weights() -> None:
    quantizer = RaanA(4, channels=CHANNELS, width=WIDTH)
    with pytest.raises(UserError, match="nothing was observed"):
        quantizer.fit()
    with pytest.raises(UserError, match="32 output channels of 48"):
        quantizer.observe(gaussian(CHANNELS, WIDTH + 1))
    weight = gaussian(CHANNELS, WIDTH)
    weight[3, 4] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        quantizer.observe(weight)


def test_a_range_without_breakpoints_is_left_alone() -> None:
    equal = torch.full((2, 9), 1 / 3)
    scales = best_scales(equal, 7)
    assert scales.isfinite().all()
    assert (squared_cosine(rabitq_levels(equal, 4), equal, 4) > 1 - 1e-6).all()
