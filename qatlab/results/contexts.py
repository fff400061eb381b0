"""contexts.jsonl: the entries that many rows of a run have in common, such as options, versions and commit, stored once.

A row names its context by a hash, and takes the common entries from there.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from qatlab.core.checksums import sealed, unsealed
from qatlab.core.files import append
from qatlab.core.hashing import digest

CONTEXT = "context"
"""The key under which a row names its context."""
_LAST = ("seed", "config", "versions", "commit")
_FIRST = (
    *("recipe", "model", "pretrained", "weights"),
    *("activation", "text_activation", "preprocessing", "resized", "fp32_id"),
)
SHARED = (*_FIRST, *_LAST)
"""The entries of a row that are stored in its context: they are the same for all stages and sets of a run's evaluation."""

Row = dict[str, Any]


class Contexts:
    """The contexts of the rows of one results.jsonl, in the file contexts.jsonl beside it.

    A context is a line with a checksum; its name is a hash of its entries.
    """

    def __init__(self, results: Path) -> None:
        self.path = results.with_name("contexts.jsonl")
        # {name of a context: (entries that replace the name in a row, entries that are added at the row's end)}
        self._known: dict[str, tuple[Row, Row]] = {}
        self._read = 0  # number of bytes of the file that were read, up to the end of a whole line

    def take(self, row: Row) -> Row:
        """Return ``row`` with the name of its context instead of the common entries; a new context is written to the file."""
        shared = {key: row[key] for key in SHARED if key in row}
        name = digest(json.dumps(shared))[:12]
        if self._get(name) is None:
            torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
            append(self.path, (b"\n" if torn else b"") + sealed({CONTEXT: name, **shared}).encode() + b"\n")
        own: Row = {}
        for key, value in row.items():
            if key not in shared:
                own[key] = value
            elif CONTEXT not in own:
                own[CONTEXT] = name
        return own

    def give_back(self, row: Row) -> Row | None:
        """Return the whole row, with the entries of its context in their old order; None where the context was lost.

        All rows of a context share the same objects.
        """
        context = self._get(row[CONTEXT])
        if context is None:
            return None
        here, last = context
        whole: Row = {}
        for key, value in row.items():
            if key == CONTEXT:
                whole |= here
            else:
                whole[key] = value
        whole |= last
        return whole

    def _get(self, name: str) -> tuple[Row, Row] | None:
        if name not in self._known:
            self._look()
        return self._known.get(name)

    def _look(self) -> None:
        """Read the lines that were added to the file since the last call; damaged lines are left out."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            lines, end, _ = file.read().rpartition(b"\n")
        self._read += len(lines) + len(end)
        for line in lines.split(b"\n"):
            with suppress(ValueError, LookupError, RecursionError):
                found = unsealed(line)
                name = found.pop(CONTEXT)
                last = {key: found.pop(key) for key in _LAST if key in found}
                self._known[name] = found, last
