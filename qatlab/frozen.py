"""Features of samples that training sees again and again, from towers that do not change: computed once per sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 32  # samples per forward


class FrozenFeatures:
    """Rows (len(rows), D) of a table of ``count`` samples that fills as it is read.

    ``compute(start, stop)`` returns the features of those samples. It is called for fixed chunks, not for the rows that
    happen to be asked for, so that a resumed run gets the same bits.
    """

    def __init__(self, count: int, compute: Callable[[int, int], Tensor]) -> None:
        self.count, self.compute = count, compute
        self._chunks: dict[int, Tensor] = {}

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the features of ``rows`` (B,) int64, on the device they were computed on."""
        wanted = rows.tolist()
        for chunk in sorted({row // CHUNK for row in wanted} - self._chunks.keys()):
            stop = min(self.count, (chunk + 1) * CHUNK)
            self._chunks[chunk] = self.compute(chunk * CHUNK, stop)
        return torch.stack([self._chunks[row // CHUNK][row % CHUNK] for row in wanted])
