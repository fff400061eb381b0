"""Quantized convolutions: every kind of activations, grouped channels, and attention whose projections are called."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from open_clip.modified_resnet import AttentionPool2d
from open_clip.transformer import AttentionalPooler
from torch import nn
from torch.nn import functional as F

from qatlab.core.errors import UserError
from qatlab.quant import DynamicMinMax, LoRA, MinMax, calibrate, layer_report, quant_layers, quantize, verify
from qatlab.quant.layers.walk import full_precision

EIGHT = partial(MinMax, 8)


def network(groups: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, 2, 1, groups=groups), nn.Flatten(2)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("act", [EIGHT, partial(MinMax, 8, per_channel=True), partial(DynamicMinMax, 8)])
def test_a_pixel_is_a_token(act: Any, groups: int) -> None:
    """Against a plain formula: a scale per tensor, per input channel, or per pixel."""
    model, images = network(groups), torch.randn(4, 3, 10, 10)
    hidden = model[1](model[0](images))
    weight, bias = model[2].weight.clone(), model[2].bias
    quantize(model, EIGHT, act)
    calibrate(model, [images])
    (name,) = quant_layers(model)
    assert name == "2"
    over = {EIGHT: (0, 1, 2, 3)}.get(act, (1,) if act.func is DynamicMinMax else (0, 2, 3))
    low, high = hidden.amin(over, keepdim=True), hidden.amax(over, keepdim=True)
    scale = torch.maximum(-low, high) / 127
    rounded = (hidden / scale).round().clamp(-128, 127) * scale
    step = weight.abs().max() / 127
    expected = F.conv2d(rounded, (weight / step).round() * step, bias, 2, 1, 1, groups).flatten(2)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert len(verify(model, images)) == 2
    (row,) = layer_report(model, images)
    assert row["in_features"] == 8 // groups * 9
    assert row["act_clipped"] == 0
    assert 30 < row["output_sqnr_db"] < 60


def test_convolutions_get_no_adapter_and_a_model_of_them_alone_is_refused_one() -> None:
    with pytest.raises(UserError, match="no linear layer gets one"):
        quantize(network(), EIGHT, EIGHT, adapter=partial(LoRA, rank=2))


def test_what_may_compute_something_else_stays_as_it_is() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    model = nn.Sequential(Own(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 1))
    quantize(model, EIGHT, EIGHT)
    assert list(quant_layers(model)) == ["2"]


@pytest.mark.parametrize("context", [16, 24])
def test_a_pooler_of_queries_computes_the_same(context: int) -> None:
    """With keys as wide as the queries torch keeps one weight for all three projections, else three."""
    torch.manual_seed(0)
    model = nn.Sequential(AttentionalPooler(16, context, n_head=4, n_queries=3)).eval().requires_grad_(False)
    model[0].attn.in_proj_bias.normal_()
    x = torch.randn(2, 5, context)
    exact = model(x)
    quantize(model, EIGHT, EIGHT)
    assert list(quant_layers(model)) == [f"0.attn.{part}_proj" for part in ("q", "k", "v", "out")]
    with full_precision(model):
        torch.testing.assert_close(model(x), exact, rtol=1e-5, atol=1e-6)
    calibrate(model, [x])
    assert 0 < (model(x) - exact).norm() < 0.05 * exact.norm()


def test_the_pool_of_a_resnet_computes_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(AttentionPool2d(4, 16, 4, 12)).eval().requires_grad_(False)
    original, maps = copy.deepcopy(model), torch.randn(2, 16, 4, 4)
    quantize(model, EIGHT, EIGHT)
    assert list(quant_layers(model)) == [f"0.{part}_proj" for part in ("k", "q", "v", "c")]
    assert model.state_dict().keys() >= original.state_dict().keys()
    with full_precision(model):
        torch.testing.assert_close(model(maps), original(maps), rtol=1e-5, atol=1e-6)
