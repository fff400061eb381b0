"""Rewrites of the full-precision model against Brevitas: its activation equalization and its Hadamard transforms."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch import nn

from qatlab.quant.quantizers.hadamard import walsh_hadamard
from qatlab.quant.rewrites.smoothquant import SmoothQuant

pytest.importorskip("brevitas", reason="Brevitas is not installed: the extra 'peers', in an environment of its own")

from brevitas.graph.equalize import activation_equalization_mode
from brevitas.graph.hadamard import get_hadK, matmul_hadU

pytestmark = pytest.mark.peers


def visual() -> nn.Module:
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    tower = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).visual.eval()
    with torch.no_grad():  # norms and biases that a trained model has
        for parameter in tower.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return tower


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothed_weights_are_those_of_activation_equalization(alpha: float) -> None:
    ours, theirs = visual(), visual()
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    before = ours(images)
    # Brevitas multiplies in front of nn.MultiheadAttention and nn.Linear, and sees no out_proj inside the former.
    SmoothQuant(dict.fromkeys(("in_proj", "c_fc", "c_proj"), alpha))(ours, [images])
    with torch.no_grad(), activation_equalization_mode(theirs, alpha, layerwise=True):
        theirs(images)
    torch.testing.assert_close(ours(images), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs(images), before, rtol=0, atol=1e-5)
    for mine, peer in zip(ours.transformer.resblocks, theirs.transformer.resblocks, strict=True):
        pairs = [(mine.attn.in_proj_weight, peer.attn.layer.in_proj_weight)]
        pairs += [(getattr(mine.mlp, name).weight, getattr(peer.mlp, name).layer.weight) for name in ("c_fc", "c_proj")]
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("width", [1, 2, 16, 64, 512, 2048])
def test_the_transform_is_quarots(width: int) -> None:
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert get_hadK(width)[1] == 1
    # Its divisor, the root of the width, is float32.
    torch.testing.assert_close(walsh_hadamard(x), matmul_hadU(x), rtol=1e-7, atol=1e-7)
