"""The order of training samples: an endless sequence that is a pure function of the seed and the shards."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Protocol

import numpy as np

# The number of neighbouring samples that are shuffled together. A larger window mixes more shards, and keeps more open.
SHUFFLE_WINDOW = 5000


class Counted(Protocol):
    """The names and sizes of shards, which is all that the order must know of them."""

    @property
    def urls(self) -> list[str]:
        """Return the names of the shards."""

    def count(self, shard: int) -> int:
        """Return the number of samples of a shard."""


class Epoch:
    """One pass over the shards: their order, and the cumulated numbers of samples of those that are counted so far."""

    def __init__(self, order: list[int]) -> None:
        self.order = order
        self.ends: list[int] = []

    @property
    def counted(self) -> int:
        """Return the total number of samples of the shards that are counted so far."""
        return self.ends[-1] if self.ends else 0


class Order:
    """The map from each position 0, 1, 2, … of training to a sample.

    Each epoch permutes the shards in its own way. The samples of all shards in this order are cut into windows of
    SHUFFLE_WINDOW, and the samples of a window are permuted. Every sample occurs once in an epoch. The map does not
    depend on earlier questions, workers or ranks. A position of the first epoch needs the counts of the shards before
    it; a position of a later epoch needs the counts of all shards.
    """

    def __init__(self, shards: Counted, seed: int) -> None:
        self.shards = shards
        self.seed = seed
        self.length: int | None = None  # number of samples of an epoch; None until every shard is counted
        self._epochs: dict[int, Epoch] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, number of the sample in it) at a position."""
        number, place = self._split(position)
        epoch = self._epoch(number)
        window, rest = divmod(place, SHUFFLE_WINDOW)
        # The permutation of the window gives a place in the epoch; below, the shard that covers this place is looked
        # up.
        place = window * SHUFFLE_WINDOW + int(self._window(number, window)[rest])
        # An empty shard ends where it begins, and bisect_right passes over it.
        slot = bisect_right(epoch.ends, place)
        return epoch.order[slot], place - (epoch.ends[slot - 1] if slot else 0)

    def beginning(self, first: int, stop: int) -> Iterator[int]:
        """Yield the shards that begin at positions ``first`` .. ``stop`` - 1, before the windows are permuted.

        An empty shard begins at the same position as the shard after it.
        """
        last, place = self._split(stop - 1)
        # While the length of an epoch is unknown, the run is in its first epoch.
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
        """Return the epoch of a position, and the place of the position in that epoch."""
        if self.length is None:
            first = self._epoch(0)
            self._count_to(first, position)
            if position < first.counted:
                return 0, position
            # The position lies behind the first epoch, so every shard is counted by now and the length of an epoch is known.
            self.length = first.counted
        return divmod(position, self.length)

    def _epoch(self, number: int) -> Epoch:
        if number not in self._epochs:
            # The last number of the seed is 0 for the order of shards; for the windows it is 1, 2, ...
            draw = np.random.default_rng([self.seed, number, 0]).permutation(len(self.shards.urls))
            epoch = self._epochs[number] = Epoch(draw.tolist())
            if self.length is not None:
                epoch.ends = np.cumsum([self.shards.count(shard) for shard in epoch.order]).tolist()
            # Two epochs are enough, because a batch is in one epoch or crosses the border of two.
            _keep_two(self._epochs)
        return self._epochs[number]

    def _count_to(self, epoch: Epoch, place: int) -> None:
        """Count shards of the epoch until they cover ``place``, or all are counted."""
        while epoch.counted <= place and len(epoch.ends) < len(epoch.order):
            epoch.ends.append(epoch.counted + self.shards.count(epoch.order[len(epoch.ends)]))

    def _window(self, number: int, window: int) -> np.ndarray:
        if (number, window) not in self._windows:
            epoch = self._epoch(number)
            start, end = window * SHUFFLE_WINDOW, (window + 1) * SHUFFLE_WINDOW
            self._count_to(epoch, end - 1)
            # Window w draws with w + 1, because 0 belongs to the order of the shards. A seed without a third number
            # would not differ from that: numpy treats the seeds [a, b] and [a, b, 0] as equal.
            generator = np.random.default_rng([self.seed, number, window + 1])
            self._windows[number, window] = generator.permutation(min(end, epoch.counted) - start)
            _keep_two(self._windows)
        return self._windows[number, window]


def _keep_two(kept: dict) -> None:
    """Remove the oldest entries until two are left."""
    # A dict keeps the order in which its keys were added.
    while len(kept) > 2:
        del kept[next(iter(kept))]
