"""results.jsonl: one row per line, each with a checksum; entries that rows share are in contexts.jsonl beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from qatlab.core.checksums import sealed, verified
from qatlab.core.files import append, atomic, folder_locked
from qatlab.results.contexts import CONTEXT, Contexts, Row

FIT = "logit_scale_fit"
"""The score in the row of a fit of the logit scale, which has no score of images."""
DEFINITION_VERSION = 2
"""The version of a row's definition: 2 identifies images by their content; rows without a version are of version 1, which
identified images by names and sizes."""

KEY = ("run_id", "stage", "step", "dataset", "definition", "score", "prompts")
_NEEDED = {*KEY, "metrics"}
_OPTIONS = ', "config": {'  # in a row of an earlier release, the part from here on is the same in many rows


class RowFile:
    """The rows of one results.jsonl in the order of their writing, read when the object is made.

    ``rows`` are complete: they include the entries of their context, and rows of one context share the same objects. A
    bare row has lost its context and has only the entries of its own line; ``every`` holds complete and bare rows.
    ``damaged`` are the numbers, from 1 on, of lines that are cut off or changed; ``bare_lines`` are those of bare rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()
        self._look()
        if self.damaged and self._open:  # another process may be writing the last line: it is read again under the lock
            with folder_locked(path.parent):
                self._look()

    @property
    def rows(self) -> list[Row]:
        """Return the complete rows."""
        return [row for row in self.every if CONTEXT not in row] if self.bare_lines else self.every

    def mend(self) -> Path | None:
        """Move the lines of damaged and bare rows to results.damaged and return its path; None where there are none."""
        wrong = {*self.damaged, *self.bare_lines}
        if not wrong:
            return None
        lines = dict(enumerate(self.path.read_bytes().split(b"\n"), start=1))
        aside = self.path.with_suffix(".damaged")
        earlier = aside.read_bytes().splitlines() if aside.exists() else []
        _write(aside, [*earlier, *(lines[number] for number in sorted(wrong))])
        _write(self.path, [line for number, line in lines.items() if number not in wrong and line.strip()])
        self._look()
        return aside

    def append(self, rows: Sequence[Row]) -> None:
        """Add the ``rows`` whose key (KEY) no stored row has: all of them, or after an error none.

        Of several rows with the same key the last is added. A process that is killed meanwhile may leave some of the
        rows, the last of them cut off; the checksum then shows that this row is damaged.
        """
        with folder_locked(self.path.parent):
            self._look()
            self.mend()
            seen = {key(row) for row in self.every}
            new = {key(row): row for row in rows}
            if lines := [sealed(self._contexts.take(row)) for of, row in new.items() if of not in seen]:
                start = "\n" if self._open else ""
                append(self.path, f"{start}{chr(10).join(lines)}\n".encode())
            self._look()

    def _forget(self) -> None:
        self.every: list[Row] = []
        self.damaged: list[int] = []
        self.bare_lines: list[int] = []
        self._contexts = Contexts(self.path)
        self._old: dict[str, Row] = {}  # {text from _OPTIONS on: what it holds}, for rows of an earlier release
        self._inode, self._end, self._number = 0, 0, 0
        self._open = False  # whether the last line has no line break yet: then the next call reads the whole file again

    def _look(self) -> None:
        """Read the lines that were added since the last call, or the whole file if it was replaced."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self._forget()
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._end or self._open:
                self._forget()
                self._inode = status.st_ino
            file.seek(self._end)
            content = file.read()
        if not content:
            return
        self._end += len(content)
        self._open = not content.endswith(b"\n")
        for line in content.removesuffix(b"\n").split(b"\n"):
            self._number += 1
            if line.strip():
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            row = self._parsed(verified(line))
            if not row.keys() >= _NEEDED:
                raise ValueError(f"it lacks {', '.join(_NEEDED - row.keys())}")
        except (ValueError, TypeError, RecursionError):
            self.damaged.append(self._number)
            return
        if CONTEXT in row:
            whole = self._contexts.give_back(row)
            if whole is None:
                self.bare_lines.append(self._number)
            row = whole or row
        self.every.append(row)

    def _parsed(self, text: str) -> Row:
        """Return the row of a line; in rows of an earlier release the options, most of the bytes, are parsed only once."""
        own, found, shared = text.rpartition(_OPTIONS)
        if found:
            # A ValueError means that _OPTIONS was found inside of another entry. Then the whole text is parsed below.
            with suppress(ValueError):
                if shared not in self._old:
                    self._old[shared] = _json(f"{{{_OPTIONS[2:]}{shared}")
                return {**_json(own + "}"), **self._old[shared]}
        row = _json(text)
        if not isinstance(row, dict):
            raise ValueError(f"it holds a {type(row).__name__} and no mapping")
        return row


def _json(text: str) -> Any:
    """Return the same as ``json.loads``, in a fifth of its time; raises ValueError for a text that is no JSON."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:  # orjson also refuses NaN, which Python's json writes and reads
        return json.loads(text)


def _write(path: Path, lines: Sequence[bytes]) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in lines))


def key(row: Row) -> tuple[Any, ...]:
    """Return the key of a row, a tuple that no other row of its file has."""
    return tuple(row[name] for name in KEY)
