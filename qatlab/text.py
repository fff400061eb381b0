"""The text tower by itself: its quantized twin, and how far it moves the class embeddings."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import Any

import polars as pl
from torch import Tensor, nn

from qatlab.quant.convert import layer_names
from qatlab.zeroshot import Classes


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


def of_text(tower: TextTower, rules: dict[str, Any]) -> dict[str, Any]:
    """Return the rules that concern the text tower: those written for it, and those for both that match a layer of it."""
    names = layer_names(tower)
    return {
        pattern: rule
        for pattern, rule in rules.items()
        if pattern.startswith("text.") or any(fnmatchcase(name, pattern) for name in names)
    }


def class_drift(before: Classes, after: Classes) -> pl.DataFrame:
    """Return class and cosine (float64): of each class's embedding, before and after the text tower was quantized."""
    cosine = (before.features.double() * after.features.double()).sum(1)
    return pl.DataFrame({"class": before.names, "cosine": cosine.tolist()})
