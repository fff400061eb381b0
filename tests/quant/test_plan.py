"""Bits planned per layer: within the budget, the cheapest there is, and out of what the rules say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn

from qatlab.config import QuantConfig
from qatlab.core.errors import UserError
from qatlab.models import quantized as quantized_module
from qatlab.models.quantized import fitted_copy, load_quantized, quantized_copy
from qatlab.quant import MixedPrecision, full_precision, quant_layers, quantize, verify
from qatlab.quant.bits import plan

MINMAX = {"_target_": "qatlab.quant.MinMax", "bits": 8, "per_channel": True}
RAANA = {"_target_": "qatlab.quant.RaanA", "bits": 4}
ACT = {"_target_": "qatlab.quant.MinMax", "bits": 8}


class Planned:
    """A plan's bits by layer, and what it was chosen from."""

    def __init__(self, bits: dict[str, int], model: nn.Module, asked: tuple[Any, ...]) -> None:
        self.bits, self.model = bits, model
        self.costs, self.sizes, self.average = asked

    @property
    def spent(self) -> int:
        return sum(self.sizes[name] * bits for name, bits in self.bits.items())

    def cost(self, bits: dict[str, int]) -> float:
        return sum(self.costs[name][b] for name, b in bits.items())


@pytest.fixture
def planned(
    build_visual: Callable[..., nn.Module], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Planned]:
    """``planned(weight=..., rules=..., **options of MixedPrecision)``."""
    asked: list[tuple[Any, ...]] = []
    rules_of = plan.bit_rules

    def watched(costs: Any, sizes: Any, average: float) -> Any:
        asked.append((costs, sizes, average))
        return rules_of(costs, sizes, average)

    monkeypatch.setattr(plan, "bit_rules", watched)

    def build(weight: dict[str, Any] = MINMAX, rules: dict[str, Any] | None = None, **options: Any) -> Planned:
        block = {"_target_": "qatlab.quant.MixedPrecision", **options}
        config = QuantConfig(weight=weight, act=ACT, plan=block, rules=rules or {})
        model, fitted = fitted_copy(build_visual(), config, lambda: images.split(2))
        chosen = {name: rule["weight"]["bits"] for name, rule in fitted.rules.items() if name not in config.rules}
        return Planned(chosen, model, asked[-1])

    return build


# -- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sensitivity", ["measured", "gradient"])
@pytest.mark.parametrize("budget", [2, 3.3, 5, 8])
def test_the_budget_is_kept_and_no_other_allocation_within_it_costs_less(
    planned: Callable[..., Planned], sensitivity: str, budget: float
) -> None:
    found = planned(average_bits=budget, sensitivity=sensitivity)
    weights = sum(found.sizes.values())
    assert found.spent <= budget * weights
    least, candidates = found.cost(found.bits), range(2, 9)
    for bits in (b for b in candidates if b <= budget):
        assert least <= found.cost(dict.fromkeys(found.bits, bits)) * (1 + 1e-12)
    generator, names = np.random.default_rng(0), list(found.bits)
    sizes = np.array([found.sizes[name] for name in names])
    table = np.array([[found.costs[name][b] for b in candidates] for name in names])
    drawn = generator.integers(0, 7, size=(20000, len(names)))
    allowed = ((drawn + 2) * sizes).sum(1) <= budget * weights
    if allowed.any():
        assert least <= table[np.arange(len(names)), drawn[allowed]].sum(1).min() * (1 + 1e-12)
    # one bit more anywhere is either too much, or does not help
    for name, bits in found.bits.items():
        if bits < 8 and found.spent + found.sizes[name] <= budget * weights:
            assert found.costs[name][bits + 1] >= found.costs[name][bits]


def test_the_bits_planned_are_those_of_the_model_that_runs(planned: Callable[..., Planned], images: Tensor) -> None:
    found = planned(average_bits=4.5)
    rows = verify(found.model, images)
    assert {row["layer"]: row["bits"] for row in rows if row["tensor"] == "weight"} == found.bits
    assert {row["bits"] for row in rows if row["tensor"] == "act"} == {8}
    assert set(found.sizes) == set(found.bits) == set(quant_layers(found.model))
    assert len(set(found.bits.values())) > 1


def test_megabytes_are_an_average(planned: Callable[..., Planned]) -> None:
    average = planned(average_bits=4.5)
    megabytes = 4.5 * sum(average.sizes.values()) / 8 / 1e6
    found = planned(megabytes=megabytes)
    assert found.bits == average.bits
    assert found.spent / 8 <= megabytes * 1e6 * (1 + 1e-12)


def test_more_never_costs_more(planned: Callable[..., Planned]) -> None:
    found = [planned(average_bits=budget, sensitivity="gradient") for budget in np.arange(2, 8, 0.3).tolist()]
    costs = [of.cost(of.bits) for of in found]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 10 * costs[-1]
    assert set(found[0].bits.values()) == {2}
    assert set(planned(average_bits=8).bits.values()) == {8}


def test_only_the_candidates_are_chosen(planned: Callable[..., Planned]) -> None:
    found = planned(average_bits=5, candidates=[8, 3, 8, 4])
    assert set(found.bits.values()) <= {3, 4, 8}
    assert all(set(costs) == {3, 4, 8} for costs in found.costs.values())


def test_raana_with_a_fraction_of_bits_and_one_bit_too(planned: Callable[..., Planned], images: Tensor) -> None:
    found = {
        s: planned(RAANA, average_bits=2.5, candidates=list(range(1, 9)), sensitivity=s)
        for s in ("measured", "gradient")
    }
    for of in found.values():
        assert 2.5 * sum(of.sizes.values()) - max(of.sizes.values()) < of.spent <= 2.5 * sum(of.sizes.values())
        verify(of.model, images)
    tight = planned(RAANA, average_bits=1.2, candidates=list(range(1, 9)), sensitivity="gradient")
    assert 1 in tight.bits.values()
    verify(tight.model, images)


# -- what the user said ----------------------------------------------------------------------------------------------


def test_layers_that_rules_name_keep_them_and_are_no_part_of_the_budget(planned: Callable[..., Planned]) -> None:
    rules = {
        "transformer.resblocks.0.*": {"weight": {"bits": 8}, "act": {"bits": 6}},
        "*.c_proj": {"weight": None},
        "*.out_proj": None,
    }
    found = planned(rules=rules, average_bits=3)
    assert set(found.bits) == {f"transformer.resblocks.1.{name}" for name in ("attn.in_proj", "mlp.c_fc")}
    assert found.spent <= 3 * sum(found.sizes.values())
    layers = quant_layers(found.model)
    first = [layer for name, layer in layers.items() if ".0." in name]
    assert {(layer.weight_quantizer.bits, layer.act_quantizer.bits) for layer in first} == {(8, 6)}  # type: ignore[union-attr]
    assert layers["transformer.resblocks.1.mlp.c_proj"].weight_quantizer is None
    assert "transformer.resblocks.1.attn.out_proj" not in layers
    for name, bits in found.bits.items():
        assert layers[name].weight_quantizer.bits == bits  # type: ignore[union-attr]


def test_the_model_that_is_measured_stays_as_it_was(build_visual: Callable[..., nn.Module], images: Tensor) -> None:
    visual = build_visual()
    before = copy.deepcopy(visual.state_dict())
    config = QuantConfig(weight=MINMAX, act=ACT, plan={"_target_": "qatlab.quant.MixedPrecision", "average_bits": 4})
    first, fitted = fitted_copy(visual, config, lambda: [images])
    assert all(torch.equal(before[name], value) for name, value in visual.state_dict().items())
    assert config.rules == {}
    second, again = fitted_copy(visual, config, lambda: [images])
    assert again == fitted
    with torch.no_grad():
        assert torch.equal(first(images), second(images))
    rebuilt = quantized_copy(visual, fitted)
    rebuilt.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(images), first(images))


# -- sensitivities ---------------------------------------------------------------------------------------------------


def test_the_gradient_costs_are_raanas_formula(
    planned: Callable[..., Planned], build_visual: Callable[..., nn.Module], images: Tensor
) -> None:
    found = planned(average_bits=4, sensitivity="gradient", images=3)
    model = quantize(build_visual(), lambda **_: _Off(), None)
    layers = quant_layers(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0].detach().double(), y)}))
    generator = torch.Generator().manual_seed(0)
    norms: dict[str, list[float]] = {name: [] for name in layers}
    squares: dict[str, list[Tensor]] = {name: [] for name in layers}
    for image in images.split(1):
        with full_precision(model):
            features = nn.functional.normalize(model(image), dim=-1)
        direction = torch.randn(features.shape[1], generator=generator)
        gradients = torch.autograd.grad((features * direction).sum(), [seen[name][1] for name in layers])
        for name, gradient in zip(layers, gradients, strict=True):
            norms[name].append(float(gradient.double().square().mean().sqrt()))
            squares[name].append(seen[name][0].flatten(0, -2).square().sum(1))
    for name, layer in layers.items():
        rows = torch.cat(squares[name]).mean().sqrt()
        weight = (layer.weight.detach().double().square().sum() / layer.in_features).sqrt()
        coefficient = float(np.mean(norms[name]) * rows * weight)
        assert found.costs[name] == pytest.approx({b: coefficient * 2.0**-b for b in range(2, 9)}, rel=1e-4)


class _Off(nn.Module):
    """In the place of a quantizer where everything runs in full precision."""


@torch.no_grad()
def test_the_measured_costs_are_the_drift_at_the_middle_times_the_ratio_of_errors(
    planned: Callable[..., Planned], build_visual: Callable[..., nn.Module], images: Tensor
) -> None:
    found = planned(average_bits=4, candidates=[3, 5, 8], images=2)
    visual, few = build_visual(), images[:2]
    exact = nn.functional.normalize(visual(few).double(), dim=-1)
    for name in ("transformer.resblocks.0.mlp.c_proj", "transformer.resblocks.1.mlp.c_fc"):
        error, drift = {}, 0.0
        weight = visual.get_submodule(name).weight
        held = weight.clone()
        for bits in (3, 5, 8):
            step = held.double().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            rounded = (held.double() / step).round() * step
            error[bits] = float((rounded - held).square().sum())
            if bits == 5:
                weight.copy_(rounded)
                features = nn.functional.normalize(visual(few).double(), dim=-1)
                drift = float((1 - (features * exact).sum(1)).mean())
                weight.copy_(held)
        assert found.costs[name] == pytest.approx({b: drift * error[b] / error[5] for b in error}, rel=1e-3)


# -- mistakes, and starting again ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"average_bits=None and megabytes=None: it takes one of the two"),
        ({"average_bits": 4, "megabytes": 1}, r"average_bits=4 and megabytes=1: it takes one of the two"),
        (
            {"average_bits": 4, "sensitivity": "gradients"},
            r"sensitivity=gradients is unknown \(did you mean 'gradient'",
        ),
        ({"average_bits": 4, "images": 0}, "images=0: it takes a whole number from 1 on"),
        ({"average_bits": 1.9}, r"allows 1\.9 bits .* least of its candidates is 2: raise average_bits"),
        ({"average_bits": 0}, "average_bits=0: it takes a number from 1 to 8"),
        ({"megabytes": 0.001}, r"allows 0\.\d+ bits for each of [\d,]+ weights"),
        ({"average_bits": 8, "candidates": [8, 9]}, "candidates=.*each a whole number from 1 to 8"),
    ],
)
def test_a_plan_that_cannot_be(planned: Callable[..., Planned], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        planned(**options)
    assert "\n" not in str(told.value)


def test_nothing_to_plan_and_nothing_to_measure_on(
    build_visual: Callable[..., nn.Module], images: Tensor, planned: Callable[..., Planned]
) -> None:
    with pytest.raises(UserError, match=r"quant\.plan has no layer to choose bits for"):
        planned(rules={"*": {"weight": {"bits": 8}}}, average_bits=4)
    block = {"_target_": "qatlab.quant.MixedPrecision", "average_bits": 4}
    with pytest.raises(UserError, match=r"quant\.plan has no layer to choose bits for: give quant/weight="):
        fitted_copy(build_visual(), QuantConfig(act=ACT, plan=block), lambda: [images])
    for sensitivity in ("measured", "gradient"):
        config = QuantConfig(weight=MINMAX, plan={**block, "sensitivity": sensitivity})
        with pytest.raises(UserError, match="no images"):
            fitted_copy(build_visual(), config, lambda: [])


def test_only_so_many_images_are_looked_at(
    build_visual: Callable[..., nn.Module], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    measure = plan.measured_sensitivities

    def counting(model: nn.Module, batches: list[Tensor]) -> dict[str, float]:
        looked.append(sum(map(len, batches)))
        return measure(model, batches)

    monkeypatch.setattr(plan, "measured_sensitivities", counting)
    for count in (1, 2, 3, 50):
        block = {"_target_": "qatlab.quant.MixedPrecision", "average_bits": 4, "images": count}
        fitted_copy(build_visual(), QuantConfig(weight=MINMAX, plan=block), lambda: images.split(2))
    assert looked == [1, 2, 3, 3]


def test_a_resumed_run_keeps_its_bits_and_measures_nothing(
    small_fit: Callable[..., Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["suite.images=4", "callbacks.ood=null", "callbacks.temperature=null"]
    run = small_fit("mixed_precision", tmp_path, *options)
    rows, stored = run.rows(), (run.folder / "quantized.safetensors").read_bytes()
    layers = pl.read_csv(run.folder / "layers.csv")
    (run.folder / "results.jsonl").unlink()

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(plan, "measured_sensitivities", refuse)
    monkeypatch.setattr(MixedPrecision, "__call__", refuse)
    monkeypatch.setattr(quantized_module, "calibrate", refuse)
    again = small_fit("mixed_precision", tmp_path, *options)
    assert again.folder == run.folder
    assert again.rows() == rows
    assert (run.folder / "quantized.safetensors").read_bytes() == stored
    found = {name: layer.weight_quantizer.bits for name, layer in quant_layers(load_quantized(run.folder)).items()}
    assert found == dict(zip(layers["layer"], layers["weight_bits"], strict=True))
    sizes = (layers["in_features"] * layers["out_features"]).to_numpy()
    average = float((sizes * layers["weight_bits"].to_numpy()).sum() / sizes.sum())
    assert 5 < average <= 6
    assert all(row["weight_bits"] == pytest.approx(average) for row in rows if row["stage"] == "quantized")
