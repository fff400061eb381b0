"""The embedded world's language: a grammar of captions, and the words that the tiny model knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qatlab.core.errors import UserError, nearest
from qatlab.data.embedded.world import COLOURS, FLAT, LARGE, SCENE_NAMES, SHAPES, SMALL, TEXTURES, Spec

CONTEXT = 16
VOCABULARY_SIZE = 256
# END is the highest id, because open_clip takes the text feature at the position of the largest id.
PADDING, START, END = 0, 1, VOCABULARY_SIZE - 1

TEMPLATES = ["a photo of a {}", "a picture of a {}", "there is a {}", "a {}"]
_PLACES = {
    "sky": "in the sky",
    "meadow": "in a meadow",
    "desert": "in the desert",
    "ocean": "at the ocean",
    "night": "at night",
    "snow": "in the snow",
    "wall": "on a wall",
    "wood": "on wood",
}
_OPENINGS = ["", "a photo of ", "a picture of ", "there is "]
_GRAMMAR = ["a", "an", "the", "photo", "picture", "of", "there", "is", "in", "on", "at", "small", "large"]
# Sorted, so that the ids do not depend on the order of a set, which changes from process to process.
WORDS: list[str] = sorted({*_GRAMMAR, *SHAPES, *COLOURS, *TEXTURES, *SCENE_NAMES})
_IDS = {word: number for number, word in enumerate(WORDS, start=START + 1)}


def caption(spec: Spec) -> str:
    """Return a true sentence about an image: it names the shape, and often the size, colour, texture and scene.

    ``spec.wording`` decides the form of the sentence. Raises UserError for a held-out shape, which has no word.
    """
    if spec.shape not in SHAPES:
        raise UserError(f"The embedded world has no word for the shape '{spec.shape}'; its named shapes are {SHAPES}.")
    # One uniform number chooses one of 4 · 3 · 2 · 2 · 2 = 96 forms. Two thirds of the forms name the colour.
    choice = int(spec.wording * 96)
    choice, opening = divmod(choice, len(_OPENINGS))
    choice, named_colour = divmod(choice, 3)
    choice, named_scene = divmod(choice, 2)
    choice, named_texture = divmod(choice, 2)
    middle = (SMALL + LARGE) / 2
    words = [
        ("small" if spec.size < middle else "large") if choice else "",
        spec.colour if named_colour else "",
        spec.texture if named_texture and spec.texture != "plain" else "",
        spec.shape,
    ]
    phrase = " ".join(word for word in words if word)
    place = f" {_PLACES[spec.scene]}" if named_scene and spec.scene != FLAT else ""
    return f"{_OPENINGS[opening]}{article(phrase)} {phrase}{place}"


def article(phrase: str) -> str:
    """Return "an" before a vowel, else "a"."""
    return "an" if phrase[0] in "aeiou" else "a"


def tokenize(texts: str | Sequence[str]) -> Tensor:
    """Return token ids (B, 16) int64: start, the words, end, zeros; the tokenizer of the tiny CLIP.

    Case and full stops are ignored. Raises UserError for a word outside the vocabulary, or for more than 14 words.
    """
    sentences = [texts] if isinstance(texts, str) else list(texts)
    tokens = torch.full((len(sentences), CONTEXT), PADDING, dtype=torch.int64)
    for row, sentence in zip(tokens, sentences, strict=True):
        words = sentence.lower().replace(".", " ").replace(",", " ").split()
        if len(words) > CONTEXT - 2:
            raise UserError(
                f"'{sentence}' has {len(words)} words, the tiny model's context holds {CONTEXT - 2}: it knows "
                "only the embedded world's captions, choose another model= for others."
            )
        row[: len(words) + 2] = torch.tensor([START, *(_number(word, sentence) for word in words), END])
    return tokens


def _number(word: str, sentence: str) -> int:
    if word not in _IDS:
        raise UserError(
            f"The embedded world has no word '{word}' (in '{sentence}'){nearest(word, WORDS)}; "
            f"model=tiny knows these {len(WORDS)}, choose another model= for others: {' '.join(WORDS)}."
        )
    return _IDS[word]
