"""In which order samples are trained on: an endless sequence, a pure function of the seed and the shards."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Protocol

import numpy as np

SHUFFLE_WINDOW = 5000  # samples that are shuffled among each other


class Counted(Protocol):
    """What the order must know of the shards."""

    urls: list[str]

    def count(self, shard: int) -> int:
        """Return the number of samples of a shard."""


class Epoch:
    """One pass over the shards: their order, and the running total of their samples as far as it was asked for."""

    def __init__(self, order: list[int]) -> None:
        self.order = order
        self.ends: list[int] = []

    @property
    def counted(self) -> int:
        """Return the samples of the shards counted so far."""
        return self.ends[-1] if self.ends else 0


class Order:
    """Which sample stands at each position 0, 1, 2, … of training.

    In each epoch the shards follow in a permutation of their own; their samples, one shard after the other, are cut
    into windows of SHUFFLE_WINDOW, and the samples of a window are permuted. Every sample stands once in an epoch.
    Nothing depends on what was asked before, nor on workers or ranks. Shards are counted when a position first needs
    them: those before it in the first epoch, all of them in a later one.
    """

    def __init__(self, shards: Counted, seed: int) -> None:
        self.shards = shards
        self.seed = seed
        self.length: int | None = None  # samples of an epoch, once every shard is counted
        self._epochs: dict[int, Epoch] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, number of the sample in it) at a position."""
        number, place = self._split(position)
        epoch = self._epoch(number)
        window, rest = divmod(place, SHUFFLE_WINDOW)
        place = window * SHUFFLE_WINDOW + int(self._window(number, window)[rest])
        slot = bisect_right(epoch.ends, place)
        return epoch.order[slot], place - (epoch.ends[slot - 1] if slot else 0)

    def beginning(self, first: int, stop: int) -> Iterator[int]:
        """Return the shards that begin at positions ``first`` .. ``stop`` - 1, before the windows are permuted.

        An empty shard begins where the one after it does.
        """
        last, place = self._split(stop - 1)
        earliest = 0 if self.length is None else max(0, first - 1) // self.length
        for number in range(earliest, last + 1):
            start = number * (self.length or 0)
            epoch = self._epoch(number)
            if number == last:
                self._count_to(epoch, place)
            begins = [0, *epoch.ends]
            low, high = bisect_left(begins, first - start), bisect_left(begins, stop - start)
            yield from epoch.order[low : min(high, len(epoch.order))]

    def _split(self, position: int) -> tuple[int, int]:
        """The epoch of a position, and its place in it."""
        if self.length is None:
            first = self._epoch(0)
            self._count_to(first, position)
            if position < first.counted:
                return 0, position
            self.length = first.counted
        return divmod(position, self.length)

    def _epoch(self, number: int) -> Epoch:
        if number not in self._epochs:
            draw = np.random.default_rng([self.seed, number, 0]).permutation(len(self.shards.urls))
            epoch = self._epochs[number] = Epoch(draw.tolist())
            if self.length is not None:
                epoch.ends = np.cumsum([self.shards.count(shard) for shard in epoch.order]).tolist()
            _keep_two(self._epochs)
        return self._epochs[number]

    def _count_to(self, epoch: Epoch, place: int) -> None:
        """Count shards until ``place`` lies in one of them, or all are counted."""
        while epoch.counted <= place and len(epoch.ends) < len(epoch.order):
            epoch.ends.append(epoch.counted + self.shards.count(epoch.order[len(epoch.ends)]))

    def _window(self, number: int, window: int) -> np.ndarray:
        if (number, window) not in self._windows:
            epoch = self._epoch(number)
            start, end = window * SHUFFLE_WINDOW, (window + 1) * SHUFFLE_WINDOW
            self._count_to(epoch, end - 1)
            # A shard's order and a window's have streams of their own: numpy takes [a, b] and [a, b, 0] for the same.
            generator = np.random.default_rng([self.seed, number, window + 1])
            self._windows[number, window] = generator.permutation(min(end, epoch.counted) - start)
            _keep_two(self._windows)
        return self._windows[number, window]


def _keep_two(kept: dict) -> None:
    while len(kept) > 2:
        del kept[next(iter(kept))]
