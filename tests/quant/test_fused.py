"""The fused layer against a plain formula in float64 that autograd differentiates, and its products of integer codes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.core.errors import UserError
from qatlab.quant import LSQ, MinMax, QuantConv2d, Quantizer, QuantLinear, calibrate, quantize, verify
from qatlab.quant.layers.trainable import prepare_training
from qatlab.quant.layers.walk import quant_layers
from qatlab.quant.quantizers import kernels

NO_COMPILER = kernels._missing_compiler(torch.device("cpu"))
compiles = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
# What is compiled takes half a minute of compilers, and every element of the kernels is looked at by test_kernels.py.
long = [compiles, pytest.mark.slow]
each_kind = pytest.mark.parametrize("kind", ["eager", pytest.param("compiled", marks=long)])
SLOTS: dict[str, Any] = {"LSQ": LSQ, "LSQ per channel": partial(LSQ, per_channel=True), "MinMax": MinMax, "None": None}
IN, OUT = 24, 20


@pytest.fixture(scope="module", autouse=True)
def really_compiled() -> Iterator[None]:
    """After so many compilations torch goes on without one and says little: here that is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


def layer_of(weight: Any, act: Any, bias: bool = True, kind: str = "eager", bits: int = 4, **more: Any) -> QuantLinear:
    """A layer with scales that are powers of two, some elements of its weight at the ends of the grid and beyond."""
    torch.manual_seed(0)
    layer = QuantLinear(
        nn.Linear(IN, OUT, bias=bias),
        weight and weight(bits, channels=OUT, batched=False, **(more if weight is not MinMax else {})),
        act and act(bits, channels=IN, batched=True, **(more if act is not MinMax else {})),
    )
    for quantizer in (layer.weight_quantizer, layer.act_quantizer):
        if quantizer is not None:
            scale = torch.arange(OUT) % 2 * 0.5 + 0.5 if quantizer.per_channel else torch.tensor(0.5)
            quantizer.store_scale(scale[:, None] if quantizer.per_channel else scale)
    layer.weight.data.copy_(with_ends(layer.weight.shape, bits, 0.5))
    prepare_training(layer, kind, "float")
    return layer.train()


def with_ends(shape: tuple[int, ...], bits: int, scale: float, seed: int = 1) -> Tensor:
    """Normal values, and in every row some exactly at the ends of the grid and up to half a step beyond."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    v = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 ** (bits - 2)
    v.reshape(-1, shape[-1])[:, :7] = torch.tensor([high, low, high + 0.25, high + 0.5, low - 0.25, low - 0.5, 0.5])
    return v * scale


def plain(quantizer: Quantizer | None, x: Tensor, scale: Tensor | None) -> Tensor:
    """The publications' formulas, with detach() for the rounding; ``scale`` is a leaf of its own."""
    if quantizer is None or scale is None:
        return x
    low, high = -(2 ** (quantizer.bits - 1)), 2 ** (quantizer.bits - 1) - 1
    if isinstance(quantizer, MinMax):
        code = (x / scale).detach().round()
        passes = (code >= low) & (code <= high)
        value = code.clamp(low, high) * scale
        return torch.where(passes, x + (value - x).detach(), value.detach())
    n = x.numel() // (x.shape[0] if quantizer.batched else scale.numel())
    factor = 1 / math.sqrt(n * high)
    step = scale * factor + (scale - scale * factor).detach()
    v = x / step
    ends = torch.where(v <= low, torch.full_like(v, low), torch.full_like(v, high))
    return torch.where((v > low) & (v < high), v + (v.round() - v).detach(), ends) * step


def formula(layer: QuantLinear, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients by the plain formula in float64; those of a log-scale by the chain rule."""
    x, weight = x.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    slots = {"act_quantizer": (layer.act_quantizer, x), "weight_quantizer": (layer.weight_quantizer, weight)}
    scales = {n: None if q is None else q.scale.detach().double().requires_grad_() for n, (q, _) in slots.items()}
    quantized = [plain(quantizer, tensor, scales[name]) for name, (quantizer, tensor) in slots.items()]
    y = F.linear(quantized[0], quantized[1], bias)
    y.backward(grad.double())
    found = {"y": y.detach(), "x": x.grad, "weight": weight.grad} | ({} if bias is None else {"bias": bias.grad})
    for name, (quantizer, _) in slots.items():
        if isinstance(quantizer, LSQ):
            scale: Any = scales[name]
            found[f"{name}.log_step"] = scale.grad * scale.detach()
    return found  # type: ignore[return-value]


def computed(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of a module."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(grad.to(y.dtype))
    assert isinstance(layer, nn.Module)
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}  # type: ignore


def error(found: Tensor, right: Tensor) -> float:
    assert found.shape == right.shape
    return float((found.double() - right.double()).norm() / right.double().norm())


def require_close(found: dict[str, Tensor], right: dict[str, Tensor], tensors: float, scales: float) -> None:
    assert found.keys() == right.keys()
    for name, value in found.items():
        assert error(value, right[name]) <= (scales if name.endswith("step") else tensors), name


def unfused(layer: QuantLinear) -> nn.Module:
    """The same layer as a composition: quantizers, then F.linear."""
    twin: Any = copy.deepcopy(layer)

    def forward(x: Tensor) -> Tensor:
        x = x if twin.act_quantizer is None else twin.act_quantizer(x)
        weight = twin.weight if twin.weight_quantizer is None else twin.weight_quantizer(twin.weight)
        return F.linear(x, weight, twin.bias)

    twin.forward = forward
    return twin


X, GRAD = with_ends((3, 5, IN), 4, 0.5, seed=2), torch.randn(3, 5, OUT, generator=torch.Generator().manual_seed(3))
PAIRS = [(w, a) for w in SLOTS for a in SLOTS if a != "LSQ per channel"]


@each_kind
@pytest.mark.parametrize(("weight", "act"), PAIRS)
@pytest.mark.parametrize("bias", [True, False])
def test_equal_to_the_plain_formula(weight: str, act: str, bias: bool, kind: str) -> None:
    layer = layer_of(SLOTS[weight], SLOTS[act], bias, kind)
    require_close(computed(layer, X, GRAD), formula(layer, X, GRAD), 1e-6, 1e-3)
    double = layer.double()
    double.zero_grad()
    require_close(computed(double, X.double(), GRAD), formula(double, X, GRAD), 1e-12, 1e-12)


@each_kind
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("shape", [(1, IN), (40, IN), (2, 3, 4, IN)])
def test_equal_at_other_bits_and_shapes(bits: int, shape: tuple[int, ...], kind: str) -> None:
    layer = layer_of(partial(LSQ, per_channel=True), LSQ, kind=kind, bits=bits)
    x, grad = with_ends(shape, bits, 0.5, seed=4), torch.randn(*shape[:-1], OUT)
    require_close(computed(layer, x, grad), formula(layer, x, grad), 1e-6, 1e-3)


def test_an_input_that_is_not_contiguous_and_scales_that_are_no_powers_of_two() -> None:
    layer = layer_of(LSQ, LSQ)
    for quantizer in (layer.weight_quantizer, layer.act_quantizer):
        assert quantizer is not None
        quantizer.store_scale(torch.tensor(0.3137))
    x, grad = torch.randn(5, 3, IN).transpose(0, 1), torch.randn(5, 3, OUT).transpose(0, 1)
    require_close(computed(layer, x, grad), formula(layer, x, grad), 1e-6, 1e-3)


@pytest.mark.parametrize("matmul", ["float", "int8", "bf16"])
@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 0, IN)], ids=str)
def test_shapes_that_a_linear_layer_takes_too(matmul: str, shape: tuple[int, ...]) -> None:
    layer = layer_of(LSQ, LSQ)
    layer.matmul = matmul
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], OUT)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


# -- what needs no gradient ------------------------------------------------------------------------------------------

TRAINED = ["x", "weight", "bias", "act_quantizer.log_step", "weight_quantizer.log_step"]


@pytest.mark.parametrize("matmul", ["float", "int8", "bf16"])
@pytest.mark.parametrize("frozen", [*[[name] for name in TRAINED], TRAINED[1:], TRAINED[:3], TRAINED[3:]], ids="+".join)
def test_frozen_tensors_get_no_gradient_and_the_others_theirs(frozen: list[str], matmul: str) -> None:
    layer = layer_of(LSQ, LSQ)
    layer.matmul = matmul
    right = computed(copy.deepcopy(layer), X, GRAD)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    x = X.clone().requires_grad_("x" not in frozen)
    layer(x).backward(GRAD)
    found = {"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert [name for name in TRAINED if found[name] is None] == frozen
    assert all(torch.equal(found[name], right[name]) for name in TRAINED if name not in frozen)  # type: ignore[arg-type]


def test_nothing_is_computed_anew_that_no_gradient_needs() -> None:
    layer, seen = layer_of(MinMax, MinMax), []
    layer.weight.requires_grad_(False)
    for quantizer in (layer.act_quantizer, layer.weight_quantizer):
        quantizer.register_forward_hook(lambda module, *_: seen.append(module))  # type: ignore[union-attr]
    for x, again in ((X, []), (X.clone().requires_grad_(), [layer.act_quantizer])):  # the frozen weight is reused
        y = layer(x)
        seen.clear()
        y.backward(GRAD)
        assert set(seen) == set(again)
        assert len(seen) == len(again)


@pytest.mark.parametrize("matmul", ["float", "int8", "bf16"])
def test_a_frozen_weight_is_reused_bit_for_bit(matmul: str) -> None:
    layer = layer_of(MinMax, LSQ)
    layer.weight.requires_grad_(False)
    layer.matmul = matmul
    twin = copy.deepcopy(layer)
    computed(layer, X, GRAD)
    assert len(layer._kept) > 0
    for change in (lambda: None, lambda: layer.weight.mul_(0.5), lambda: layer.weight_quantizer.step.mul_(2)):
        with torch.no_grad():
            change()
        layer.zero_grad()
        twin.load_state_dict(layer.state_dict())
        twin.unfold()
        twin.zero_grad()
        found, right = computed(layer, X, GRAD), computed(twin, X, GRAD)
        assert all(torch.equal(found[name], value) for name, value in right.items())


def test_nothing_is_differentiated_where_nothing_learns() -> None:
    layer = layer_of(MinMax, MinMax).requires_grad_(False)
    assert not layer(X).requires_grad
    with torch.no_grad():
        assert torch.equal(layer(X), unfused(layer)(X))


# -- in the company of torch ------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("weight", "act"), [("LSQ per channel", "LSQ"), ("MinMax", "MinMax"), ("LSQ", "None")])
def test_autocast(weight: str, act: str, dtype: torch.dtype, kind: str) -> None:
    layer = layer_of(SLOTS[weight], SLOTS[act], kind=kind)
    results: list[dict[str, Any]] = []
    for module in (layer, unfused(layer)):
        x = X.clone().to(dtype).detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        y.float().backward(GRAD)
        assert y.dtype == torch.bfloat16
        results.append({"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in module.named_parameters()})
    fused, composed = results
    assert all(fused[name].dtype == value.dtype for name, value in composed.items())
    require_close(fused, composed, 1e-6, 1e-3)


def test_gradients_of_several_backwards_add_up() -> None:
    layer, alone = layer_of(LSQ, LSQ), []
    for seed in (5, 6):
        twin, x = copy.deepcopy(layer), with_ends((3, 5, IN), 4, 0.5, seed)
        alone.append(computed(twin, x, GRAD))
        layer(x).backward(GRAD)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, alone[0][name] + alone[1][name])


def test_copies_and_state_are_those_of_the_layer() -> None:
    layer = layer_of(LSQ, LSQ)
    keys, twin = list(layer.state_dict()), copy.deepcopy(layer)
    right = computed(layer, X, GRAD)
    assert list(layer.state_dict()) == keys
    assert all(parameter.grad is None for parameter in twin.parameters())
    found = computed(twin, X, GRAD)
    assert all(torch.equal(found[name], value) for name, value in right.items())


# In functions, because test_quantizer.py takes every subclass that it finds when tests are collected for one of qatlab's.


@cache
def soft() -> type[Quantizer]:
    class Soft(Quantizer):
        """Somebody's own: rounding softened by tanh, with a learned temperature, differentiated by autograd alone."""

        def __init__(self, bits: int, **where: Any) -> None:
            super().__init__(bits, **where)
            self.register_buffer("step", self._empty_scale())
            self.temperature, self.shift = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(0.1))

        @property
        def scale(self) -> Tensor:
            return self.step  # type: ignore[return-value]

        def store_scale(self, scale: Tensor) -> None:
            self.step.copy_(scale)  # type: ignore[union-attr, operator]

        def fake_quantize(self, x: Tensor) -> Tensor:
            v = (x / self.scale + self.shift).clamp(self.qmin, self.qmax)
            middle = v.detach().floor() + 0.5
            return (
                middle + 0.5 * torch.tanh(self.temperature * (v - middle)) / torch.tanh(self.temperature / 2)
            ) * self.scale

    return Soft


@pytest.mark.parametrize(
    ("weight", "act"), [("Soft", "Soft"), ("Soft", "LSQ"), ("LSQ per channel", "Soft"), ("None", "Soft")]
)
def test_a_quantizer_of_ones_own_needs_nothing_for_it(weight: str, act: str) -> None:
    kinds = {**SLOTS, "Soft": soft()}
    layer = layer_of(kinds[weight], kinds[act]).double()
    require_close(computed(layer, X.double(), GRAD), computed(unfused(layer), X.double(), GRAD), 1e-12, 1e-12)
    if act is weight:
        inputs = X[0, :2].double() + 0.013  # off the ends of the grid, where there is no derivative
        layer.weight.data += 0.017
        assert torch.autograd.gradcheck(layer, inputs.requires_grad_(), atol=1e-6)


@cache
def idle() -> type[Quantizer]:
    class Idle(MinMax):
        """Learns a parameter that this forward does not read."""

        def __init__(self, bits: int, **where: Any) -> None:
            super().__init__(bits, **where)
            self.unread = nn.Parameter(torch.zeros(()))

    return Idle


def test_a_parameter_that_is_not_read_gets_no_gradient() -> None:
    layer = layer_of(idle(), idle())
    right = formula(layer_of(MinMax, MinMax), X, GRAD)
    require_close(computed(layer, X, GRAD), right, 1e-6, 1e-3)


def test_hooks_on_quantizers_see_the_forward() -> None:
    layer, seen = layer_of(LSQ, LSQ), []
    right = layer.act_quantizer(X), layer.weight_quantizer(layer.weight)  # type: ignore[misc]
    for quantizer in (layer.act_quantizer, layer.weight_quantizer):
        quantizer.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))  # type: ignore
    y = layer(X)
    assert len(seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(seen, right, strict=True))
    assert torch.equal(y, F.linear(*seen, layer.bias))


def test_both_quantizers_keep_running_in_the_backward_and_in_verify(build_visual: Any, images: Tensor) -> None:
    model = quantize(build_visual(), partial(LSQ, 8, per_channel=True), partial(MinMax, 8)).train()
    calibrate(model, [images])
    counts: dict[nn.Module, int] = {}
    for quantizer in [module for module in model.modules() if isinstance(module, Quantizer)]:
        counts[quantizer] = 0
        quantizer.register_forward_hook(lambda module, *_: counts.update({module: counts[module] + 1}))
    loss = model(images).square().mean()
    assert len(counts) == 2 * len(quant_layers(model)) == 16
    assert set(counts.values()) == {1}
    loss.backward()
    assert set(counts.values()) == {2}  # computed anew there instead of being kept
    assert all(row["calls"] == 1 for row in verify(model, images))
    assert all(parameter.grad is not None for parameter in model.parameters())


# -- products of integer codes ---------------------------------------------------------------------------------------


def sized(rows: int, columns: int, outputs: int) -> tuple[QuantLinear, Tensor]:
    """A layer W8 per channel, A8, calibrated on the input that is returned."""
    torch.manual_seed(rows)
    x = torch.randn(rows, columns)
    layer = QuantLinear(
        nn.Linear(columns, outputs),
        LSQ(8, channels=outputs, batched=False, per_channel=True),
        LSQ(8, channels=columns, batched=True),
    )
    for quantizer, tensor in ((layer.weight_quantizer, layer.weight), (layer.act_quantizer, x)):
        assert quantizer is not None
        quantizer.observe(tensor)
        quantizer.fit()
    return layer.train(), x


SIZES = [(200, 768, 64), (50, 64, 256), (33, 13, 7), (1, 24, 20)]


@pytest.mark.parametrize("size", [*SIZES, (1, 5, 1)], ids=str)
def test_int8_is_integer_arithmetic(size: tuple[int, int, int]) -> None:
    """With scales that are powers of two nothing is rounded but the codes: every bit is known."""
    layer, x = sized(*size)
    scales = 2.0 ** (np.arange(size[2]) % 3 - 9.0), 2.0**-5
    layer.weight_quantizer = MinMax(8, channels=size[2], batched=False, per_channel=True)
    layer.weight_quantizer.store_scale(torch.from_numpy(scales[0])[:, None])
    layer.act_quantizer = MinMax(8, channels=size[1], batched=True)
    layer.act_quantizer.store_scale(torch.tensor(scales[1]))
    layer.matmul, layer.bias = "int8", None
    quotients = x.numpy() / scales[1], layer.weight.detach().numpy() / scales[0][:, None]
    columns, rows = (np.clip(np.rint(v), -128, 127).astype(np.int64) for v in quotients)
    product = (columns @ rows.T) * (scales[0] * scales[1])
    np.testing.assert_array_equal(layer(x).detach().numpy(), product)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_how_far_integer_products_are_from_float(size: tuple[int, int, int]) -> None:
    layer, x = sized(*size)
    grad = torch.randn(size[0], size[2], generator=torch.Generator().manual_seed(7))
    right, found = computed(copy.deepcopy(layer), x, grad), {}
    for matmul in ("int8", "bf16"):
        layer.matmul = matmul
        found[matmul] = computed(copy.deepcopy(layer), x, grad)
        assert all(value.dtype == right[name].dtype for name, value in found[matmul].items())
    assert error(found["int8"]["y"], right["y"]) <= 1e-6
    assert all(torch.equal(found["int8"][name], value) for name, value in right.items() if name != "y")
    bounds = {"y": 2e-3, "x": 3e-3, "weight": 3e-3, "bias": 0}
    for name, value in right.items():
        assert error(found["bf16"][name], value) <= bounds.get(name, 2e-2), name
    assert error(found["bf16"]["weight"], right["weight"]) > 1e-4  # or it would not be bfloat16


def test_layers_without_both_quantizers_stay_float() -> None:
    slots = MinMax(8, channels=8, batched=False), MinMax(8, channels=3, batched=True)
    conv = QuantConv2d(nn.Conv2d(3, 8, 4, stride=4), *slots)
    model = nn.ModuleList(
        [layer_of(LSQ, MinMax), layer_of(LSQ, None), layer_of(None, MinMax), layer_of(None, None), conv]
    )
    prepare_training(model, "eager", "int8")
    assert [getattr(layer, "matmul", None) for layer in model] == ["int8", "float", "float", "float", None]
    for layer in list(model)[1:4]:
        assert isinstance(layer, QuantLinear)
        require_close(computed(layer, X, GRAD), formula(layer, X, GRAD), 1e-6, 1e-3)
    prepare_training(model, "eager", "float")
    assert [getattr(layer, "matmul", None) for layer in model] == ["float"] * 4 + [None]


@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
def test_every_quantizer_gets_the_kernels() -> None:
    model = nn.ModuleList([layer_of(LSQ, MinMax), layer_of(None, LSQ)])
    for kind, expected in (("compiled", kernels.compiled()), ("eager", kernels.EAGER)):
        prepare_training(model, kind, "float")
        assert all(module.kernels is expected for module in model.modules() if isinstance(module, Quantizer))


def test_grids_whose_codes_do_not_multiply() -> None:
    layer = layer_of(LSQ, partial(MinMax, symmetric=False))
    model = nn.ModuleDict({"first": layer_of(LSQ, LSQ), "second": layer})
    prepare_training(model, "eager", "float")
    for matmul in ("int8", "bf16"):
        with pytest.raises(UserError, match=rf"quant\.matmul={matmul} .*zero points.*quant\.act of second"):
            prepare_training(model, "eager", matmul)
        assert model["first"].matmul == "float"
    layer.act_quantizer, layer.weight_quantizer = MinMax(8, channels=IN, batched=True), None
    prepare_training(model, "eager", "int8")
    layer.weight_quantizer = MinMax(8, channels=OUT, batched=False, width=IN, group_size=8)
    with pytest.raises(UserError, match=r"one scale per sum.*quant\.weight of second"):
        prepare_training(model, "eager", "int8")


def test_products_that_cannot_be_had() -> None:
    with pytest.raises(UserError, match=r"quant\.matmul=int4 is unknown.*float, int8, bf16"):
        prepare_training(nn.ModuleList([layer_of(LSQ, LSQ)]), "eager", "int4")
    for model in (nn.Linear(2, 2), nn.ModuleList([layer_of(LSQ, None)]), nn.ModuleList([layer_of(None, MinMax)])):
        with pytest.raises(UserError, match=r"quant\.matmul=bf16 .*no layer has both quantizers.*quant\.matmul=float"):
            prepare_training(model, "eager", "bf16")
