"""Bits per layer under a budget: the allocation of least total cost, exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qatlab.core.errors import UserError

# Bits by which a budget may be exceeded: in floats a decimal average_bits times a size may fall just below an integer.
SLACK = 1e-9


def allocate_bits(
    costs: Sequence[Mapping[int, float]], sizes: Sequence[int], candidates: Sequence[int], average_bits: float
) -> list[int]:
    """Return the bits b_k of each layer that minimise sum_k costs[k][b_k] with sum_k sizes[k] b_k within the budget.

    ``sizes`` are the numbers of weights, ``candidates`` the bits to choose from, and the budget is ``average_bits`` *
    sum(sizes); for a model of so many bytes, ``average_bits`` = 8 * bytes / sum(sizes). An exact dynamic program (Yang
    et al. 2025, arXiv 2504.03717, "AllocateBits"): layer by layer it keeps the least cost for each number of bits
    spent, and drops a state that costs no less than one with fewer bits; sizes are divided by their greatest common
    divisor. Of equal costs the one with fewer bits is taken. A cost need not fall with the bits, and may be any finite
    number.

    Raises UserError when the budget is below the fewest bits for every layer, and for costs or sizes that do not fit.
    """
    choices = sorted(set(candidates))
    table = _table(costs, sizes, choices)
    units = np.array(sizes, dtype=np.int64) // math.gcd(*sizes)
    capacity = math.floor(average_bits * int(units.sum()) + SLACK)
    # For each layer, the least number of bits that this layer and all layers after it take.
    reserve = np.append(np.cumsum(units[::-1])[::-1], 0) * choices[0]
    if reserve[0] > capacity:
        raise UserError(
            f"average_bits is {average_bits:g}, below the {choices[0]} bits that every layer takes at the least: raise "
            "it, or add fewer bits to the candidates."
        )

    # A state is a number of bits spent so far, with the least cost that it allows; both arrays list the states.
    spent, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[np.ndarray] = []
    for k, unit in enumerate(units):
        all_spent = (spent[:, None] + unit * np.array(choices)).ravel()
        all_cost = (cost[:, None] + table[k]).ravel()
        # States are sorted by bits spent, and equal ones by cost:
        # a state is kept only if it costs less than all before it.
        order = np.lexsort((all_cost, all_spent))
        # States that leave too few bits for the layers to come are dropped.
        order = order[all_spent[order] + reserve[k + 1] <= capacity]
        before = np.minimum.accumulate(np.append(np.inf, all_cost[order]))[:-1]
        kept = order[all_cost[order] < before]
        spent, cost = all_spent[kept], all_cost[kept]
        steps.append(kept)

    # The last state costs least. An entry of ``steps`` is state * choices + choice of the layer, so that the choices
    # are read from the last layer back to the first.
    state, chosen = len(cost) - 1, []
    for kept in reversed(steps):
        state, choice = divmod(int(kept[state]), len(choices))
        chosen.append(choices[choice])
    return chosen[::-1]


def bit_rules(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], average_bits: float
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return ``quant.rules`` with the bits of ``allocate_bits`` for each layer of ``costs`` (name -> bits -> cost).

    A rule is {layer: {"weight": {"bits": b}}}: activations keep the bits of the recipe. Raises UserError as
    ``allocate_bits`` does.
    """
    candidates = sorted(set().union(*costs.values()))
    chosen = allocate_bits(list(costs.values()), [sizes[name] for name in costs], candidates, average_bits)
    return {name: {"weight": {"bits": bits}} for name, bits in zip(costs, chosen, strict=True)}


def _table(costs: Sequence[Mapping[int, float]], sizes: Sequence[int], choices: list[int]) -> np.ndarray:
    """Return the costs as (layers, choices), float64; UserError where one is missing or not finite."""
    if not costs or len(costs) != len(sizes) or not choices:
        raise UserError(
            f"there are {len(costs)} layers with costs, {len(sizes)} with sizes and {len(choices)} candidates: each layer "
            "has both, and there is at least one layer and one number of bits."
        )
    if min(sizes) < 1:
        raise UserError(f"a layer has the size {min(sizes)}: give its number of weights, at least 1.")
    for k, cost in enumerate(costs):
        wrong = [bits for bits in choices if bits not in cost or not math.isfinite(cost[bits])]
        if wrong:
            raise UserError(
                f"layer {k} has no finite cost at {wrong[0]} bits (found {cost.get(wrong[0])}): give one for each of the "
                f"candidates {', '.join(map(str, choices))}."
            )
    table = np.empty((len(costs), len(choices)))
    for k, cost in enumerate(costs):
        table[k] = [cost[bits] for bits in choices]
    return table
