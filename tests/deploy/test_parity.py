"""Layer by layer: a layer that computes as the simulation does is told to, whatever dimensions its input has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qatlab.config import ModelConfig
from qatlab.deploy.parity import MIDDLE, Part, compare_layers
from qatlab.models import clip as clips
from qatlab.quant import MinMax, calibrate, quant_layers, quantize
from qatlab.quant.layers.linear import QuantLayer


def eight_bits(**where: Any) -> MinMax:
    return MinMax(8, **where)


@pytest.fixture(scope="module")
def visual() -> nn.Module:
    clip = clips.load(ModelConfig())
    visual = quantize(clip.visual, eight_bits, eight_bits, patch_conv=True, final_proj=True)
    calibrate(visual, [torch.randn(4, 3, 64, 64)])
    return visual


def itself(layer: QuantLayer, error: float) -> Part:
    """The layer of the simulation in the place of what a runtime runs, its output off by a share ``error``."""

    def codes(x: np.ndarray) -> np.ndarray:
        assert layer.act_quantizer is not None
        return (layer.act_quantizer.codes(torch.from_numpy(x), torch.int16) + MIDDLE).numpy().astype(np.uint8)

    def output(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return (layer.base(torch.from_numpy(x)) * (1 + error)).numpy()

    return Part(output, codes, True)


@pytest.mark.parametrize("error", [0.0, 1e-2])
def test_the_patch_convolution_is_compared_as_every_layer_is(visual: nn.Module, error: float) -> None:
    layers = quant_layers(visual)
    found = compare_layers(visual, torch.randn(2, 3, 64, 64), lambda name: itself(layers[name], error))
    assert [layer.layer for layer in found] == list(layers)
    assert found[0].layer == "conv1"
    for layer in found:
        assert layer.mismatch == 0
        assert layer.error == pytest.approx(error, abs=1e-6)
        assert layer.product_error == pytest.approx(error, abs=1e-6)
        assert layer.passed == (error == 0)
