"""The histogram's counts, percentiles and grids of least squared error against numpy on the values themselves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from qatlab.quant.quantizers.histogram import BINS, rank, search
from qatlab.quant.quantizers.observers import ActivationStatistics


def observed(x: torch.Tensor, batches: int = 4) -> ActivationStatistics:
    statistics = ActivationStatistics(histogram=True)
    for batch in x.chunk(batches):
        statistics.update(batch)
    return statistics


def samples(name: str) -> torch.Tensor:
    x = torch.randn(20001, generator=torch.Generator().manual_seed(5))
    outliers = x.clone()
    outliers[::997] *= 30
    return {"gaussian": x, "outliers": outliers, "gelu": torch.nn.functional.gelu(outliers), "above": x.abs() + 1}[name]


NAMES = ["gaussian", "outliers", "gelu", "above"]


@pytest.mark.parametrize("percent", [50.01, 90, 99.9, 99.99, 99.999, 100])
@pytest.mark.parametrize("name", NAMES)
def test_percentiles_are_numpys_to_the_width_of_a_bin(name: str, percent: float) -> None:
    x = samples(name)
    statistics, values = observed(x), x.double().numpy()
    width = 2 * statistics._histogram.edge / BINS
    both = np.percentile(np.abs(values), percent, method="inverted_cdf")
    low, high = statistics.tails(percent)
    assert float(statistics.percentile(percent)) == pytest.approx(both, abs=width)
    assert float(high) == pytest.approx(np.percentile(values, percent, method="inverted_cdf"), abs=width)
    assert float(low) == pytest.approx(-np.percentile(-values, percent, method="inverted_cdf"), abs=width)


def squared_error(x: np.ndarray, scale: float, zero: float, bits: int) -> float:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return float(np.square((np.clip(np.rint(x / scale) + zero, low, high) - zero) * scale - x).sum())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_grid_of_least_squared_error_against_all_zero_points(name: str, bits: int) -> None:
    x = samples(name)[:4001]
    scale, zero = (float(value) for value in observed(x).mse_optimal_grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    values = x.double().numpy()
    largest = (max(values.max(), 0) - min(values.min(), 0)) / (2**bits - 1)  # the step that spans all
    zeros = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    steps = np.geomspace(largest / 300, largest, 200)
    least = min(squared_error(values, s, z, bits) for s, z in itertools.product(steps, zeros))
    assert zero in zeros
    assert squared_error(values, scale, zero, bits) <= least * 1.005


@pytest.mark.parametrize("name", NAMES)
def test_the_grid_of_least_squared_error_at_8_bits(name: str) -> None:
    x = samples(name)
    statistics, values = observed(x), x.double().numpy()
    scale, zero = (float(value) for value in statistics.mse_optimal_grid(-128, 127))
    found = squared_error(values, scale, zero, 8)
    for factor, shift in itertools.product((0.5, 0.9, 0.97, 0.99, 1.01, 1.03, 1.1, 2), (-16, -4, -1, 0, 1, 4, 16)):
        assert found <= squared_error(values, scale * factor, np.clip(zero + shift, -128, 127), 8) * 1.002
    symmetric = float(statistics.mse_optimal_scale(-128, 127))
    assert found <= squared_error(values, symmetric, 0, 8) * 1.001


def test_the_error_of_a_grid_is_that_of_its_bins() -> None:
    histogram = observed(samples("gelu"))._histogram
    centres = ((np.arange(BINS) + 0.5) / (BINS / 2) - 1) * histogram.edge
    counts = histogram.counts.numpy()
    error = histogram._grid_error(-8, 7)
    scale, zero = torch.tensor([0.31, 0.0173, 4.7], dtype=torch.float64), torch.tensor([-8.0, 3, 7]).double()
    for found, s, z in zip(error(scale, zero), scale.tolist(), zero.tolist(), strict=True):
        direct = counts @ np.square((np.clip(np.rint(centres / s) + z, -8, 7) - z) * s - centres)
        assert float(found) + counts @ centres**2 == pytest.approx(direct, rel=1e-9)


@pytest.mark.parametrize(
    ("percent", "elements", "place"), [(99.9, 1000, 999), (99.99, 10_000, 9999), (99.9, 1001, 1000), (100, 7, 7)]
)
def test_a_percentile_is_the_decimal_that_was_written(percent: float, elements: int, place: int) -> None:
    assert rank(percent, elements) == place


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("draw", ["normal", "heavy", "outlier"])
def test_stopping_early_finds_the_scale_of_the_whole_search(bits: int, draw: str) -> None:
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(bits))
    if draw != "normal":
        x = x**5 if draw == "heavy" else torch.cat([x, torch.full((50, 1), 90.0)], dim=1)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def squared_error(scale: torch.Tensor) -> torch.Tensor:
        return (
            (torch.div(x, scale.float()).round().clamp(qmin, qmax) * scale.float() - x).square().sum(1, True).double()
        )

    largest = x.abs().amax(1, keepdim=True).double() / qmax
    assert torch.equal(search(squared_error, largest), search(squared_error, largest, x.shape[1]))
