"""open_clip's ModifiedResNet: the projection at the end of the pooling attention of CLIP's ResNets."""

from __future__ import annotations

from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from torch import nn

from qatlab.towers.structure import Tower, linear_places


def matches(module: nn.Module) -> bool:
    """Return whether ``module`` is a tower of this family."""
    return isinstance(module, ModifiedResNet)


def is_pool(module: nn.Module) -> bool:
    """Return whether ``module`` is the attention that pools the last feature map, which calls none of its four layers."""
    return isinstance(module, AttentionPool2d)


def describe(module: nn.Module, name: str = "") -> Tower:
    """Return the tower ``module``, called ``name`` in the model, without its blocks, which are convolutions."""
    assert isinstance(module, ModifiedResNet)
    # The pooling attention ends in the only layer whose output has the width of the embedding.
    return Tower(
        module,
        projections=linear_places(module, module.attnpool.c_proj, name),
        pool=module.attnpool,
        output_dim=module.output_dim,
        image_size=(module.image_size, module.image_size),
    )
