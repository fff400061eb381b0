"""The embedded world's language: a caption grammar, and the closed vocabulary it is spoken in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qatlab.data.world import COLOURS, FLAT, LARGE, SCENE_NAMES, SHAPES, SMALL, TEXTURES, Spec
from qatlab.errors import UserError, nearest

CONTEXT = 16
VOCABULARY_SIZE = 256
PADDING, START, END = 0, 1, VOCABULARY_SIZE - 1  # END is the highest id: open_clip pools the text at the arg max

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
WORDS: list[str] = sorted({*_GRAMMAR, *SHAPES, *COLOURS, *TEXTURES, *SCENE_NAMES})
_IDS = {word: number for number, word in enumerate(WORDS, start=START + 1)}


def caption(spec: Spec) -> str:
    """Return one true sentence about an image: its shape always, its size, colour, texture and scene often.

    Which form it takes is fixed by ``spec.wording``; a held-out shape has no word and raises UserError.
    """
    if spec.shape not in SHAPES:
        raise UserError(f"The embedded world has no word for the shape '{spec.shape}'; its named shapes are {SHAPES}.")
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
