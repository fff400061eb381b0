"""LoRA beside a quantized layer: against a float64 formula, and what it costs a training step in memory and products."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qatlab.core.errors import UserError
from qatlab.quant import LSQ, MinMax, QuantLinear, calibrate, full_precision, quant_layers, quantize, verify
from qatlab.quant.layers.lora import LoRA
from qatlab.quant.layers.trainable import prepare_training
from qatlab.training.memory import saved_bytes

WEIGHT, ACT = partial(MinMax, 8, per_channel=True), partial(MinMax, 8)
X = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(1))
GRAD = torch.randn(5, 7, 20, generator=torch.Generator().manual_seed(2))


def trained(adapter: nn.Module, seed: int = 3) -> Any:
    """The adapter after some training: its second factor is no longer zero."""
    with torch.no_grad():
        adapter.up.normal_(generator=torch.Generator().manual_seed(seed))  # type: ignore[operator, union-attr]
    return adapter


def layer_of(act: Any = MinMax, adapter: nn.Module | None = None) -> QuantLinear:
    torch.manual_seed(0)
    weights = MinMax(8, channels=20, batched=False, per_channel=True)
    layer = QuantLinear(nn.Linear(24, 20), weights, act(8, channels=24, batched=True), adapter).train()
    for quantizer, tensor in ((layer.weight_quantizer, layer.weight), (layer.act_quantizer, X)):
        assert quantizer is not None
        quantizer.observe(tensor)
        quantizer.fit()
    for parameter in (layer.weight, layer.bias):
        parameter.requires_grad_(False)  # type: ignore[union-attr]
    return layer


def test_factors_and_their_start() -> None:
    torch.manual_seed(0)
    lora = LoRA(200, 300)
    assert (lora.rank, lora.alpha, lora.scaling) == (8, 16, 2)
    assert {name: p.shape for name, p in lora.named_parameters()} == {"down": (8, 200), "up": (300, 8)}
    assert torch.equal(lora(torch.randn(4, 200)), torch.zeros(4, 300))
    torch.manual_seed(0)
    assert torch.equal(lora.down, nn.Linear(200, 8, bias=False).weight)  # kaiming_uniform(a=sqrt 5)
    assert float(lora.down.detach().abs().max()) == pytest.approx(1 / math.sqrt(200), rel=0.01)


def test_the_layer_adds_the_term_of_the_input_that_is_not_quantized() -> None:
    lora = trained(LoRA(24, 20, rank=3, alpha=5))
    layer = layer_of(adapter=lora)
    plain = layer_of()
    term = 5 / 3 * X.double() @ lora.down.double().T @ lora.up.double().T
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            torch.testing.assert_close(layer(X).double(), plain(X).double() + term, rtol=1e-5, atol=1e-6)
    with full_precision(nn.Sequential(layer)):
        expected = nn.functional.linear(X, layer.weight, layer.bias) + term
        torch.testing.assert_close(layer(X).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("matmul", ["float", "int8"])
@pytest.mark.parametrize("act", [MinMax, LSQ])
def test_gradients_are_those_of_the_sum(act: Any, matmul: str) -> None:
    """Those of the quantized product, which test_fused.py checks, plus those of the adapter by autograd in float64."""
    layer, base = layer_of(act, trained(LoRA(24, 20))), layer_of(act)
    layer.matmul = base.matmul = matmul
    x, x_base = (X.clone().requires_grad_() for _ in range(2))
    layer(x).backward(GRAD)
    base(x_base).backward(GRAD)
    double = copy.deepcopy(layer.adapter).double()  # type: ignore[union-attr]
    double.zero_grad()
    x_double = X.double().requires_grad_()
    (2 * x_double @ double.down.T @ double.up.T).backward(GRAD.double())
    torch.testing.assert_close(x.grad.double(), x_base.grad + x_double.grad, rtol=1e-4, atol=1e-5)  # type: ignore
    for name, parameter in double.named_parameters():
        torch.testing.assert_close(
            layer.adapter.get_parameter(name).grad.double(), parameter.grad, rtol=1e-4, atol=1e-4
        )  # type: ignore
    if act is LSQ:
        torch.testing.assert_close(layer.act_quantizer.log_step.grad, base.act_quantizer.log_step.grad)  # type: ignore
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_x_itself_is_kept(dtype: torch.dtype) -> None:
    lora, x = trained(LoRA(24, 20)), X.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_bytes(lambda: lora(x), [*lora.parameters(), x])
        y = lora(x)
    assert y.dtype == torch.bfloat16
    assert kept <= 35 * 8 * 4 + sum(p.numel() * 2 for p in lora.parameters())  # rows of rank, factors in bfloat16
    y.float().backward(GRAD)
    assert lora.up.grad.dtype == lora.down.grad.dtype == torch.float32
    right = 2 * X @ lora.down.T @ lora.up.T
    assert float(((y - right).norm() / right.norm()).detach()) < 1e-2


@pytest.mark.parametrize("rank", [0, -1, 21, 2.0, True, "8"])
def test_ranks_that_cannot_be(rank: Any) -> None:
    with pytest.raises(UserError, match=r"rank=.* a whole number from 1"):
        LoRA(24, 20, rank=rank)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), "16"])
def test_alphas_that_cannot_be(alpha: Any) -> None:
    with pytest.raises(UserError, match="alpha="):
        LoRA(24, 20, alpha=alpha)


# -- in a model ------------------------------------------------------------------------------------------------------


def model_of(build_visual: Any, images: Tensor, act: Any = ACT, **more: Any) -> nn.Module:
    model = quantize(build_visual(width=64), WEIGHT, act, adapter=LoRA, **more)
    calibrate(model, [images])
    return model.train()


def test_it_starts_as_the_model_without_and_only_adapters_and_scales_learn(
    build_visual: Any, images: Tensor, train_a_little: Any
) -> None:
    without = quantize(build_visual(width=64), WEIGHT, partial(LSQ, 8))
    calibrate(without, [images])
    model = model_of(build_visual, images, partial(LSQ, 8))
    assert torch.equal(model(images), without.train()(images))
    assert len(verify(model, images)) == 16
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    learned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1] for name in learned} == {
        "adapter.down",
        "adapter.up",
        "act_quantizer.log_step",
    }
    losses = train_a_little(model, images, lr=1e-2)
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())


def test_the_state_loads(build_visual: Any, images: Tensor) -> None:
    model, fresh = model_of(build_visual, images), quantize(build_visual(width=64), WEIGHT, ACT, adapter=LoRA)
    for seed, layer in enumerate(quant_layers(model).values()):
        trained(layer.adapter, seed)  # type: ignore[arg-type]
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(images), model.eval()(images))
    assert torch.equal(copy.deepcopy(model)(images), model(images))


@pytest.mark.parametrize("act", [ACT, partial(LSQ, 8)], ids=["basic", "lsq"])
def test_what_is_kept_for_backward_is_hardly_more_than_in_full_precision(
    build_visual: Any, images: Tensor, act: Any
) -> None:
    full = quantize(build_visual(width=64), None, None).train()
    model = model_of(build_visual, images, act)
    kept = [saved_bytes(lambda m=m: m(images), m.parameters()) for m in (full, model)]  # type: ignore[misc]
    assert kept[1] <= 1.05 * kept[0]


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            left, right = args[-2:]
            self.count += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("act", [ACT, partial(LSQ, 8)], ids=["basic", "lsq"])
def test_no_product_for_the_gradient_of_a_weight(build_visual: Any, images: Tensor, act: Any) -> None:
    """Forward and the input's gradient are left, two of a full step's three, and the adapters' own thin ones."""
    full = quantize(build_visual(width=256), None, None).train()
    lora = quantize(build_visual(width=256), WEIGHT, act, adapter=partial(LoRA, rank=1)).train()
    calibrate(lora, [images])
    counts = []
    for model in (full, lora):
        with Products() as products:
            model(images).sum().backward()
        counts.append(products.count)
    assert 0.6 * counts[0] <= counts[1] <= 0.69 * counts[0]


def test_the_weight_is_rounded_once_for_all_steps(build_visual: Any, images: Tensor) -> None:
    for matmul in ("float", "int8", "bf16"):
        model, calls = model_of(build_visual, images), []
        prepare_training(model, "eager", matmul)
        layer = quant_layers(model)["transformer.resblocks.1.mlp.c_fc"]
        quantizer = layer.weight_quantizer
        assert quantizer is not None
        quantizer.register_forward_hook(lambda *_: calls.append("value"))  # noqa: B023
        codes = quantizer.codes
        quantizer.codes = lambda *args: (calls.append("codes"), codes(*args))[1]  # type: ignore  # noqa: B023
        for _ in range(3):
            model(images).sum().backward()
        assert calls == {"float": ["value"], "int8": ["codes", "value"], "bf16": ["codes"]}[matmul]
        model.eval()
        model.train()
        model(images)
        assert len(calls) in (2, 3)


def test_layers_of_a_model_with_one_weight_unfrozen_again(build_visual: Any, images: Tensor) -> None:
    model = model_of(build_visual, images)
    layer = quant_layers(model)["transformer.resblocks.0.mlp.c_fc"]
    layer.weight.requires_grad_(True)
    model(images).sum().backward()
    assert layer.weight.grad is not None
    assert len(layer._kept) == 0
    before = model(images)
    with torch.no_grad():
        layer.weight.mul_(1.5)
    assert not torch.equal(model(images), before)
