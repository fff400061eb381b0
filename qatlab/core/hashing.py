"""SHA-256, by which qatlab recognizes options, texts, files and tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

CHUNK = 2**20  # bytes of a file in memory at once, because weight files have gigabytes

Part = str | bytes | bytearray | memoryview
"""A part of what is hashed. A text counts as its bytes in UTF-8; a file name that is not UTF-8 keeps its own bytes."""


def digest(*parts: Part) -> str:
    """Return the 64 hex digits of the hash of the joined ``parts``; ids and file names take the first few digits."""
    return sha256(parts).hex()


def sha256(parts: Iterable[Part]) -> bytes:
    """Return the 32 bytes of the hash of the joined ``parts``.

    From a generator each part is released once it is hashed, so that a whole model needs the memory of one tensor.
    """
    # No separator is hashed: ("ab", "c") and ("a", "bc") have one hash. Callers add separators where that matters.
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.encode(errors="surrogateescape") if isinstance(part, str) else part)
    return hashed.digest()


def file_digest(path: Path) -> str:
    """Return the 64 hex digits of the hash of what a file holds; raises OSError for one that cannot be read."""
    with path.open("rb") as file:
        return sha256(iter(lambda: file.read(CHUNK), b"")).hex()
