from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qatlab.core.errors import UserError
from qatlab.quant import LSQ, MinMax, QuantConv2d, calibrate, layer_report, quant_layers, quantize

WEIGHT, ACT = partial(LSQ, 8, per_channel=True), partial(MinMax, 8)


def test_scales_come_from_full_precision_inputs(build_visual, images: torch.Tensor) -> None:
    original = build_visual()
    inputs: dict[str, torch.Tensor] = {}
    names = [f"transformer.resblocks.{block}.mlp.{kind}" for block in range(2) for kind in ("c_fc", "c_proj")]
    for name in names:
        original.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0]})
        )
    with torch.no_grad():
        original(images)
    model = quantize(build_visual(), WEIGHT, ACT)
    calibrate(model, images.split(1))
    for name in names:
        layer = quant_layers(model)[name]
        assert float(layer.act_quantizer.scale) == pytest.approx(float(inputs[name].abs().max()) / 127, rel=1e-5)
        expected = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(layer.weight_quantizer.scale.detach(), expected)


def test_modes_are_restored_and_nothing_is_held(build_visual, images: torch.Tensor) -> None:
    model = quantize(build_visual().train(), WEIGHT, ACT)
    model.ln_pre.eval()
    calibrate(model, [images])
    assert model.training
    assert not model.ln_pre.training
    for layer in quant_layers(model).values():
        assert layer._forward_pre_hooks == {}
        assert layer.weight_quantizer._statistics is None
        assert layer.act_quantizer._statistics is None
        assert layer.training
    model(images).sum().backward()


def test_calibrating_again_replaces_the_scales(build_visual, images: torch.Tensor) -> None:
    model = quantize(build_visual(), WEIGHT, ACT, patch_conv=True)
    calibrate(model, [images * 5])
    calibrate(model, [images])
    once = quantize(build_visual(), WEIGHT, ACT, patch_conv=True)
    calibrate(once, [images])
    assert torch.equal(model(images), once(images))


def test_mistakes_name_the_layer(build_visual, images: torch.Tensor) -> None:
    model = quantize(build_visual(), WEIGHT, ACT)
    with pytest.raises(UserError, match="no images"):
        calibrate(model, [])
    with pytest.raises(UserError, match="no images"):
        calibrate(model, [images[:0]])
    with pytest.raises(UserError, match=r"layer transformer\.resblocks\.0\.attn\.in_proj, input: .*NaN"):
        calibrate(model, [images.clone().fill_(float("nan"))])
    with torch.no_grad():
        model.transformer.resblocks[1].mlp.c_proj.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"NaN or infinite"):
        calibrate(model, [images])


def test_zero_rows_and_constant_images(build_visual) -> None:
    model = build_visual()
    with torch.no_grad():
        model.transformer.resblocks[0].mlp.c_fc.weight[3] = 0
    quantize(model, WEIGHT, partial(LSQ, 8, init="mse"), patch_conv=True)
    calibrate(model, [torch.zeros(2, 3, 16, 16)])
    result = model(torch.zeros(2, 3, 16, 16))
    result.sum().backward()
    assert torch.isfinite(result).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def sqnr_db(signal: torch.Tensor, quantized: torch.Tensor) -> float:
    signal, quantized = (tensor.detach().double().numpy() for tensor in (signal, quantized))
    return 10 * np.log10((signal**2).sum() / ((signal - quantized) ** 2).sum())


def test_layer_report_against_the_definition(build_visual, images: torch.Tensor) -> None:
    model = quantize(build_visual(), partial(LSQ, 4), partial(MinMax, 6), patch_conv=True, final_proj=True)
    calibrate(model, [images * 0.5])
    inputs: dict[str, torch.Tensor] = {}
    original = build_visual()
    name = "transformer.resblocks.1.mlp.c_proj"
    original.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.update(x=args[0].detach()))
    original(images)
    rows = {row["layer"]: row for row in layer_report(model, images)}
    assert list(rows) == list(quant_layers(model))
    row, layer, x = rows[name], quant_layers(model)[name], inputs["x"]
    assert (row["kind"], row["in_features"], row["out_features"]) == ("c_proj", 128, 32)
    assert (row["weight_bits"], row["act_bits"]) == (4, 6)
    weight_q = layer.weight_quantizer(layer.weight)
    x_q = layer.act_quantizer(x)
    ratio = x / layer.act_quantizer.scale
    expected = {
        "weight_sqnr_db": sqnr_db(layer.weight, weight_q),
        "act_sqnr_db": sqnr_db(x, x_q),
        "output_sqnr_db": sqnr_db(F.linear(x, layer.weight), F.linear(x_q, weight_q)),
        "weight_scale": float(layer.weight.detach().abs().max()) / 7,
        "act_scale": float(layer.act_quantizer.scale),
        "act_absmax": float(x.abs().max()),
        "act_clipped": float(((ratio > 31.5) | (ratio < -32.5)).double().mean()),
    }
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=0.02 if key == "output_sqnr_db" else 1e-4), key
    assert {row["kind"] for row in rows.values()} == {"conv1", "proj", "in_proj", "out_proj", "c_fc", "c_proj"}
    assert isinstance(quant_layers(model)["conv1"], QuantConv2d)


def test_layer_report_leaves_the_model_alone(quantized: nn.Module, images: torch.Tensor) -> None:
    state = copy.deepcopy(quantized.state_dict())
    before = quantized(images)
    layer_report(quantized, images)
    assert torch.equal(quantized(images), before)
    assert all(torch.equal(value, state[name]) for name, value in quantized.state_dict().items())
