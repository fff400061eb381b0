"""Texts that belong to no ID class: WordNet's words for NegLabel, and prompts of nothing in particular."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor

from qatlab.core.errors import UserError
from qatlab.core.files import user_path
from qatlab.core.hashing import digest
from qatlab.data.embedded.world import COLOURS, SCENE_NAMES, TEXTURES
from qatlab.data.textfiles import read_lines
from qatlab.metrics.neglabel import NegLabels, grouped, mine
from qatlab.models.clip import Clip
from qatlab.models.zeroshot import class_features, text_features

GENERIC: dict[str, tuple[str, ...]] = {
    "generic": (
        "a photo of something",
        "a photo of an object",
        "a photo of a thing",
        "a photo of a place",
        "a photo of a scene",
        "a photo of a surface",
        "a photo of the background",
        "a photo of nothing in particular",
        "a photo",
        "an image",
    ),
    "embedded": (
        "a photo",
        "a picture",
        *("a photo in the sky", "a photo in a meadow", "a photo in the desert", "a photo at the ocean"),
        *("a photo at night", "a photo in the snow", "a photo on a wall", "a photo on wood"),
    ),
}
"""Prompts of no class for ``generic_negative``, by name; "embedded" uses only words of the embedded world.

The paper gives "a photo of something" and no list. This list has things, places and surfaces in words more general than
any class of the benchmark, and images of nothing.
"""


@dataclass(frozen=True)
class Words:
    """Nouns and adjectives for NegLabel, the prompts they are put into, and their ``source``.

    ``noun_prompt`` also serves the ID classes. ``mined`` words are negatives as they are; other words are candidates,
    to be mined. ``groups`` is the number of groups that the negatives are divided into.
    """

    nouns: list[str]
    adjectives: list[str]
    source: str
    mined: bool
    noun_prompt: str = "the nice {}"
    adjective_prompt: str = "This is a {} photo"
    groups: int = 100


def load_words(spec: str) -> Words:
    """Return the words that ``spec`` names: ``imagenet1k``, ``embedded``, or a folder of candidates.

    ``imagenet1k`` is the list that NegLabel's authors mined for ImageNet-1k with OpenAI's ViT-B/16, ready to use with
    any model; ``embedded`` names backgrounds, colours and textures of the embedded world. A folder holds word lists
    ``noun.*.txt`` and ``adj.*.txt``, a word per line, as in ``txtfiles/`` of XueJiang16/NegLabel. A word counts once,
    where it comes first in the order of the file names, adjectives before nouns. Raises UserError when there is no
    list.
    """
    if spec == "imagenet1k":
        content = json.loads((files("qatlab") / "assets" / "neglabel_imagenet1k.json").read_text("utf-8"))
        return Words(content["nouns"], content["adjectives"], spec, mined=True)
    if spec == "embedded":
        adjectives = [*COLOURS, *TEXTURES, "small", "large"]
        return Words(SCENE_NAMES, adjectives, spec, True, "a photo of a {}", "a {} photo", groups=4)
    folder = user_path(spec)
    lists = sorted([*folder.glob("adj.*.txt"), *folder.glob("noun.*.txt")])
    if not lists:
        raise UserError(
            f"suite.negatives={spec} is neither imagenet1k, nor embedded, nor a folder with noun.*.txt and adj.*.txt (those "
            "of txtfiles/ in github.com/XueJiang16/NegLabel)."
        )
    kinds: dict[str, str] = {}
    for file in lists:
        # setdefault keeps the kind of the first list that has a word; the lists of adjectives come first.
        for word in filter(None, read_lines(file)):
            kinds.setdefault(word, file.name.split(".")[0])
    nouns = [word for word, kind in kinds.items() if kind == "noun"]
    adjectives = [word for word, kind in kinds.items() if kind == "adj"]
    return Words(nouns, adjectives, str(folder), mined=False)


def described(spec: str) -> str:
    """Return the words that ``spec`` names as definitions hold them: a packaged list's name, a hash of a folder's words."""
    # A packaged list stays the same under its name. The lists of a folder may be edited, so that their words are
    # hashed. A folder that is not there raises UserError later, where its words are read.
    if spec in ("imagenet1k", "embedded") or not user_path(spec).is_dir():
        return spec
    words = load_words(spec)
    return digest(json.dumps([words.nouns, words.adjectives]))[:32]


def word_features(clip: Clip, words: Words, cache: bool = True) -> Tensor:
    """Return unit text features (W, D) of the nouns, then of the adjectives, in their prompts.

    70,000 words take 140 MB of the ``cache``. Raises UserError without a text tower.
    """
    nouns = [words.noun_prompt.replace("{}", word) for word in words.nouns]
    adjectives = [words.adjective_prompt.replace("{}", word) for word in words.adjectives]
    return text_features(clip, nouns + adjectives, cache)


def negative_labels(
    clip: Clip, names: list[str], words: Words, features: Tensor, seed: int = 0, cache: bool = True
) -> NegLabels:
    """Return the texts that ``neglabel`` compares with for the ID classes ``names``: mined if candidates, and grouped.

    ``features`` (W, D) are the ``word_features``, the same for all classes; the class names take one call of the text
    tower. ``seed`` draws the groups. Raises UserError without a text tower and for too few words.
    """
    inside = class_features(clip, names, [words.noun_prompt], cache).features
    try:
        if not words.mined:
            # Nouns and adjectives are mined separately, as in NegLabel's
            # code, so that the same share of each kind is kept.
            kinds = features.split([len(words.nouns), len(words.adjectives)])
            features = torch.cat([kind[mine(kind, inside)] for kind in kinds if len(kind)])
        return NegLabels(inside, grouped(features, words.groups, seed))
    except ValueError as error:
        raise UserError(f"suite.negatives={words.source} holds too few words: {error}.") from error
