"""Mistakes told in a sentence: what is offered in place of a word that is not known."""

from __future__ import annotations

import unicodedata

import pytest

from qatlab.core.errors import nearest


@pytest.mark.parametrize(
    ("word", "known", "said"),
    [
        ("catt", ["dog", "cat"], " (did you mean 'cat'?)"),
        ("Cat", ["cat"], " (did you mean 'cat'?)"),  # a difference that can be seen
        ("cat", ["cat"], ""),
        ("cat", ["cat", "cats"], " (did you mean 'cats'?)"),
        ("cat", ["\ufeffcat", "cat\u200b", " cat"], ""),
        (unicodedata.normalize("NFD", "crème brûlée"), ["crème brûlée"], ""),
        ("3", [3, 33], " (did you mean '33'?)"),
    ],
)
def test_data_part4_the_same_word_is_never_offered(word: str, known: list[str], said: str) -> None:
    assert nearest(word, known) == said
