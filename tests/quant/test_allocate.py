"""The allocation of bits against exhaustive search."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from qatlab.core.errors import UserError
from qatlab.quant.bits.allocate import allocate_bits, bit_rules

Costs = Sequence[dict[int, float]]


def exhaustive(costs: Costs, sizes: list[int], candidates: Sequence[int], average_bits: float) -> float:
    """The least cost of all combinations that are within the budget."""
    budget = average_bits * sum(sizes) + 1e-6
    totals = [
        sum(cost[bits] for cost, bits in zip(costs, chosen, strict=True))
        for chosen in itertools.product(candidates, repeat=len(sizes))
        if sum(size * bits for size, bits in zip(sizes, chosen, strict=True)) <= budget
    ]
    return min(totals)


@pytest.mark.parametrize("seed", range(40))
def test_no_combination_is_cheaper(seed: int) -> None:
    random = np.random.default_rng(seed)
    layers, candidates = int(random.integers(1, 6)), [1, 2, 3, 4, 6, 8][int(random.integers(0, 2)) :]
    sizes = [int(size) for size in random.integers(1, 9, layers) * random.choice([1, 768])]
    coefficients = random.lognormal(0, 2, layers)
    falling = [{b: float(c) * 2.0**-b for b in candidates} for c in coefficients]
    anything = [{b: float(random.normal()) for b in candidates} for _ in sizes]
    for costs in (falling, anything):
        average_bits = float(random.uniform(candidates[0], 8.5))
        chosen = allocate_bits(costs, sizes, candidates, average_bits)
        assert sum(size * bits for size, bits in zip(sizes, chosen, strict=True)) <= average_bits * sum(sizes) + 1e-6
        total = sum(cost[bits] for cost, bits in zip(costs, chosen, strict=True))
        assert total == pytest.approx(exhaustive(costs, sizes, candidates, average_bits), rel=1e-12)


@pytest.mark.parametrize("average_bits", [2.0, 2.1, 2.3, 2.5, 3.3, 4.7, 6.0, 7.9])
def test_fractional_averages_are_used_up(average_bits: float) -> None:
    """The 48 layers of a ViT-B, in units of 768 * 768: the gap to the budget is below one bit of the smallest layer."""
    sizes = [3 * 768**2, 768**2, 4 * 768**2, 4 * 768**2] * 12
    coefficients = np.random.default_rng(0).lognormal(0, 1, 48)
    chosen = allocate_bits(
        [{b: c * 2.0**-b for b in range(1, 9)} for c in coefficients], sizes, range(1, 9), average_bits
    )
    spent = sum(size * bits for size, bits in zip(sizes, chosen, strict=True)) / sum(sizes)
    assert average_bits - 1 / 144 < spent <= average_bits + 1e-9
    assert len(set(chosen)) > 1


def test_an_exact_budget_survives_decimals() -> None:
    assert allocate_bits([{2: 1.0, 3: 0.0}] * 10, [1] * 10, [2, 3], 2.3).count(3) == 3


def test_sizes_without_a_common_divisor() -> None:
    """Half a billion units: a table over all of them would not fit, the choices worth keeping do."""
    random = np.random.default_rng(1)
    sizes = [int(size) | 1 for size in random.integers(1_000_000, 9_000_000, 12)]
    costs = [{b: float(c) * 2.0**-b for b in (2, 4, 8)} for c in random.lognormal(0, 1, 12)]
    chosen = allocate_bits(costs, sizes, [2, 4, 8], 4.4)
    combinations = np.array(list(itertools.product([2, 4, 8], repeat=12)), dtype=np.int64)
    within = combinations @ np.array(sizes) <= 4.4 * sum(sizes)
    table = np.array([[cost[b] for b in (2, 4, 8)] for cost in costs])
    totals = table[np.arange(12), np.searchsorted([2, 4, 8], combinations[within])].sum(1)
    assert sum(cost[b] for cost, b in zip(costs, chosen, strict=True)) == pytest.approx(totals.min(), rel=1e-12)


def test_equal_costs_take_fewer_bits() -> None:
    assert allocate_bits([{2: 1.0, 4: 1.0, 8: 1.0}] * 3, [5, 5, 5], [8, 4, 2], 8) == [2, 2, 2]


def test_rules() -> None:
    costs = {"a.in_proj": {2: 9.0, 8: 0.0}, "b": {2: 1.0, 8: 0.5}}
    sizes = {"b": 4, "a.in_proj": 4, "unused": 1}
    assert bit_rules(costs, sizes, 5.0) == {
        "a.in_proj": {"weight": {"bits": 8}},
        "b": {"weight": {"bits": 2}},
    }
    assert bit_rules(costs, sizes, 8.0)["b"] == {"weight": {"bits": 8}}


def test_what_cannot_be_allocated() -> None:
    costs = [{2: 1.0, 4: 0.5}]
    with pytest.raises(UserError, match=r"average_bits is 1\.5, below the 2 bits"):
        allocate_bits(costs, [10], [2, 4], 1.5)
    with pytest.raises(UserError, match="layer 0 has no finite cost at 8 bits"):
        allocate_bits(costs, [10], [2, 8], 4)
    with pytest.raises(UserError, match=r"layer 0 has no finite cost at 4 bits .found nan"):
        allocate_bits([{2: 1.0, 4: float("nan")}], [10], [2, 4], 4)
    with pytest.raises(UserError, match="size 0"):
        allocate_bits(costs, [0], [2, 4], 4)
    with pytest.raises(UserError, match="1 layers with costs, 2 with sizes"):
        allocate_bits(costs, [1, 2], [2, 4], 4)
    with pytest.raises(UserError, match="0 candidates"):
        allocate_bits(costs, [1], [], 4)
