from __future__ import annotations

from functools import partial

import open_clip
import pytest
import torch
from torch import nn

from qatlab.quant import LSQ, MinMax, VerificationError, calibrate, quant_layers, quantize, verify
from qatlab.quant.inspect.verify import distinct_values


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_counts_the_distinct_values(build_visual, images: torch.Tensor, bits: int) -> None:
    model = quantize(build_visual(), partial(LSQ, bits, per_channel=True), partial(MinMax, bits))
    calibrate(model, [images])
    model(images)
    rows = verify(model, images)
    assert {(row["layer"], row["tensor"]) for row in rows} == {
        (name, tensor) for name in quant_layers(model) for tensor in ("weight", "act")
    }
    for row in rows:
        assert row["calls"] == 1
        assert 2 <= row["distinct"] <= 2**bits
    name = rows[0]["layer"]
    weight = quant_layers(model)[name].weight_quantizer(quant_layers(model)[name].weight)
    assert rows[0]["distinct"] == max(len(channel.unique()) for channel in weight)


def test_folded_weights_are_run_anew(quantized: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        quantized(images)
        quantized(images)
    assert all(row["calls"] == 1 for row in verify(quantized, images))


def test_a_quantizer_that_does_not_run_is_named(quantized: nn.Module, images: torch.Tensor) -> None:
    bypassed = quant_layers(quantized)["transformer.resblocks.1.mlp.c_fc"]
    bypassed.forward = lambda x: bypassed.compute(x, bypassed.weight)
    with pytest.raises(VerificationError, match=r"2 of 20 .*resblocks\.1\.mlp\.c_fc weight did not run"):
        verify(quantized, images)


def test_a_quantizer_off_its_grid_is_named(quantized: nn.Module, images: torch.Tensor) -> None:
    broken = quant_layers(quantized)["conv1"].act_quantizer
    broken.fake_quantize = lambda x: x
    with pytest.raises(VerificationError, match=r"conv1 act has \d+ values, 256 allowed"):
        verify(quantized, images)


def test_an_unquantized_model_is_an_error(visual: nn.Module, images: torch.Tensor) -> None:
    with pytest.raises(VerificationError, match="no quantized layer"):
        verify(visual, images)


def test_distinct_values() -> None:
    assert distinct_values(torch.tensor([1.0, 1.0, -0.0, 0.0]), 1) == 2
    assert distinct_values(torch.tensor([[1.0, 1.0], [2.0, 3.0]]), 2) == 2
    assert distinct_values(torch.tensor([[1.0, 1.0], [2.0, 3.0]]), 1) == 3


def test_48_layers_of_vit_b_32_run() -> None:
    torch.manual_seed(0)
    vision_cfg = open_clip.get_model_config("ViT-B-32")["vision_cfg"]
    text_cfg = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    visual = open_clip.CLIP(embed_dim=512, vision_cfg=vision_cfg, text_cfg=text_cfg).visual
    quantize(visual, partial(MinMax, 8, per_channel=True), partial(MinMax, 8))
    images = torch.randn(1, 3, 224, 224)
    calibrate(visual, [images])
    rows = verify(visual, images)
    assert len({row["layer"] for row in rows}) == 48
    assert len(rows) == 96
    assert all(row["calls"] == 1 for row in rows)
