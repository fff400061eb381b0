"""Where a factor of each channel can go in convolutional towers: through ReLU, averages and batch norms, and through no GELU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from open_clip.modified_resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from timm.models import fastvit
from timm.models.convnext import ConvNeXtBlock, ConvNeXtStage
from timm.models.swin_transformer import PatchMerging
from timm.models.vitamin import MbConvLNBlock, StridedConv
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qatlab.towers.edges import MLPS, Edge, affine, before_last, reader_of, rows_of, values_of
from qatlab.towers.structure import is_plain_convolution, joined


def convolution_edges(visual: nn.Module) -> list[Edge]:
    """Return the edges of all known blocks in ``visual`` that hold convolutions, in the model's order.

    Of the group "conv" are those whose reader is a convolution of an input that a convolution or a norm makes; layers
    that blocks of transformers have too are of their groups.
    """
    found: list[Edge] = []
    for name, module in visual.named_modules():
        edges = next((edges for kind, edges in _EDGES.items() if isinstance(module, kind)), None)
        if edges is not None:
            found += edges(module, name)
    return found


def _edge(
    group: str, makers: tuple[Tensor, ...], owner: nn.Module, paths: tuple[str, ...], name: str
) -> Iterator[Edge]:
    """Yield the edge from ``makers`` to the layers at ``paths`` in ``owner``, unless a part of it is of no known form."""
    layers = [owner.get_submodule(path) for path in paths]
    known = [isinstance(layer, nn.Linear) or (is_plain_convolution(layer) and layer.groups == 1) for layer in layers]
    if makers and all(known):
        yield Edge(group, tuple(reader_of(owner, path, name) for path in paths), makers)


def _made_by(convolution: nn.Module, norm: nn.Module) -> tuple[Tensor, ...]:
    """Return what makes the channels of a convolution with a batch norm behind it, which may be folded into it.

    Nothing is returned where an activation function or another norm lies behind the convolution.
    """
    if any(not isinstance(part, (_BatchNorm, nn.Identity, nn.Dropout, nn.Sequential)) for part in norm.modules()):
        return ()
    if isinstance(norm, _BatchNorm):
        return _affine_of_batches(norm)
    return rows_of(convolution) if is_plain_convolution(convolution) else ()


def _affine_of_batches(norm: nn.Module) -> tuple[Tensor, ...]:
    """Return the weight and bias of a batch norm, () for another module: what it divides by is the same whatever these are."""
    return (norm.weight, norm.bias) if isinstance(norm, _BatchNorm) and norm.affine else ()


# -- open_clip's ResNet -----------------------------------------------------------------------------------------------


def _resnet(module: Any, name: str) -> Iterator[Edge]:
    """Yield the edges of the stem: ReLU and an average lie between its convolutions."""
    yield from _edge("conv", _made_by(module.conv1, module.bn1), module, ("conv2",), name)
    yield from _edge("conv", _made_by(module.conv2, module.bn2), module, ("conv3",), name)
    # The first block has a convolution on its shortcut, so that two layers read the stem and nothing else does.
    if module.layer1[0].downsample is not None:
        paths = ("layer1.0.conv1", "layer1.0.downsample.0")
        yield from _edge("conv", _made_by(module.conv3, module.bn3), module, paths, name)


def _bottleneck(module: Any, name: str) -> Iterator[Edge]:
    yield from _edge("conv", _made_by(module.conv1, module.bn1), module, ("conv2",), name)
    yield from _edge("conv", _made_by(module.conv2, module.bn2), module, ("conv3",), name)


def _resnet_pool(module: Any, name: str) -> Iterator[Edge]:
    if isinstance(module.v_proj, nn.Linear):
        yield from _edge("out_proj", rows_of(module.v_proj), module, ("c_proj",), name)


# -- FastViT ----------------------------------------------------------------------------------------------------------


def _fastvit_mlp(module: Any, name: str) -> Iterator[Edge]:
    """Yield the edge from the depthwise convolution to the first layer of the mlp; GELU lies before the second one."""
    yield from _edge("conv", _made_by(module.conv.conv, module.conv.bn), module, ("fc1",), name)


def _fastvit_attention(module: Any, name: str) -> Iterator[Edge]:
    """Yield the edges of an attention behind a norm, which is a batch norm in most models."""
    makers = _affine_of_batches(module.norm) or affine(module.norm)
    yield from _edge("in_proj", makers, module, ("token_mixer.qkv",), name)
    qkv = module.token_mixer.qkv
    if isinstance(qkv, nn.Linear):
        yield from _edge("out_proj", values_of(qkv.weight, qkv.bias), module, ("token_mixer.proj",), name)


def _fastvit_embedding(module: Any, name: str) -> Iterator[Edge]:
    """Yield the edge between the two convolutions of a patch embedding, once their branches are one convolution each."""
    first, second = module.proj
    made = getattr(first, "reparam_conv", None)
    linear = all(isinstance(part, nn.Identity) for part in (first.se, first.act))
    if made is not None and linear and getattr(second, "reparam_conv", None) is not None:
        yield from _edge("conv", _made_by(made, first.act), module, ("proj.1.reparam_conv",), name)


# -- norms in front of convolutions -----------------------------------------------------------------------------------


def _convnext_block(module: Any, name: str) -> Iterator[Edge]:
    """Yield the edge from the norm to the mlp, and the one inside the mlp; the norm hides what the convolution gives."""
    if hasattr(module.mlp, "fc1"):
        yield from _edge("c_fc", affine(module.norm), module, ("mlp.fc1",), name)
    if isinstance(module.mlp, MLPS):
        yield from before_last(module.mlp, joined(name, "mlp"))


def _convnext_stage(module: Any, name: str) -> Iterator[Edge]:
    if isinstance(module.downsample, nn.Sequential) and len(module.downsample) == 2:
        yield from _edge("conv", affine(module.downsample[0]), module, ("downsample.1",), name)


def _patch_merging(module: Any, name: str) -> Iterator[Edge]:
    yield from _edge("c_fc", affine(module.norm), module, ("reduction",), name)


def _vitamin_block(module: Any, name: str) -> Iterator[Edge]:
    # This norm may have an activation function inside.
    if isinstance(module.pre_norm.act, nn.Identity):
        yield from _edge("conv", affine(module.pre_norm), module, ("conv1_1x1",), name)


def _vitamin_pool(module: Any, name: str) -> Iterator[Edge]:
    yield from _edge("conv", affine(module.norm), module, ("proj",), name)


_EDGES: dict[type[nn.Module], Callable[[Any, str], Iterator[Edge]]] = {
    ModifiedResNet: _resnet,
    Bottleneck: _bottleneck,
    AttentionPool2d: _resnet_pool,
    fastvit.ConvMlp: _fastvit_mlp,
    fastvit.AttentionBlock: _fastvit_attention,
    fastvit.PatchEmbed: _fastvit_embedding,
    ConvNeXtBlock: _convnext_block,
    ConvNeXtStage: _convnext_stage,
    PatchMerging: _patch_merging,
    MbConvLNBlock: _vitamin_block,
    StridedConv: _vitamin_pool,
}
