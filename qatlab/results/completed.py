"""finished.json: which evaluations of a run are complete, and how much time and disk they took."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from qatlab.core.checksums import read_json, write_json
from qatlab.core.damage import whole
from qatlab.core.files import atomic

FINISHED = "finished.json"


class Took(NamedTuple):
    """The cost of the process that completed an evaluation: its ``seconds``, and the ``feature_bytes`` it added to the cache."""

    seconds: float
    feature_bytes: int


class Completed:
    """The file ``path``, which has an entry for each complete evaluation.

    An entry also holds the size of the file of rows, ``results``, at that time. If this file is shorter now, rows were
    lost.
    """

    def __init__(self, path: Path, results: Path) -> None:
        self._path, self._results = path, results

    def note(self, evaluation: str, took: Took) -> None:
        """Store that the evaluation with this id is complete, unless that is stored already."""
        if self.took(evaluation) is None:
            with atomic(self._path) as temporary:
                write_json(temporary, {**self._entries(), evaluation: [*took, self._size()]})

    def took(self, evaluation: str) -> Took | None:
        """Return the cost of an evaluation; None where it is not complete, or where rows were lost since then."""
        seconds, feature_bytes, *size = self._entries().get(evaluation, (None, None))
        if seconds is None or (size and self._size() < size[0]):
            return None
        return Took(seconds, feature_bytes)

    def lost(self) -> int:
        """Return how many bytes the file of rows is shorter than after any complete evaluation; 0 where none are lost."""
        # Entries of earlier releases have no size.
        sizes = [size for _, _, *noted in self._entries().values() for size in noted]
        return max(max(sizes, default=0) - self._size(), 0)

    def _size(self) -> int:
        return self._results.stat().st_size if self._results.exists() else 0

    def _entries(self) -> dict[str, Any]:
        return whole(self._path, _read) or {}


def _read(path: Path) -> dict[str, Any]:
    """Return {id of an evaluation: numbers} of finished.json; raises ValueError for any other content."""
    found = read_json(path)
    for numbers in found.values():
        if not isinstance(numbers, list) or len(numbers) < 2 or not all(isinstance(n, (int, float)) for n in numbers):
            raise ValueError(f"{numbers} is no list of numbers")
    return found
