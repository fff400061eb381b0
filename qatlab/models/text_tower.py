"""The text tower by itself, as an encoder of tokens, and how far quantizing it moves the class embeddings."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import Any

import polars as pl
from torch import Tensor, nn

from qatlab.config import QuantConfig
from qatlab.core.errors import UserError
from qatlab.models.zeroshot import Classes
from qatlab.quant.layers.convert import layer_names
from qatlab.towers.open_clip_text import beside

_PREFIX = "text."  # begins the names of the text tower's layers


class TextTower(nn.Module):
    """Returns text features (B, D) of any length for tokens (B, L): a copy of what a text of an open_clip model goes through.

    They are those of ``encode_text``, which of a CoCa are unit vectors.

    Its layers are named ``text.<name in the model>``, which tells them from the image tower's in ``quant.rules``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        # The memo of deepcopy puts an Identity in the place of parts such as the image tower. Their weights would be copied
        # for nothing, and their layers would be quantized and then never called.
        self.text = copy.deepcopy(model, {id(part): nn.Identity() for part in beside(model)})

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the text features (B, D) of ``tokens`` (B, L) int64, as ``encode_text`` returns them."""
        return self.text.encode_text(tokens)


def of_image(config: QuantConfig) -> dict[str, Any]:
    """Return the rules that concern the image tower: all except those written for the text tower.

    Raises UserError for a rule of the text tower where quant.tower=visual leaves that tower as it is.
    """
    for pattern in config.rules:
        if pattern.startswith(_PREFIX) and config.tower == "visual":
            raise UserError(
                f"quant.rules has the pattern '{pattern}', and quant.tower=visual leaves the text tower as it is: drop the "
                "rule, or set quant.tower=both."
            )
    return {pattern: rule for pattern, rule in config.rules.items() if not pattern.startswith(_PREFIX)}


def of_text(tower: TextTower, config: QuantConfig) -> dict[str, Any]:
    """Return the rules that concern the text tower: those written for it, and general ones that match a layer of it."""
    # Where the text tower is quantized alone, a rule that matches none of its layers is a mistake: it is kept, and
    # ``quantize`` reports it.
    if config.tower == "text":
        return config.rules
    names = layer_names(tower, final_proj=config.last)
    return {
        pattern: rule
        for pattern, rule in config.rules.items()
        if pattern.startswith(_PREFIX) or _matches_one(names, pattern)
    }


def _matches_one(names: list[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def class_drift(before: Classes, after: Classes) -> pl.DataFrame:
    """Return a frame with a row per class, its name and a cosine (float64): how far quantization has moved its embedding.

    The cosine is between the class embedding before and the one after the text tower was quantized, both unit vectors.
    """
    # In double precision: near 1 float32 has steps of 6e-8, and a tower of 8 bits is hardly further away from it.
    cosine = (before.features.double() * after.features.double()).sum(1)
    return pl.DataFrame({"class": before.names, "cosine": cosine.tolist()})
