"""Features from towers that do not change, computed once for each sample that training sees again and again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

CHUNK = 32  # samples that are computed in one forward


class FrozenFeatures:
    """A table of features (count, D) that is filled as it is read.

    ``compute(start, stop)`` returns the features (stop - start, D) of the samples from ``start`` to ``stop``.
    """

    def __init__(self, count: int, compute: Callable[[int, int], Tensor]) -> None:
        self.count, self.compute = count, compute
        self._table: Tensor | None = None
        self._done: set[int] = set()

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the features (B, D) of the samples ``rows`` (B,), int64, on the device they were computed on."""
        # Reading row numbers from a GPU waits for the GPU, so a full table is not searched for missing rows.
        if len(self._done) * CHUNK < self.count:
            for chunk in sorted({row // CHUNK for row in rows.tolist()} - self._done):
                # The chunks are the same whatever rows are asked for: the number of samples in a forward changes the
                # last bits of its result, and a resumed run must get the same bits as the run that was stopped.
                start, stop = chunk * CHUNK, min(self.count, (chunk + 1) * CHUNK)
                features = self.compute(start, stop)
                if self._table is None:
                    self._table = features.new_empty(self.count, *features.shape[1:])
                self._table[start:stop] = features
                self._done.add(chunk)
        assert self._table is not None
        return self._table[rows.to(self._table.device)]
