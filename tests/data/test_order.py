"""The endless sequence of samples, against one that is written out in full."""

import random
from collections import Counter
from itertools import accumulate

import numpy as np
import pytest

from qatlab.data.captions import order
from qatlab.data.captions.order import Order


class Counts:
    """Shards that are only counted; remembers which were."""

    def __init__(self, counts):
        self.counts = counts
        self.urls = [f"{number}.tar" for number in range(len(counts))]
        self.asked = []

    def count(self, shard):
        self.asked.append(shard)
        return self.counts[shard]


def written_out(seed, counts, window, epochs):
    """The definition, word by word: shards permuted, their samples in a row, each window of them permuted."""
    sequence = []
    for epoch in range(epochs):
        shards = np.random.default_rng([seed, epoch, 0]).permutation(len(counts))
        row = [(int(shard), number) for shard in shards for number in range(counts[shard])]
        for start in range(0, len(row), window):
            part = row[start : start + window]
            draw = np.random.default_rng([seed, epoch, start // window + 1]).permutation(len(part))
            sequence += [part[place] for place in draw]
    return sequence


LAYOUTS = [([7], 5), ([3, 0, 4, 10, 1], 4), ([0, 0, 8], 8), ([5] * 12, 7), ([2, 3], 100), ([6, 0], 3)]


@pytest.mark.parametrize(("counts", "window"), LAYOUTS)
@pytest.mark.parametrize("seed", [0, 3])
def test_it_is_the_sequence_written_out(monkeypatch, counts, window, seed):
    monkeypatch.setattr(order, "SHUFFLE_WINDOW", window)
    expected = written_out(seed, counts, window, 5)
    straight = Order(Counts(counts), seed)
    assert [straight.locate(position) for position in range(len(expected))] == expected
    positions = list(range(len(expected)))
    random.Random(seed).shuffle(positions)
    jumping = Order(Counts(counts), seed)
    assert all(jumping.locate(position) == expected[position] for position in positions)
    for position in positions[:5]:
        assert Order(Counts(counts), seed).locate(position) == expected[position]


def test_each_sample_stands_once_in_each_epoch_and_epochs_differ(monkeypatch):
    monkeypatch.setattr(order, "SHUFFLE_WINDOW", 4)
    made = Order(Counts([3, 5, 9]), 1)
    epochs = [[made.locate(17 * epoch + place) for place in range(17)] for epoch in range(3)]
    every = Counter((shard, number) for shard, count in enumerate([3, 5, 9]) for number in range(count))
    assert all(Counter(epoch) == every for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Order(Counts([3, 5, 9]), 2).locate(place) for place in range(17)] != epochs[0]


def test_only_the_shards_before_a_position_are_counted(monkeypatch):
    monkeypatch.setattr(order, "SHUFFLE_WINDOW", 10)
    counts = Counts([10] * 8)
    made = Order(counts, 0)
    made.locate(5)
    assert len(set(counts.asked)) == 1
    made.locate(25)
    assert len(set(counts.asked)) == 3
    made.locate(81)
    assert len(set(counts.asked)) == 8


@pytest.mark.parametrize(("counts", "window"), LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_each_shard_begins_once_in_each_epoch(monkeypatch, counts, window, batch):
    monkeypatch.setattr(order, "SHUFFLE_WINDOW", window)
    expected, position = [], 0
    for epoch in range(3):
        shards = np.random.default_rng([4, epoch, 0]).permutation(len(counts)).tolist()
        starts = [0, *accumulate(counts[shard] for shard in shards)]
        expected += [(position + start, shard) for start, shard in zip(starts, shards, strict=False)]
        position += sum(counts)
    steps = range(-(-position // batch) + 1)
    made = Order(Counts(counts), 4)
    for step in steps:
        here = [shard for start, shard in expected if step * batch <= start < (step + 1) * batch]
        if (step + 1) * batch <= position:
            assert list(made.beginning(step * batch, (step + 1) * batch)) == here
            assert list(Order(Counts(counts), 4).beginning(step * batch, (step + 1) * batch)) == here


def test_memory_is_that_of_a_window():
    made = Order(Counts([10_000] * 5_000), 0)
    assert made.locate(49_999_999)[1] < 10_000
    for epoch in (1, 2, 3):
        for window in range(4):
            made.locate(50_000_000 * epoch + 5_000 * window)
    assert sum(map(len, made._windows.values())) <= 2 * order.SHUFFLE_WINDOW
    assert len(made._epochs) <= 2
