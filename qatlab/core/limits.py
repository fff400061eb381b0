"""Limits on what a file from elsewhere may ask for: pixels of an image, bytes of a member, names of a pattern."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import lru_cache

_VARIABLE = "QATLAB_LIMITS"


@dataclass(frozen=True)
class Limits:
    """The options ``limits``: what exceeds one is refused, or counts as unreadable, before memory is taken for it."""

    pixels: int = 89_478_485  # Pillow's MAX_IMAGE_PIXELS, a quarter of a GiB as RGB
    member_bytes: int = 2**30
    names: int = 10**6  # nine times {0..9} in one pattern would stand for a billion names


def limits() -> Limits:
    """Return the limits of this process: those that ``use_limits`` set here or in a parent, else the defaults."""
    return _parsed(os.environ.get(_VARIABLE, "{}"))


def use_limits(pixels: int, member_bytes: int, names: int) -> None:
    """Set the limits of this process and of those that it starts.

    The limits are kept in the environment, because forked and spawned loader processes both inherit it.
    """
    os.environ[_VARIABLE] = json.dumps(asdict(Limits(pixels, member_bytes, names)))


@lru_cache
def _parsed(text: str) -> Limits:
    return Limits(**json.loads(text))
