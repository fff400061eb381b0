"""The known families of towers. A new family is a file of this package and an entry in FAMILIES."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from qatlab.towers import open_clip_resnet, open_clip_text, open_clip_vit, timm_trunk, timm_vit
from qatlab.towers.structure import Place, Tower


class Family(Protocol):
    """A file of this package: it recognises the towers of a family and tells where their parts are."""

    def matches(self, module: nn.Module) -> bool:
        """Return whether ``module`` is a tower of this family."""

    def describe(self, module: nn.Module, name: str = "") -> Tower:
        """Return the tower ``module``, which is called ``name`` in the model."""


# The first family that matches decides, so timm_trunk, which matches every
# trunk of timm, comes after timm_vit, which matches one kind of trunk.
FAMILIES: tuple[Family, ...] = (open_clip_vit, timm_vit, timm_trunk, open_clip_resnet, open_clip_text)


def tower_of(module: nn.Module, name: str = "") -> Tower | None:
    """Return the description of ``module``, called ``name`` in the model, or None where no known family matches."""
    family = next((family for family in FAMILIES if family.matches(module)), None)
    return None if family is None else family.describe(module, name)


def final_projections(model: nn.Module) -> dict[str, Place]:
    """Return, by name, the layers that bring the features of the towers in ``model`` to the width of the embedding.

    Each is an nn.Linear, or the Parameter P of a VisionTransformer of open_clip, which applies it as ``x @ P``.
    """
    towers = [tower_of(module, name) for name, module in model.named_modules()]
    return {place.name: place for tower in towers if tower is not None for place in tower.projections}
