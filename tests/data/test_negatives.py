"""Negative words: the authors' lists as far as they go without a text tower, and the whole path on the embedded model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from qatlab.config import ModelConfig
from qatlab.core.errors import UserError
from qatlab.data.embedded.sets import CLASS_NAMES
from qatlab.data.embedded.vocabulary import tokenize
from qatlab.data.embedded.world import COLOURS, SCENE_NAMES, TEXTURES
from qatlab.evaluation.negatives import GENERIC, Words, load_words, negative_labels, word_features
from qatlab.metrics.neglabel import NegLabels, grouped, mine
from qatlab.models import clip as clips
from qatlab.models.clip import Clip
from qatlab.models.zeroshot import encode_text

pytestmark = pytest.mark.usefixtures("cold")


@pytest.fixture
def clip() -> Clip:
    return clips.load(ModelConfig())


def candidates(shared_data: Path) -> Words:
    return load_words(str(shared_data / "neglabel" / "txtfiles"))


def test_the_packaged_list_is_the_authors_selection(shared_data: Path) -> None:
    words = load_words("imagenet1k")
    texts = [words.noun_prompt.replace("{}", word) for word in words.nouns]
    texts += [words.adjective_prompt.replace("{}", word) for word in words.adjectives]
    selected = shared_data / "neglabel" / "selected_neg_labels" / "selected_neg_labels_in1k_10k.txt"
    assert texts == selected.read_text().splitlines()
    assert words.mined
    assert len(texts) == 10_499


def test_the_candidates_are_counted_as_the_authors_count_them(shared_data: Path) -> None:
    words = candidates(shared_data)
    assert (len(words.nouns), len(words.adjectives)) == (56_909, 13_091)
    assert not words.mined
    # 15 % of each kind; 10,499 in all, as in the authors' list
    random = torch.randn(70_000, 2, generator=torch.Generator().manual_seed(0))
    kinds = [len(mine(kind, normalize(torch.ones(3, 2), dim=-1))) for kind in random.split([56_909, 13_091])]
    assert kinds == [8536, 1963]
    assert sum(kinds) == 10_499


def test_the_authors_selection_is_of_these_candidates(shared_data: Path) -> None:
    """1637 words are nouns and adjectives; their code takes such a word for what the order of its folder says first.

    Its list has 8578 nouns and 1921 adjectives: 15 % of 57,187 and 12,813, where nine lists of nouns, among them noun.time,
    came before those of adjectives. Sorted by name, the adjectives come first.
    """
    words, selected = candidates(shared_data), load_words("imagenet1k")
    assert set(selected.adjectives) <= set(words.adjectives)
    assert set(selected.nouns) - set(words.nouns) == {"carboniferous"}
    assert (len(selected.nouns), len(selected.adjectives)) == (8578, 1921)
    folder = shared_data / "neglabel" / "txtfiles"
    early = ["cognition", "event", "feeling", "phenomenon", "possession", "process", "relation", "shape", "time"]
    first = {word for name in early for word in (folder / f"noun.{name}.txt").read_text().splitlines()}
    adjectives = len(set(words.adjectives) - first)
    assert (70_000 - adjectives, adjectives) == (57_187, 12_813)
    assert [int(0.15 * n) for n in (70_000 - adjectives, adjectives)] == [8578, 1921]


def test_a_word_counts_once_and_adjectives_come_first(tmp_path: Path) -> None:
    for name, lines in {
        "noun.a": "cat\nred\ncat\n\n",
        "noun.b": "dog\ncat\n",
        "adj.all": " red \nbig\n",
        "verb.a": "run\n",
    }.items():
        (tmp_path / f"{name}.txt").write_text(lines)
    words = load_words(str(tmp_path))
    assert (words.nouns, words.adjectives) == (["cat", "dog"], ["red", "big"])


@torch.no_grad()
def test_candidates_are_mined_by_kind_and_grouped(clip: Clip) -> None:
    nouns, adjectives = SCENE_NAMES[:7], [*COLOURS, *TEXTURES]
    words = Words(nouns, adjectives, "test", False, "a photo of a {}", "a {} photo", groups=3)
    found = negative_labels(clip, CLASS_NAMES, words, word_features(clip, words), seed=5)
    inside = encode_text(clip, [f"a photo of a {name}" for name in CLASS_NAMES])
    kinds = [
        encode_text(clip, [f"a photo of a {n}" for n in nouns]),
        encode_text(clip, [f"a {a} photo" for a in adjectives]),
    ]
    kept = torch.cat([kind[mine(kind, inside)] for kind in kinds])
    assert len(kept) == 1 + 2  # 15 % of 7 and of 14
    torch.testing.assert_close(found.inside, inside, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.groups, grouped(kept, 3, seed=5), rtol=0, atol=1e-5)


def test_other_classes_do_not_encode_the_words_again(clip: Clip, calls: list[int]) -> None:
    def given(names: list[str], cache: bool = True) -> NegLabels:
        return negative_labels(clip, names, words, word_features(clip, words, cache), cache=cache)

    words = load_words("embedded")
    first = given(CLASS_NAMES)
    assert sorted(calls) == sorted([len(words.nouns + words.adjectives), len(CLASS_NAMES)])
    calls.clear()
    again = given(CLASS_NAMES)
    assert calls == []
    assert all(map(torch.equal, first, again))
    given(CLASS_NAMES[:5])
    assert calls == [5]
    calls.clear()
    given(CLASS_NAMES, cache=False)
    assert len(calls) == 2


def test_the_embedded_words_are_in_its_vocabulary_and_no_class() -> None:
    words = load_words("embedded")
    assert not {*words.nouns, *words.adjectives} & set(CLASS_NAMES)
    assert len(tokenize([*words.nouns, *words.adjectives, *GENERIC["embedded"]])) > words.groups


def test_mistakes_are_told_in_a_sentence(clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"suite\.negatives=.* is neither imagenet1k, nor embedded, nor a folder"):
        load_words(str(tmp_path))
    few = Words(["sky"], ["red", "blue"], "test", False, "a {}", "a {} photo")
    with pytest.raises(UserError, match=r"suite\.negatives=test holds too few words: 0\.15 of 1 candidates is none"):
        negative_labels(clip, CLASS_NAMES, few, word_features(clip, few))
    with pytest.raises(UserError, match="too few words: 3 negative labels do not fill 100 groups"):
        negative_labels(clip, CLASS_NAMES, replace(few, mined=True), word_features(clip, few))
    clip.model = None
    with pytest.raises(UserError, match=r"no text tower, so 3 texts \(first 'a sky'\) cannot be encoded.*neglabel"):
        word_features(clip, few)


def test_data_t2_word_lists_in_other_encodings(tmp_path: Path) -> None:
    (tmp_path / "noun.x.txt").write_bytes("café\r\n\r\nsky\r\n".encode("utf-16"))
    (tmp_path / "adj.x.txt").write_bytes("\ufeffred\n".encode())
    words = load_words(str(tmp_path))
    assert (words.nouns, words.adjectives) == (["café", "sky"], ["red"])
    (tmp_path / "adj.x.txt").write_bytes(b"red\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"adj\.x\.txt, line 2: the byte 0xe9 is no UTF-8"):
        load_words(str(tmp_path))
