"""Ids, definitions, names and rows that users keep are those of tests/golden/, or CHANGELOG says why not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_values
import pytest
import torch

from qatlab.results.run import Run


def test_run_and_evaluation_ids() -> None:
    assert golden_values.ids() == golden_values.stored("ids")


def test_state_dict_names() -> None:
    assert golden_values.states() == golden_values.stored("states")


def test_definitions_ids_of_images_and_store_keys(cold: Path, tmp_path: Path) -> None:
    assert golden_values.sets(tmp_path) == golden_values.stored("sets")


@pytest.mark.parametrize("recipe", golden_values.RUNS)
def test_rows(recipe: str, small_fit: Callable[..., Run], tmp_path: Path) -> None:
    found, known = golden_values.rows(small_fit, tmp_path)[recipe], golden_values.stored("rows")[recipe]
    assert len(found) == len(known)
    for one, other in zip(found, known, strict=True):
        assert differences(one, other, tolerance(other)) == []


# The rows were made on a CPU without AVX-512. Where products are summed in another order, values on the border between two
# codes of a quantizer change sides, and what rests on a quantized model moves by more than last bits.
MADE_ON = "AVX2"


def tolerance(row: dict[str, Any]) -> float:
    """Return by how much the numbers of a row may differ on this machine."""
    exact = row["stage"] == "fp32" or torch.backends.cpu.get_cpu_capability() == MADE_ON
    return 1e-6 if exact else 0.1  # three images of 32


def differences(found: Any, known: Any, within: float = 1e-6, where: str = "") -> list[str]:
    """Where two rows differ: keys and texts at all, numbers by more than ``within``, counts by more than 1."""
    if isinstance(known, dict) and isinstance(found, dict):
        if list(found) != list(known):
            return [f"{where}: {list(found)} and {list(known)}"]
        differing = []
        for key in known:
            if key == "p_value" and within > 1e-6:  # of a test on 32 images, one of which may turn it around
                continue
            differing += differences(found[key], known[key], within, f"{where}.{key}")
        return differing
    if isinstance(known, list) and isinstance(found, list) and len(found) == len(known):
        differing = []
        for i, (one, other) in enumerate(zip(found, known, strict=True)):
            differing += differences(one, other, within, f"{where}[{i}]")
        return differing
    if type(found) is type(known) is int:
        same = abs(found - known) <= 1
    elif isinstance(known, float) and isinstance(found, float):
        same = math.isclose(found, known, rel_tol=within, abs_tol=within) or (math.isnan(found) and math.isnan(known))
    else:
        same = found == known
    return [] if same else [f"{where}: {found!r} and {known!r}"]
