"""LR-QAT against its formula with a straight-through round in float64, and merged against unmerged bit for bit."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.core.errors import UserError
from qatlab.quant import LSQ, MinMax, QuantConv2d, QuantLinear, calibrate, quant_layers, quantize, verify
from qatlab.quant.layers.lora import LoRA
from qatlab.quant.layers.merge import merge
from qatlab.quant.layers.trainable import prepare_training
from qatlab.quant.quantizers.lr_qat import LRQAT
from qatlab.training.memory import saved_bytes

IN, OUT = 24, 20
WEIGHT, ACT = partial(LRQAT, 4, rank=4), partial(LSQ, 8)
X = torch.randn(6, 5, IN, generator=torch.Generator().manual_seed(1))


def fitted(bits: int = 4, per_channel: bool = True, weight: Tensor | None = None, **more: Any) -> LRQAT:
    """A quantizer that was trained: A is no longer zero, s no longer s0."""
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN) if weight is None else weight
    options = {"rank": 4, **more}
    quantizer = LRQAT(
        bits, channels=len(weight), batched=False, width=weight[0].numel(), per_channel=per_channel, **options
    )
    quantizer.observe(weight)
    quantizer.fit()
    with torch.no_grad():
        quantizer.low_rank.up.normal_(std=2 ** (bits + 2))
        learned = quantizer.log_step if quantizer.log_scale else quantizer.step
        learned.add_(0.2 * torch.randn(learned.shape) * (1 if quantizer.log_scale else learned))
    return quantizer


def formula(quantizer: LRQAT, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The paper's equation, differentiated by autograd; the mask of the clip is LSQ's."""
    low, high = -(2 ** (quantizer.bits - 1)), 2 ** (quantizer.bits - 1) - 1
    leaves = {name: p.detach().double().requires_grad_() for name, p in quantizer.named_parameters()}
    w = weight.detach().double().requires_grad_()
    scale = leaves["log_step"].exp() if quantizer.log_scale else leaves["step"].abs()
    factor = quantizer.low_rank.alpha / quantizer.low_rank.rank
    v = w / quantizer.start.double() + factor * leaves["low_rank.up"] @ leaves["low_rank.down"]
    rounded = v + (v.round() - v).detach()
    ends = torch.where(v >= high, float(high), float(low))
    result = scale * torch.where((v > low) & (v < high), rounded, ends)
    result.backward(grad.double())
    return {"result": result.detach(), "weight": w.grad} | {name: p.grad for name, p in leaves.items()}  # type: ignore


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("more", [{}, {"alpha": 7.5, "init": "mse"}, {"log_scale": False}], ids=str)
def test_equal_to_the_formula(bits: int, per_channel: bool, more: dict[str, Any]) -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    quantizer = fitted(bits, per_channel, weight, **more)
    grad = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3))
    for module, tolerance in ((quantizer, 1e-5), (copy.deepcopy(quantizer).double(), 1e-12)):
        dtype = module.start.dtype
        right = formula(module, weight, grad)
        w = weight.to(dtype, copy=True).requires_grad_()
        result = module(w)
        result.backward(grad.to(dtype))
        found = {"result": result.detach(), "weight": w.grad} | {n: p.grad for n, p in module.named_parameters()}
        assert found.keys() == right.keys()
        for name, value in found.items():
            assert float((value.double() - right[name]).norm() / right[name].norm()) <= tolerance, name
        assert (
            float(module.codes(weight.to(dtype)).double().sub(right["result"] / module.scale.detach()).abs().max())
            < 1e-4
        )
    inside = right["weight"] != 0
    assert inside.any()
    assert not inside.all()


def test_the_clip_stops_the_gradient_at_its_ends_and_beyond() -> None:
    quantizer = LRQAT(3, channels=1, batched=False, width=8, per_channel=False, rank=1).double()
    quantizer.store_scale(torch.tensor(1.0))
    w = torch.tensor([[3.25, 3.0, 2.75, -4.0, -4.25, -3.75, 0.4, 9.0]], dtype=torch.float64, requires_grad=True)
    assert quantizer(w).tolist() == [[3, 3, 3, -4, -4, -4, 0, 3]]
    quantizer(w).sum().backward()
    assert w.grad.tolist() == [[0, 0, 1, 0, 0, 1, 1, 0]]
    assert float(quantizer.log_step.grad) == 3 + 3 + 3 - 4 - 4 - 4 + 0 + 3
    assert torch.equal(quantizer.low_rank.up.grad, (w.grad * quantizer.low_rank.down).sum(1, keepdim=True))


def test_it_starts_as_plain_rounding() -> None:
    weight = torch.randn(OUT, IN)
    for bits in (2, 4, 8):
        for per_channel in (True, False):
            quantizer = LRQAT(bits, channels=OUT, batched=False, width=IN, per_channel=per_channel, rank=4)
            plain = LSQ(bits, channels=OUT, batched=False, per_channel=per_channel)
            for one in (quantizer, plain):
                one.observe(weight)
                one.fit()
            assert torch.equal(quantizer(weight), plain(weight))
            assert torch.equal(quantizer.codes(weight), plain.codes(weight))


def test_the_sum_is_rounded_in_float32_under_autocast() -> None:
    quantizer, weight = fitted(8), torch.randn(OUT, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(weight), fitted(8)(weight))
    half = quantizer(weight.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, quantizer(weight.bfloat16().float()).bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batched": True}, "another quantizer for activations"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 21}, "from 1 to 20"),
        ({"alpha": 0}, "alpha=0"),
        ({"init": "max"}, "init=max"),
        ({"bits": 9}, "2 to 8"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LRQAT(**{"bits": 4, "channels": OUT, "batched": False, "width": IN, "rank": 4, **options})


# -- in a layer ------------------------------------------------------------------------------------------------------


def layer_of(bits: int, per_channel: bool = True) -> QuantLinear:
    torch.manual_seed(bits)
    linear = nn.Linear(IN, OUT)
    layer = QuantLinear(linear, fitted(bits, per_channel, linear.weight), LSQ(8, channels=IN, batched=True))
    layer.act_quantizer.observe(X)  # type: ignore[union-attr]
    layer.act_quantizer.fit()  # type: ignore[union-attr]
    for parameter in (layer.weight, layer.bias):
        parameter.requires_grad_(False)  # type: ignore[union-attr]
    return layer.train()


@pytest.mark.parametrize("matmul", ["float", "int8"])
def test_the_fused_layer_gives_the_gradients_of_the_composition(matmul: str) -> None:
    layer = layer_of(4).double() if matmul == "float" else layer_of(4)
    layer.matmul, twin = matmul, copy.deepcopy(layer)
    x, x_twin = (X.to(layer.weight.dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(6, 5, OUT).to(x)
    layer(x).backward(grad)
    F.linear(twin.act_quantizer(x_twin), twin.weight_quantizer(twin.weight), twin.bias).backward(grad)  # type: ignore
    for found, right in zip([x, *layer.parameters()], [x_twin, *twin.parameters()], strict=True):
        torch.testing.assert_close(found.grad, right.grad)
    assert layer.weight_quantizer.low_rank.up.grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merged_equals_unmerged_bit_for_bit(bits: int, per_channel: bool, dtype: torch.dtype) -> None:
    layer = layer_of(bits, per_channel).to(dtype)
    x, trained = X.to(dtype), layer.weight_quantizer
    assert isinstance(trained, LRQAT)
    codes = trained.codes(layer.weight)
    assert codes.dtype == torch.int8
    assert codes.unique().tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1))) or bits > 6
    assert not torch.equal(codes, (layer.weight / trained.start).round().to(torch.int8))  # the adapter moved some
    outputs = []
    for _ in range(2):
        outputs.append([layer(x).detach(), layer.eval()(x).detach()])
        with torch.no_grad():
            outputs[-1].append(layer(x))
        layer.matmul = "int8"
        outputs[-1].append(layer.train()(x).detach())
        layer.matmul = "float"
        assert merge(nn.Sequential(layer))[0] is layer if isinstance(layer.weight_quantizer, LRQAT) else True
    assert all(torch.equal(before, after) for before, after in zip(*outputs, strict=True))
    assert type(layer.weight_quantizer) is MinMax
    assert torch.equal(layer.weight_quantizer.codes(layer.weight), codes)
    assert torch.equal((codes * layer.weight_quantizer.scale).to(dtype), layer.weight)
    assert list(layer.state_dict()) == ["weight", "bias", "weight_quantizer.step", "act_quantizer.log_step"]


def test_convolution() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 4, stride=4)
    layer = QuantConv2d(conv, fitted(4, weight=conv.weight), None)
    images = torch.randn(2, 3, 8, 8)
    before = layer.eval()(images)
    assert torch.equal(before, F.conv2d(images, layer.weight_quantizer(conv.weight), conv.bias, 4))  # type: ignore
    merge(nn.Sequential(layer))
    assert torch.equal(layer(images), before)


# -- in a model ------------------------------------------------------------------------------------------------------


def model_of(build_visual: Any, images: Tensor, **more: Any) -> nn.Module:
    model = quantize(build_visual(width=64), WEIGHT, ACT, **more)
    calibrate(model, [images])
    return model.train()


def test_trained_merged_stored_and_loaded(build_visual: Any, images: Tensor, train_a_little: Any) -> None:
    more = {"patch_conv": True, "final_proj": True}
    model = model_of(build_visual, images, **more)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    learned = {name.split("quantizer.")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert learned == {"log_step", "low_rank.down", "low_rank.up"}
    losses = train_a_little(model, images, lr=1e-1)
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    assert len(verify(model, images)) == 20

    loaded = quantize(build_visual(width=64), WEIGHT, ACT, **more)
    loaded.load_state_dict(model.state_dict())
    right = model.eval()(images)
    assert torch.equal(loaded.eval()(images), right)
    assert merge(model) is model
    assert torch.equal(model(images), right)
    assert len(verify(model, images)) == 20
    plain = quantize(build_visual(width=64), partial(MinMax, 4, per_channel=True), ACT, **more)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval()(images), right)


def test_what_is_kept_for_backward(build_visual: Any, images: Tensor) -> None:
    full = quantize(build_visual(width=64), None, None).train()
    model = model_of(build_visual, images)
    kept = [saved_bytes(lambda m=m: m(images), m.parameters()) for m in (full, model)]  # type: ignore[misc]
    assert kept[1] <= 1.05 * kept[0]


def test_in_training_every_step_rounds_anew(build_visual: Any, images: Tensor) -> None:
    model = model_of(build_visual, images)
    prepare_training(model, "eager", "int8")
    before = model(images)
    with torch.no_grad():
        for layer in quant_layers(model).values():
            layer.weight_quantizer.low_rank.up.add_(1)  # type: ignore[union-attr, operator]
    assert not torch.equal(model(images), before)
    assert all(len(layer._kept) == 0 for layer in quant_layers(model).values())


def test_a_model_without_it_does_not_merge(build_visual: Any, images: Tensor) -> None:
    model = quantize(build_visual(width=64), partial(MinMax, 8), partial(MinMax, 8), adapter=LoRA)
    with pytest.raises(UserError, match="no layer has an LRQAT"):
        merge(model)
