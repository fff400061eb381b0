"""The text tower by itself: its quantized twin, and how far it moves the class embeddings."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import Any

import polars as pl
from torch import Tensor, nn

from qatlab.config import QuantConfig
from qatlab.errors import UserError
from qatlab.quant.convert import layer_names
from qatlab.zeroshot import Classes

_PREFIX = "text."  # of the names of the text tower's layers


class TextTower(nn.Module):
    """Returns text features (B, D) of any length for tokens (B, L): a copy of an open_clip model without its image tower.

    Its layers are named ``text.<name in the model>``, which tells them from the image tower's in ``quant.rules``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text = copy.deepcopy(model, {id(model.visual): nn.Identity()})

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the text features of ``tokens``."""
        return self.text.encode_text(tokens)


def of_image(config: QuantConfig) -> dict[str, Any]:
    """Return the rules that concern the image tower: all but those written for the text tower.

    Raises UserError for a rule of the text tower where that is not quantized.
    """
    for pattern in config.rules:
        if pattern.startswith(_PREFIX) and config.tower == "visual":
            raise UserError(
                f"quant.rules has the pattern '{pattern}', and quant.tower=visual leaves the text tower as it is: drop the "
                "rule, or set quant.tower=both."
            )
    return {pattern: rule for pattern, rule in config.rules.items() if not pattern.startswith(_PREFIX)}


def of_text(tower: TextTower, config: QuantConfig) -> dict[str, Any]:
    """Return the rules that concern the text tower: those written for it, and those for both that match a layer of it.

    Where it is quantized alone these are all rules, so that one for the image tower is told as a mistake.
    """
    if config.tower == "text":
        return config.rules
    names = layer_names(tower)
    return {
        pattern: rule
        for pattern, rule in config.rules.items()
        if pattern.startswith(_PREFIX) or any(fnmatchcase(name, pattern) for name in names)
    }


def class_drift(before: Classes, after: Classes) -> pl.DataFrame:
    """Return class and cosine (float64): of each class's embedding, before and after the text tower was quantized."""
    cosine = (before.features.double() * after.features.double()).sum(1)
    return pl.DataFrame({"class": before.names, "cosine": cosine.tolist()})
