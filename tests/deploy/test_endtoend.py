"""What an integer model as a whole is held to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from qatlab.deploy.agreement import LIMIT, EndToEnd, agreement, compare_features, compare_rows


def features(distance: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    fp32 = normalize(torch.randn(40, 16, generator=generator), dim=-1)
    noise = normalize(torch.randn(40, 16, generator=generator), dim=-1)
    other = normalize(torch.randn(40, 16, generator=generator), dim=-1)
    simulated = fp32 + 0.1 * noise
    return {"fp32": fp32, "simulated": simulated, "integer": simulated + distance * other}


def test_distances_are_relative_and_agreement_is_counted() -> None:
    given, classes = features(0.05), normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    found = compare_features(**given, classes=classes)
    fp32, simulated, integer = (given[name].double().numpy() for name in ("fp32", "simulated", "integer"))
    assert found.integer == pytest.approx(((integer - simulated) ** 2).sum() ** 0.5 / (simulated**2).sum() ** 0.5)
    assert found.simulated == pytest.approx(((simulated - fp32) ** 2).sum() ** 0.5 / (fp32**2).sum() ** 0.5)
    answers = [(values @ classes.double().numpy().T).argmax(1) for values in (simulated, integer)]
    assert found.agreement == pytest.approx((answers[0] == answers[1]).mean())
    assert found.n == 40


def test_using_c1_agreement_names_every_set_with_how_many_images_it_is_of() -> None:
    measured = {"id": EndToEnd(0.01, 0.02, 1.0, 150), "ood": EndToEnd(0.01, 0.02, 25 / 30, 30)}
    assert agreement(measured) == "id 150 of 150 (100.0 %), ood 25 of 30 (83.3 %)"


@pytest.mark.parametrize(("distance", "passed"), [(0.0, True), (0.12, True), (0.14, False)])
def test_the_limit_is_what_quantization_itself_changes(distance: float, passed: bool) -> None:
    found = compare_features(**features(distance), classes=torch.eye(16))
    assert found.passed is passed is (found.integer <= LIMIT * found.simulated)


def row(stage: str, value: float, interval: tuple[float, float]) -> dict[str, Any]:
    named = {"stage": stage, "dataset": "id", "score": "zero_shot"}
    return {**named, "metrics": {"ece": value}, "intervals": {"ece": [*interval]}}


def differing(value: float, of: float, interval: tuple[float, float]) -> list[str]:
    return compare_rows([row("quantized", of, interval), row("integer", value, (0.0, 1.0))], "quantized", "integer")


def test_metrics_may_differ_by_the_simulations_interval() -> None:
    assert differing(0.65, 0.65, (0.6, 0.7)) == differing(0.695, 0.65, (0.6, 0.7)) == []
    assert differing(0.71, 0.65, (0.6, 0.7)) == ["id ece (zero_shot) 0.7100 and 0.6500 (0.6000 to 0.7000)"]
    assert differing(0.59, 0.65, (0.6, 0.7)) == ["id ece (zero_shot) 0.5900 and 0.6500 (0.6000 to 0.7000)"]


def test_an_ece_below_its_own_interval_allows_for_both_sides_of_it() -> None:
    assert differing(0.064, 0.035, (0.04, 0.09)) == differing(0.011, 0.035, (0.04, 0.09)) == []
    assert len(differing(0.095, 0.035, (0.04, 0.09)) + differing(0.009, 0.035, (0.04, 0.09))) == 2
