"""A trunk of timm under open_clip's head: the layers that bring the features to the width of the embedding."""

from __future__ import annotations

from open_clip.timm_model import TimmModel
from torch import nn

from qatlab.towers.structure import Tower, linear_places


def matches(module: nn.Module) -> bool:
    """Return whether ``module`` is a tower of this family."""
    return isinstance(module, TimmModel)


def describe(module: nn.Module, name: str = "") -> Tower:
    """Return the tower ``module``, called ``name`` in the model; the blocks of its trunk are not known."""
    assert isinstance(module, TimmModel)
    projections = linear_places(module, _projection(module), name)
    # A head that is an mlp has two linear layers, of which the last one gives the features.
    height, width = module.image_size
    return Tower(
        module,
        projections,
        output_dim=projections[-1].part.out_features if projections else None,
        image_size=(height, width),
    )


def _projection(tower: TimmModel) -> nn.Module:
    """Return the module that brings the features to the width of the embedding."""
    # open_clip puts a projection into its head, or passes the width to the head's pooling or to timm's own classifier.
    for name in ("proj", "mlp"):
        if hasattr(tower.head, name):
            return getattr(tower.head, name)
    return tower.head.pool.proj if hasattr(tower.head, "pool") else tower.trunk.get_classifier()
