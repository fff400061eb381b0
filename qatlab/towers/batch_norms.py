"""Batch norms that follow a convolution, and branches of convolutions, are made part of one convolution."""

from __future__ import annotations

from open_clip.modified_resnet import Bottleneck, ModifiedResNet
from timm.layers import BatchNormAct2d, ConvNormAct
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from qatlab.towers.structure import Place


def fold_batch_norms(visual: nn.Module) -> nn.Module:
    """Return ``visual``, changed in place, without the batch norms that follow a convolution; its outputs stay the same.

    In eval mode such a norm multiplies each output channel and adds to it, as the convolution itself can. What follows it,
    such as an activation function, stays. The branches of MobileOne and RepMixer blocks become the one convolution that
    timm makes of them. A tower without batch norms stays as it is.
    """
    if not has_batch_norms(visual):
        return visual
    training = visual.training
    # Only the statistics that were learned can be folded: those of a batch are not known before it comes.
    visual.eval()
    if any(getattr(module, "reparam_conv", module) is None for module in visual.modules()):
        # Only then, because some blocks of timm fail where their branches were merged before.
        reparameterize_model(visual, inplace=True)
    for convolution, norm in _pairs(visual):
        convolution.put(fuse_conv_bn_eval(convolution.part, norm.part))
        norm.put(_after(norm.part))
    return visual.train(training)


def has_batch_norms(visual: nn.Module) -> bool:
    """Return whether ``visual`` has a batch norm that is a module of its own."""
    return any(isinstance(module, _BatchNorm) for module in visual.modules())


def _pairs(visual: nn.Module) -> list[tuple[Place, Place]]:
    """Return the places of each convolution, and of the batch norm that it is followed by."""
    found = []
    for owner in visual.modules():
        for convolution, norm in _names(owner):
            pair = Place(convolution, owner, convolution), Place(norm, owner, norm)
            if isinstance(pair[0].part, nn.Conv2d) and isinstance(pair[1].part, _BatchNorm):
                found.append(pair)
        if isinstance(owner, Bottleneck) and owner.downsample is not None:
            found.append((Place("0", owner.downsample, "0"), Place("1", owner.downsample, "1")))
    return found


def _names(owner: nn.Module) -> list[tuple[str, str]]:
    """Return the names that a module of a known class gives to its convolutions and to the norms behind them."""
    if isinstance(owner, (ModifiedResNet, Bottleneck)):
        return [(f"conv{number}", f"bn{number}") for number in (1, 2, 3)]
    return [("conv", "bn")] if isinstance(owner, ConvNormAct) else []


def _after(norm: nn.Module) -> nn.Module:
    """Return what a batch norm does besides normalising: timm's BatchNormAct2d has a dropout and an activation function."""
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
