"""The one exception for what a user can get wrong, and texts that its messages share."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# The outer quotes are for the shell, the inner ones for Hydra: both give braces a meaning of their own.
QUOTED_SHARDS = "\"data.shards='/data/cc3m/{00000..00331}.tar'\""


class UserError(Exception):
    """A mistake the user can mend: its text has the key or file, the value found and the remedy, in 1 or 2 sentences.

    Entry points print the text without a traceback and exit with code 2.
    """


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Inside this context a UserError begins with ``what``, the layer or option that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" with the known word closest to ``word``, or "" when none is close.

    A known word that equals ``word``, or looks equal, is never offered: then the spelling is not what is wrong.
    """
    others = [other for other in map(str, known) if _visible(other) != _visible(word)]
    found = difflib.get_close_matches(word, others, n=1, cutoff=0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""


def _visible(word: str) -> str:
    """Return a word as a reader sees it: accents joined to their letters, without control and format characters."""
    # Names that were copied from a web page may hold a zero-width
    # space, and macOS writes file names with accents apart.
    seen = (c for c in unicodedata.normalize("NFC", word) if unicodedata.category(c) not in ("Cf", "Cc"))
    return " ".join("".join(seen).split())
