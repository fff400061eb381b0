"""What must hold for every quantizer: a new subclass in qatlab/quant is tested here by itself, and so are some options."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import qatlab.quant
from qatlab.core.errors import UserError
from qatlab.quant import LSQ, MinMax, Quantizer
from qatlab.quant.quantizers.dynamic import DynamicMinMax
from qatlab.quant.quantizers.lsq_plus import LSQPlus

Make = Callable[..., Quantizer]


def all_quantizers() -> list[type[Quantizer]]:
    for module in pkgutil.iter_modules(qatlab.quant.__path__, "qatlab.quant."):
        importlib.import_module(module.name)
    found, queue = [], [Quantizer]
    while queue:
        subclasses = queue.pop().__subclasses__()
        found += subclasses
        queue += subclasses
    return sorted(found, key=lambda kind: kind.__name__)


OPTIONS: dict[str, Make] = {
    "MinMax-asymmetric": partial(MinMax, symmetric=False),
    "MinMax-groups": partial(MinMax, group_size=8),
    "DynamicMinMax-asymmetric": partial(DynamicMinMax, symmetric=False),
    **{f"LSQ-{init}": partial(LSQ, init=init) for init in ("lsq", "mse", "percentile")},
    **{f"LSQPlus-{init}": partial(LSQPlus, init=init) for init in ("mse", "percentile")},
    **{f"MinMax-{name}": partial(MinMax, observer=name) for name in ("ema", "percentile", "mse")},
    **{
        f"MinMax-asymmetric-{name}": partial(MinMax, observer=name, symmetric=False)
        for name in ("ema", "percentile", "mse")
    },
}
# Floating-point formats have no bits to choose: test_formats.py has them.
KINDS = [kind for kind in all_quantizers() if "bits" in inspect.signature(kind).parameters]
MAKES: dict[str, Make] = {**{kind.__name__: kind for kind in KINDS}, **OPTIONS}
# Those that round each value by itself, on a grid of scale and zero point; the others say so by a forward of their own.
ELEMENTWISE = {name: make for name, make in MAKES.items() if getattr(make, "func", make).forward is Quantizer.forward}


def made(make: Make, bits: object, batched: bool, per_channel: bool = False) -> Quantizer:
    """A quantizer of 12 channels of 40 weights, or of activations."""
    takes = inspect.signature(make).parameters
    options = {name: value for name, value in {"width": 40, "rank": 4}.items() if name in takes}
    return make(bits, channels=12, batched=batched, **options, **({"per_channel": True} if per_channel else {}))


def uses(make: Make) -> Iterator[tuple[bool, bool]]:
    """(batched, per_channel) of what can be made."""
    for batched, per_channel in [(True, False), (True, True), (False, False), (False, True)]:
        if not per_channel or "per_channel" in inspect.signature(make).parameters:
            with suppress(UserError):
                made(make, 8, batched, per_channel)
                yield batched, per_channel


def cases(makes: dict[str, Make]) -> pytest.MarkDecorator:
    found = {
        "-".join([name, "act" if batched else "weight", *["channel"] * per_channel]): (make, batched, per_channel)
        for name, make in makes.items()
        for batched, per_channel in uses(make)
    }
    return pytest.mark.parametrize(("make", "batched", "per_channel"), list(found.values()), ids=list(found))


each_case, each_elementwise = cases(MAKES), cases(ELEMENTWISE)


def tensor(batched: bool, seed: int = 0) -> Tensor:
    shape = (5, 7, 12) if batched else (12, 40)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fitted(make: Make, bits: int, batched: bool, per_channel: bool) -> Quantizer:
    quantizer = made(make, bits, batched, per_channel)
    quantizer.observe(tensor(batched))
    quantizer.fit()
    return quantizer


def grid(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every element, float64, in x's shape."""
    found = (value.detach().double() for value in quantizer.grid(x))
    if quantizer.batched:
        scale, zero = (value.expand(x.shape) for value in found)
    else:
        scale, zero = (value.expand(quantizer.grid_rows(x).shape).reshape(x.shape) for value in found)
    return scale, zero


def test_the_quantizers_are_found() -> None:
    assert {"DynamicMinMax", "LSQ", "LSQPlus", "MinMax"} <= set(MAKES)
    assert {"MinMax", "LSQ"} <= set(ELEMENTWISE)
    assert list(uses(MinMax)) == [(True, False), (True, True), (False, False), (False, True)]
    assert list(uses(LSQ)) == [(True, False), (False, False), (False, True)]


@each_elementwise
@pytest.mark.parametrize("bits", range(2, 9))
def test_result_lies_on_the_grid(make: Make, bits: int, batched: bool, per_channel: bool) -> None:
    quantizer = fitted(make, bits, batched, per_channel)
    x = tensor(batched, seed=1) * 2
    result, codes = quantizer(x).detach(), quantizer.codes(x)
    assert (codes.dtype, codes.shape) == (torch.int8, x.shape)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert codes.min() >= low
    assert codes.max() <= high
    assert all(len(row.unique()) <= 2**bits for row in quantizer.grid_rows(result))
    scale, zero = grid(quantizer, x)
    offset = 1e-6 if "LSQPlus" in type(quantizer).__name__ else 0  # of x - beta, in float32
    expected = ((x.double() / scale + zero).round().clamp(low, high) - zero) * scale
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=offset)
    torch.testing.assert_close((codes.double() - zero) * scale, expected, rtol=1e-6, atol=offset)
    if not zero.any():
        torch.testing.assert_close(codes * scale.float(), result, rtol=0, atol=0)


@each_elementwise
def test_ties_are_those_of_the_division(make: Make, batched: bool, per_channel: bool) -> None:
    """Multiplying by 1 / s, as torch's own fake quantization does, rounds some of these half-way values otherwise."""
    quantizer = made(make, 8, batched, per_channel)
    if quantizer.state_dict():
        for scale in np.linspace(0.011, 0.93, 50, dtype=np.float32):
            x = ((np.arange(-240, 240, dtype=np.float32) / 2 + np.float32(0.5)) * scale).reshape(-1, 12)
            x = x if batched else x.T.copy()
            quantizer.store_scale(torch.tensor(scale))
            step = quantizer.scale.detach().flatten()[0].numpy()
            assert quantizer.codes(torch.from_numpy(x)).tolist() == np.rint(x / step).astype(np.int8).tolist()


@each_elementwise
@pytest.mark.parametrize("bits", range(2, 9))
def test_idempotent_on_its_own_grid(make: Make, bits: int, batched: bool, per_channel: bool) -> None:
    quantizer = fitted(make, bits, batched, per_channel)
    once = quantizer(tensor(batched, seed=2)).detach()
    if isinstance(quantizer, DynamicMinMax) and not quantizer.symmetric:
        # The rounded token has an end up to half a step elsewhere, and so another grid.
        assert float((quantizer(once) - once).abs().max()) <= float(quantizer.grid(once)[0].max())
    else:
        assert torch.equal(quantizer(once), once)


@each_case
def test_state_dict_round_trip(make: Make, batched: bool, per_channel: bool) -> None:
    quantizer = fitted(make, 4, batched, per_channel)
    loaded = made(make, 4, batched, per_channel)
    loaded.load_state_dict(quantizer.state_dict())
    x = tensor(batched, seed=3)
    assert torch.equal(loaded(x), quantizer(x))
    assert torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))
    other = made(make, 4, batched, per_channel)
    other.observe(tensor(batched, seed=8) + 3)
    other.fit()
    other(x)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), quantizer(x))


@each_elementwise
def test_gradient_passes_inside_and_stops_outside(make: Make, batched: bool, per_channel: bool) -> None:
    quantizer = fitted(make, 4, batched, per_channel)
    x = (tensor(batched, seed=4) * 1.5).requires_grad_()
    quantizer(x).sum().backward()
    scale, zero = grid(quantizer, x.detach())
    code = x.detach() / scale + zero
    assert torch.equal(x.grad[(code > -7.9) & (code < 6.9)].unique(), torch.ones(1))
    assert not x.grad[(code < -8.6) | (code > 7.6)].any()


@each_elementwise
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(make: Make, batched: bool, per_channel: bool, dtype: torch.dtype) -> None:
    quantizer = fitted(make, 8, batched, per_channel)
    x = tensor(batched, seed=5).to(dtype).requires_grad_()
    result = quantizer(x)
    assert result.dtype == dtype
    assert torch.equal(result, quantizer(x.detach().float()).to(dtype))
    result.sum().backward()
    assert x.grad.dtype == dtype
    assert all(len(row.unique()) <= 256 for row in quantizer.grid_rows(result.detach()))


@each_case
def test_float64_stays_float64(make: Make, batched: bool, per_channel: bool) -> None:
    assert fitted(make, 8, batched, per_channel)(tensor(batched).double()).dtype == torch.float64


@each_case
def test_running_before_calibration_is_an_error(make: Make, batched: bool, per_channel: bool) -> None:
    quantizer, x = made(make, 8, batched, per_channel), tensor(batched)
    if not quantizer.state_dict():  # nothing is calibrated
        return
    with pytest.raises(UserError, match="calibrate"):
        quantizer(x)
    fresh = copy.deepcopy(quantizer.state_dict())
    ready = fitted(make, 8, batched, per_channel)
    ready.load_state_dict(fresh)
    with pytest.raises(UserError, match="calibrate"):
        ready(x)
    with pytest.raises(UserError, match="nothing was observed"):
        quantizer.fit()


@each_case
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(make: Make, batched: bool, per_channel: bool, bad: float) -> None:
    quantizer = made(make, 8, batched, per_channel)
    x = tensor(batched)
    x.view(-1)[17] = bad
    with pytest.raises(UserError, match="NaN or infinite"):
        quantizer.observe(x)


@each_elementwise
def test_zeros_give_a_positive_scale(make: Make, batched: bool, per_channel: bool) -> None:
    quantizer = made(make, 8, batched, per_channel)
    x = torch.zeros_like(tensor(batched)) if not per_channel else tensor(batched)
    zeros = (..., 3) if batched else 3
    x[zeros] = 0
    quantizer.observe(x)
    quantizer.fit()
    scale, zero = grid(quantizer, x)
    assert torch.isfinite(scale).all()
    assert torch.isfinite(zero).all()
    assert (scale > 0).all()
    result = quantizer(x.requires_grad_())
    assert not result[zeros].any()
    result.sum().backward()
    assert torch.isfinite(x.grad).all()


@each_elementwise
@pytest.mark.parametrize("value", [3.25, -3.25, 1e-6, -1e6])
def test_a_constant_is_near_its_grid(make: Make, batched: bool, per_channel: bool, value: float) -> None:
    quantizer = made(make, 8, batched, per_channel)
    x = torch.full_like(tensor(batched), value)
    quantizer.observe(x)
    quantizer.fit()
    # Exact but for the paper's start, and where the value is known to the width of a bin.
    tolerance = 1e-4 if "lsq" not in quantizer.extra_repr() else 0.1
    torch.testing.assert_close(quantizer(x).detach(), x, rtol=tolerance, atol=0)


@each_elementwise
def test_zero_is_on_the_grid(make: Make, batched: bool, per_channel: bool) -> None:
    quantizer = made(make, 4, batched, per_channel)
    quantizer.observe(tensor(batched) * 0.3 + 1)
    quantizer.fit()
    x = torch.zeros_like(tensor(batched))
    assert not quantizer(x).detach().any()
    x = tensor(batched) * 0.3 + 1
    x[..., 0] = 0
    assert not quantizer(x).detach()[..., 0].any()


@pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
@pytest.mark.parametrize("bits", [0, 9, 8.0, True, "8"])
def test_bits_out_of_range(make: Make, bits: object) -> None:
    batched = next(uses(make))[0]
    with pytest.raises(UserError, match=r"bits=.* takes a whole number from [12] to 8"):
        made(make, bits, batched)


def test_per_channel_activations_are_refused_where_there_are_none() -> None:
    with pytest.raises(UserError, match="per_channel is true, but LSQ has one scale per tensor of activations"):
        LSQ(8, channels=12, batched=True, per_channel=True)


@each_case
def test_convolution_weights_are_rounded_as_if_flat(make: Make, batched: bool, per_channel: bool) -> None:
    if not batched:
        weight = torch.randn(12, 10, 2, 2, generator=torch.Generator().manual_seed(6))
        quantizer, flat = (made(make, 4, False, per_channel) for _ in range(2))
        quantizer.observe(weight)
        quantizer.fit()
        flat.load_state_dict(quantizer.state_dict())
        assert torch.equal(quantizer(weight).flatten(1), flat(weight.flatten(1)))
