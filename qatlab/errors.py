"""The one exception for what a user can get wrong, and what its texts share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

QUOTED_SHARDS = "\"data.shards='/data/cc3m/{00000..00331}.tar'\""


class UserError(Exception):
    """A mistake the user can mend: its text names the key or file, the value found and the remedy in one or two sentences.

    Entry points print the text without a traceback and exit with code 2.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" with the known word closest to ``word``, or "" when none is close."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""
