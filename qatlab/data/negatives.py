"""Texts that name what is in no ID class: WordNet's words for NegLabel, and prompts of nothing in particular."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from qatlab.clip import Clip
from qatlab.data.world import COLOURS, SCENE_NAMES, TEXTURES
from qatlab.errors import UserError
from qatlab.metrics.neglabel import NegLabels, grouped, mine
from qatlab.zeroshot import class_features, text_features

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
"""Prompts of no class for ``generic_negative``, by name; "embedded" keeps to the words of the embedded world.

The paper gives "a photo of something" and no list; this one is ours: things, places and surfaces by words more general
than any class of the benchmark, and an image of nothing.
"""


@dataclass(frozen=True)
class Words:
    """Nouns and adjectives for NegLabel, how they are put into prompts, and where they are from.

    ``noun_prompt`` is that of the ID classes too. ``mined`` words are negatives as they are, others are candidates;
    ``groups`` is how many groups they are divided into.
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

    ``imagenet1k`` is the list that NegLabel's authors mined for ImageNet-1k with OpenAI's ViT-B/16, ready to use with any
    model; ``embedded`` names backgrounds, colours and textures of the embedded world. A folder holds word lists
    ``noun.*.txt`` and ``adj.*.txt``, a word per line, as ``txtfiles/`` of XueJiang16/NegLabel: a word counts once, where it
    comes first in the order of the file names, adjectives before nouns. Raises UserError when there is none.
    """
    if spec == "imagenet1k":
        content = json.loads((files("qatlab") / "assets" / "neglabel_imagenet1k.json").read_text("utf-8"))
        return Words(content["nouns"], content["adjectives"], spec, mined=True)
    if spec == "embedded":
        adjectives = [*COLOURS, *TEXTURES, "small", "large"]
        return Words(SCENE_NAMES, adjectives, spec, True, "a photo of a {}", "a {} photo", groups=4)
    folder = Path(spec).expanduser()
    lists = sorted([*folder.glob("adj.*.txt"), *folder.glob("noun.*.txt")])
    if not lists:
        raise UserError(
            f"suite.negatives={spec} is neither imagenet1k, nor embedded, nor a folder with noun.*.txt and adj.*.txt (those "
            "of txtfiles/ in github.com/XueJiang16/NegLabel)."
        )
    kinds: dict[str, str] = {}
    for file in lists:
        for word in filter(None, map(str.strip, file.read_text("utf-8").splitlines())):
            kinds.setdefault(word, file.name.split(".")[0])
    nouns, adjectives = ([word for word in kinds if kinds[word] == kind] for kind in ("noun", "adj"))
    return Words(nouns, adjectives, str(folder), mined=False)


def word_features(clip: Clip, words: Words, cache: bool = True) -> Tensor:
    """Return unit text features (W, D) of the nouns, then the adjectives, in their prompts: one call of the text tower.

    70,000 words take 140 MB of ``cache``. Raises UserError without a text tower.
    """
    nouns = [words.noun_prompt.replace("{}", word) for word in words.nouns]
    adjectives = [words.adjective_prompt.replace("{}", word) for word in words.adjectives]
    return text_features(clip, nouns + adjectives, cache)


def negative_labels(
    clip: Clip, names: list[str], words: Words, features: Tensor, seed: int = 0, cache: bool = True
) -> NegLabels:
    """Return what ``neglabel`` compares with for the ID classes ``names``: mined where the words are candidates, grouped.

    ``features`` are the ``word_features``, the same for any classes; these take one call of the text tower. Raises
    UserError without a text tower and for too few words.
    """
    inside = class_features(clip, names, [words.noun_prompt], cache).features
    try:
        if not words.mined:
            kinds = features.split([len(words.nouns), len(words.adjectives)])
            features = torch.cat([kind[mine(kind, inside)] for kind in kinds if len(kind)])
        return NegLabels(inside, grouped(features, words.groups, seed))
    except ValueError as error:
        raise UserError(f"suite.negatives={words.source} holds too few words: {error}.") from error
