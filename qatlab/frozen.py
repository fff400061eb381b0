"""Features of samples that training sees again and again, from towers that do not change: computed once per sample."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

CHUNK = 32  # samples per forward


class FrozenFeatures:
    """Rows (len(rows), D) of a table of ``count`` samples that fills as it is read.

    ``compute(start, stop)`` returns the features of those samples. It is called for fixed chunks, not for the rows that
    happen to be asked for, so that a resumed run gets the same bits.
    """

    def __init__(self, count: int, compute: Callable[[int, int], Tensor]) -> None:
        self.count, self.compute = count, compute
        self._table: Tensor | None = None
        self._done: set[int] = set()

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the features of ``rows`` (B,) int64, on the device they were computed on."""
        if len(self._done) * CHUNK < self.count:
            for chunk in sorted({row // CHUNK for row in rows.tolist()} - self._done):
                start, stop = chunk * CHUNK, min(self.count, (chunk + 1) * CHUNK)
                features = self.compute(start, stop)
                if self._table is None:
                    self._table = features.new_empty(self.count, *features.shape[1:])
                self._table[start:stop] = features
                self._done.add(chunk)
        assert self._table is not None
        return self._table[rows.to(self._table.device)]
