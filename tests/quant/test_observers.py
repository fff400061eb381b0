from __future__ import annotations

import numpy as np
import torch
from torch.ao.quantization import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)

from qatlab.quant.quantizers.histogram import BINS
from qatlab.quant.quantizers.observers import ActivationStatistics, WeightStatistics


def test_growing_ranges_lose_no_count() -> None:
    """Batches of growing size, split or whole, in any order, give the counts of one histogram over everything."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(300, generator=generator) * factor for factor in (0.01, 1, 7, 0.3)]
    growing = ActivationStatistics(histogram=True)
    for batch in batches:
        growing.update(batch)
    histogram = growing._histogram
    counts, edge = histogram.counts, histogram.edge
    everything = torch.cat(batches).double()
    assert edge >= float(everything.abs().max()) > edge / 2
    assert counts.sum() == len(everything)
    expected, _ = torch.histogram(everything, bins=BINS, range=(-edge, edge))
    # Merging bins is exact; only a value that float32 puts on an edge may lie one bin away.
    assert (counts.cumsum(0) - expected.cumsum(0)).abs().max() <= 1


def test_memory_does_not_grow_with_the_batches() -> None:
    statistics = ActivationStatistics(histogram=True)
    for seed in range(5):
        statistics.update(torch.randn(4, 100, generator=torch.Generator().manual_seed(seed)))
    held = [*vars(statistics).values(), *vars(statistics._histogram).values()]
    assert sum(value.numel() for value in held if isinstance(value, torch.Tensor)) <= BINS + 6


def test_zeros_and_empty_batches_come_before_anything_else() -> None:
    statistics = ActivationStatistics(histogram=True)
    statistics.update(torch.zeros(3, 4))
    statistics.update(torch.zeros(0, 4))
    assert float(statistics.mse_optimal_scale(-8, 7)) == 0
    statistics.update(torch.ones(3, 4))
    assert float(statistics.absmax) == 1
    assert float(statistics.mean_abs) == 0.5


def batches(seed: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 7, 9, generator=generator) * factor + 0.4 for factor in (1, 3, 0.5, 2)]


def seen(channels: int | None = None) -> ActivationStatistics:
    statistics = ActivationStatistics(histogram=False, channels=channels)
    for batch in batches():
        statistics.update(batch)
    return statistics


def test_ends_are_those_of_torchs_observers() -> None:
    statistics, peer = seen(), MinMaxObserver(dtype=torch.qint8)
    moving = MovingAverageMinMaxObserver(averaging_constant=0.1, dtype=torch.qint8)
    for batch in batches():
        peer(batch)
        moving(batch)
    assert (float(statistics.low), float(statistics.high)) == (float(peer.min_val), float(peer.max_val))
    torch.testing.assert_close(statistics.moving_low.float(), moving.min_val, rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.moving_high.float(), moving.max_val, rtol=1e-6, atol=0)


def test_ends_per_channel_are_those_of_torchs_observers() -> None:
    statistics, peer = seen(channels=9), PerChannelMinMaxObserver(ch_axis=2, dtype=torch.qint8)
    moving = MovingAveragePerChannelMinMaxObserver(averaging_constant=0.1, ch_axis=2, dtype=torch.qint8)
    for batch in batches():
        peer(batch)
        moving(batch)
    assert torch.equal(statistics.low.float(), peer.min_val)
    assert torch.equal(statistics.high.float(), peer.max_val)
    torch.testing.assert_close(statistics.moving_low.float(), moving.min_val, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(statistics.moving_high.float(), moving.max_val, rtol=1e-6, atol=1e-7)


def test_a_weights_percentile_is_numpys() -> None:
    rows = torch.randn(5, 1000, generator=torch.Generator().manual_seed(3))
    for percent in (60, 99, 99.95, 100):
        found = WeightStatistics(rows, torch.Size([5, 1])).percentile(percent)
        right = np.percentile(rows.abs().numpy(), percent, axis=1, method="inverted_cdf", keepdims=True)
        np.testing.assert_array_equal(found, right)
