from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qatlab.quant import LSQ, MinMax, QuantConv2d, QuantLinear, full_precision, quant_layers, quantize
from qatlab.quant.layers.lora import LoRA
from qatlab.quant.layers.trainable import freeze_base


def linear(per_channel: bool = True) -> QuantLinear:
    torch.manual_seed(0)
    layer = QuantLinear(
        nn.Linear(12, 20),
        LSQ(4, channels=20, batched=False, per_channel=per_channel),
        MinMax(8, channels=12, batched=True),
    )
    layer.weight_quantizer.observe(layer.weight)
    layer.act_quantizer.observe(torch.randn(5, 7, 12))
    layer.weight_quantizer.fit()
    layer.act_quantizer.fit()
    return layer.eval()


X = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(1))


def test_output_is_the_product_of_the_quantized_tensors() -> None:
    layer = linear()
    expected = F.linear(layer.act_quantizer(X), layer.weight_quantizer(layer.weight), layer.bias)
    assert torch.equal(layer(X), expected)


def test_parameters_and_names_are_those_of_the_linear() -> None:
    source = nn.Linear(12, 20)
    layer = QuantLinear(source, None, None)
    assert layer.weight is source.weight
    assert layer.bias is source.bias
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(layer(X), source(X))
    assert list(QuantLinear(nn.Linear(12, 20, bias=False), None, None).state_dict()) == ["weight"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_folded_equals_unfolded_bit_for_bit(context: type) -> None:
    layer = linear()
    with context():
        first, second = layer(X), layer(X)
    assert len(layer._kept) > 0
    assert torch.equal(first, layer(X).detach())
    assert torch.equal(first, second)


def test_the_weight_is_quantized_once_in_eval() -> None:
    layer = linear()
    calls = []
    layer.weight_quantizer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for _ in range(3):
            layer(X)
    assert len(calls) == 1
    layer(X)
    assert len(calls) == 2
    layer.train()
    with torch.no_grad():
        layer(X)
        layer(X)
    assert len(calls) == 4


def test_in_training_only_a_frozen_weight_is_quantized_once() -> None:
    layer, calls = linear().train(), []
    layer.weight_quantizer.register_forward_hook(lambda *_: calls.append(1))
    for frozen, count in ((), 3), (("weight",), 6), (("log_step",), 9), (("weight", "log_step"), 10):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name.rsplit(".")[-1] not in frozen)
        for _ in range(3):
            layer(X)
        assert len(calls) == count, frozen
    assert layer.folded.frozen
    assert torch.equal(layer.quantized_weight(), layer.weight_quantizer(layer.weight))
    assert not layer.quantized_weight().requires_grad


def test_a_weight_folded_in_inference_mode_is_not_kept_for_a_backward() -> None:
    make = partial(MinMax, 8)
    layer = QuantConv2d(nn.Conv2d(3, 4, 2), make(channels=4, batched=False), None).eval().requires_grad_(False)
    layer.weight_quantizer.observe(layer.weight)
    layer.weight_quantizer.fit()
    images = torch.randn(2, 3, 4, 4)
    with torch.inference_mode():
        right = layer(images)
    y = layer(images.requires_grad_())
    y.sum().backward()
    assert torch.equal(y.detach(), right)
    assert images.grad.abs().sum() > 0


def change_weight(layer: QuantLinear) -> None:
    layer.weight.mul_(1.5)


def replace_weight_data(layer: QuantLinear) -> None:
    layer.weight.data = layer.weight.data * 1.5


def change_scale(layer: QuantLinear) -> None:
    layer.weight_quantizer.log_step.add_(0.3)


def load_state(layer: QuantLinear) -> None:
    state = {name: value + 0.1 for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)


def swap_quantizer(layer: QuantLinear) -> None:
    layer.weight_quantizer = MinMax(3, channels=20, batched=False)
    layer.weight_quantizer.observe(layer.weight)
    layer.weight_quantizer.fit()


@pytest.mark.parametrize("change", [change_weight, replace_weight_data, change_scale, load_state, swap_quantizer])
def test_a_change_unfolds(change) -> None:
    layer = linear()
    with torch.no_grad():
        before = layer(X)
        change(layer)
        after = layer(X)
    assert not torch.equal(before, after)
    assert torch.equal(after, layer(X).detach())


def test_folded_weights_are_not_saved() -> None:
    layer = linear()
    with torch.no_grad():
        layer(X)
    assert sorted(layer.state_dict()) == ["act_quantizer.step", "bias", "weight", "weight_quantizer.log_step"]
    assert len(copy.deepcopy(layer)._kept) == 0
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(X), layer(X))
    assert len(layer.double()._kept) == 0


def test_convolution() -> None:
    torch.manual_seed(0)
    source = nn.Conv2d(3, 8, 4, stride=2, padding=1, groups=1, bias=True)
    images = torch.randn(2, 3, 10, 10)
    assert torch.equal(QuantConv2d(source, None, None)(images), source(images))
    make = partial(MinMax, 8)
    layer = QuantConv2d(source, make(channels=8, batched=False, per_channel=True), make(channels=3, batched=True))
    layer.weight_quantizer.observe(layer.weight)
    layer.act_quantizer.observe(images)
    layer.weight_quantizer.fit()
    layer.act_quantizer.fit()
    expected = F.conv2d(layer.act_quantizer(images), layer.weight_quantizer(layer.weight), source.bias, 2, 1)
    assert torch.equal(layer(images), expected)
    assert layer.in_features == 48


def test_full_precision_restores_the_quantizers() -> None:
    model = nn.Sequential(linear())
    inside = next(iter(quant_layers(model).values()))
    slots = inside.weight_quantizer, inside.act_quantizer
    with full_precision(model):
        assert torch.equal(model(X), F.linear(X, inside.weight, inside.bias))
    assert (inside.weight_quantizer, inside.act_quantizer) == slots
    with pytest.raises(RuntimeError), full_precision(model):
        model(X[..., :3])
    assert (inside.weight_quantizer, inside.act_quantizer) == slots


def test_the_adapter_is_added_to_every_kind_of_layer() -> None:
    lora = LoRA(12, 20)
    nn.init.normal_(lora.up)
    layer = QuantLinear(nn.Linear(12, 20), None, None, lora)
    assert torch.equal(layer(X), F.linear(X, layer.weight, layer.bias) + lora(X))
    assert sorted(layer.state_dict()) == ["adapter.down", "adapter.up", "bias", "weight"]
    side = nn.Conv2d(3, 8, 4, bias=False)
    conv = QuantConv2d(nn.Conv2d(3, 8, 4), None, None, side)
    images = torch.randn(2, 3, 10, 10)
    expected = F.conv2d(images, conv.weight, conv.bias) + side(images)
    assert torch.equal(conv(images), expected)


def test_freezing_the_base_leaves_quantizers_and_adapters(visual: nn.Module) -> None:
    quantize(visual, partial(LSQ, 8), partial(LSQ, 8), {"*.0.*": None})
    assert all(parameter.requires_grad for parameter in visual.parameters())
    layer = quant_layers(visual)["transformer.resblocks.1.mlp.c_fc"]
    layer.adapter = LoRA(layer.in_features, layer.out_features)
    freeze_base(visual)
    learned = [name for name, parameter in visual.named_parameters() if parameter.requires_grad]
    assert len(learned) == 4 * 2 + 2
    assert all(name.endswith((".log_step", ".adapter.down", ".adapter.up")) for name in learned)


def test_under_autocast_the_grid_is_computed_in_float32() -> None:
    layer = linear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(X.bfloat16())
    assert result.dtype == torch.bfloat16
    loss = result.float().square().mean()
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight_quantizer.log_step.grad.abs().sum() > 0
