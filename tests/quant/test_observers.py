from __future__ import annotations

import torch

from qatlab.quant.observers import BINS, ActivationStatistics


def test_growing_ranges_lose_no_count() -> None:
    """Batches of growing size, split or whole, in any order, give the counts of one histogram over everything."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(300, generator=generator) * factor for factor in (0.01, 1, 7, 0.3)]
    growing = ActivationStatistics(histogram=True)
    for batch in batches:
        growing.update(batch)
    counts, edge = growing._counts, growing._range
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
    held = [value for value in vars(statistics).values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in held) <= BINS + 2


def test_zeros_and_empty_batches_come_before_anything_else() -> None:
    statistics = ActivationStatistics(histogram=True)
    statistics.update(torch.zeros(3, 4))
    statistics.update(torch.zeros(0, 4))
    assert float(statistics.mse_optimal_scale(-8, 7)) == 0
    statistics.update(torch.ones(3, 4))
    assert float(statistics.absmax) == 1
    assert float(statistics.mean_abs) == 0.5
