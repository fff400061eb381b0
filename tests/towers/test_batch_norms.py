"""Folding changes no output, in two widths of numbers, whatever the statistics of the norms."""

from __future__ import annotations

import copy
from functools import partial

import open_clip
import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qatlab.quant import MinMax, calibrate, quant_layers, quantize, verify
from qatlab.towers.batch_norms import fold_batch_norms

TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
RESNET = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 32}
# the size of the image, and how many norms follow no convolution
TOWERS = {"resnet": (64, 0), "fastvit_mci0": (64, 2), "fastvit_mci3": (64, 0), "vit_base_mci_224": (224, 0)}


def tower(name: str) -> nn.Module:
    """A tower in eval mode whose norms do something."""
    torch.manual_seed(0)
    if name == "resnet":
        model = open_clip.CLIP(embed_dim=24, vision_cfg=RESNET, text_cfg=TEXT).visual
    else:
        model = timm.create_model(name, num_classes=32, **({"depth": 1} if "base" in name else {}))
    for norm in norms(model):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
    return model.eval().requires_grad_(False)


def norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "fastvit_mci3" else ()) for name in TOWERS]
)
def test_a_folded_tower_computes_the_same(name: str) -> None:
    size, left = TOWERS[name]
    model, images = tower(name), torch.randn(2, 3, size, size)
    before = copy.deepcopy(model)
    assert fold_batch_norms(model) is model
    assert len(norms(model)) == left < len(norms(before))
    assert list(fold_batch_norms(model).state_dict()) == list(model.state_dict())  # there is nothing left to fold
    for dtype, error in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        expected, found = before.to(dtype)(images.to(dtype)), fold_batch_norms(copy.deepcopy(before))(images.to(dtype))
        assert (found - expected).norm() < error * expected.norm()


def test_a_tower_without_batch_norms_stays_as_it_is_and_modes_are_kept() -> None:
    vit = timm.create_model("test_vit", num_classes=8).train()
    names = list(vit.state_dict())
    assert list(fold_batch_norms(vit).state_dict()) == names
    assert fold_batch_norms(tower("resnet").train()).training


def test_a_folded_resnet_is_quantized_whole() -> None:
    model, images = fold_batch_norms(tower("resnet")), torch.randn(4, 3, 64, 64)
    exact = model(images)
    eight = partial(MinMax, 8)
    quantize(model, partial(MinMax, 8, per_channel=True), eight, patch_conv=True, final_proj=True)
    calibrate(model, [images])
    # three convolutions first, three in each of five blocks, one beside the first of each stage, four in the pool
    assert len(quant_layers(model)) == 3 + 3 * 5 + 4 + 4
    assert len(verify(model, images)) == 2 * len(quant_layers(model))
    assert torch.cosine_similarity(model(images), exact).min() > 0.98
