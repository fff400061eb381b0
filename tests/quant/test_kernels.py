"""The arithmetic of rounding, plain and compiled, element by element against numpy in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor

from qatlab.core.errors import UserError
from qatlab.quant import LSQ, calibrate, quantize, verify
from qatlab.quant.layers.trainable import prepare_training
from qatlab.quant.quantizers import kernels
from qatlab.quant.quantizers.kernels import EAGER, LONG_RUN, Kernels, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_COMPILER = kernels._missing_compiler(CPU)
KINDS = ["eager", pytest.param("compiled", marks=pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER)))]
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def get() -> Iterator[Callable[[str], Kernels]]:
    """``get(kind)``: the kernels; compiled once for this file."""
    # After so many compilations torch goes on without one and says little: here that is an error.
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield lambda kind: kernels.compiled() if kind == "compiled" else EAGER


def expected(x: Tensor, scale: Tensor, grad: Tensor, bits: int) -> dict[str, np.ndarray]:
    """Codes, LSQ's dx and ds of every element (Esser 2020, equation 3), and dx where the rounded value is on the grid."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    with np.errstate(over="ignore"):
        v = x.double().numpy() / scale.double().numpy()
    grad = grad.double().numpy()
    rounded, inside = np.rint(v), (v > low) & (v < high)
    return {
        "codes": np.clip(rounded, low, high),
        "dx": np.where(inside, grad, 0.0),
        "ds": grad * np.where(inside, rounded - np.clip(v, low, high), np.where(v <= low, low, high)),
        "on_grid": np.where((rounded >= low) & (rounded <= high), grad, 0.0),
    }


def samples(bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """v = x / s of all kinds: at the ends, up to half a step beyond them, at ties, both zeros, tiny, huge, and in between."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ends = [end + sign * d for end, sign in ((high, 1), (low, -1)) for d in (0, 0.25, 0.5, 0.75, 1, -0.25, -0.5, -1)]
    ties = [0.5, -0.5, 1.5, -1.5, 2.5]
    special = torch.tensor([*ends, *ties, 0.0, -0.0, 1e-30, -1e-30, 1e38, -1e38, 3e38], dtype=torch.float64)
    generator = torch.Generator().manual_seed(bits)
    v = torch.cat([special, torch.randn(60, generator=generator).double() * 2 ** (bits - 1)])
    return v, torch.randn(len(v), generator=generator).to(dtype)


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_element(get: Any, kind: str, dtype: torch.dtype, per_channel: bool, bits: int) -> None:
    """Scales are powers of two: the quotient is exact in every dtype, and so is nearly all that follows from it."""
    kernel, (v, grad) = get(kind), samples(bits, dtype)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    exponents = torch.arange(-5.0, 0.0).repeat(len(v) // 5 + 1)[: len(v)] if per_channel else torch.tensor(-3.0)
    scale = exponents.exp2().to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = (v * scale.double()).to(dtype)
    x = x[:, None] if per_channel else x
    scale, grad = (scale[:, None], grad[:, None]) if per_channel else (scale, grad)
    right = expected(x, scale, grad, bits)

    rounded = kernel.fake_quantize(x, scale, low, high)
    codes = kernel.integer_codes(x, scale, low, high, torch.int8)
    grad_x, grad_scale = kernel.lsq_backward(x, scale, grad, low, high)
    passed = kernel.straight_through_backward(x, scale, grad, low, high)
    assert (rounded.dtype, codes.dtype, grad_x.dtype, passed.dtype) == (dtype, torch.int8, dtype, dtype)
    np.testing.assert_array_equal(codes.double(), right["codes"])
    np.testing.assert_array_equal(kernel.integer_codes(x, scale, low, high, torch.bfloat16).double(), right["codes"])
    np.testing.assert_array_equal(rounded.double(), right["codes"] * scale.double().numpy())
    np.testing.assert_array_equal(grad_x.double(), right["dx"])
    np.testing.assert_array_equal(passed.double(), right["on_grid"])
    assert grad_scale.shape == scale.shape
    assert grad_scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if per_channel:  # a channel for each element
        np.testing.assert_allclose(grad_scale.double(), right["ds"], rtol=2e-7, atol=0)
    else:
        assert abs(float(grad_scale) - right["ds"].sum()) <= 1e-6 * np.abs(right["ds"]).sum()


@each_kind
def test_ties_are_those_of_the_division(get: Any, kind: str) -> None:
    """A compiler may multiply by 1 / s instead, which rounds some of these half-way values otherwise."""
    kernel = get(kind)
    for scale in np.linspace(0.011, 0.93, 40, dtype=np.float32):
        x = (np.arange(-130, 130, dtype=np.float32) + np.float32(0.5)) * scale
        right = np.clip(np.rint(x / scale), -128, 127)
        per_tensor = kernel.integer_codes(torch.from_numpy(x), torch.tensor(scale), -128, 127, torch.int8)
        rows, scales = torch.from_numpy(x).view(2, -1), torch.full((2, 1), float(scale))
        per_channel = kernel.integer_codes(rows, scales, -128, 127, torch.int8)
        assert per_tensor.tolist() == per_channel.flatten().tolist() == right.tolist()


@each_kind
@pytest.mark.parametrize("seed", range(3))
def test_a_channels_gradient_is_summed_over_its_row(get: Any, kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(6, 500, generator=generator) for _ in range(2))
    scale = torch.rand(6, 1, generator=generator) * 0.2 + 0.05
    _, found = get(kind).lsq_backward(x, scale, grad, -8, 7)
    slopes = expected(x, scale, grad, 4)["ds"]
    assert found.shape == (6, 1)
    assert (np.abs(found.numpy()[:, 0] - slopes.sum(1)) <= 1e-6 * np.abs(slopes).sum(1)).all()


def everything(kernel: Kernels, x: Tensor, scale: Tensor, grad: Tensor, bits: int = 4) -> list[Tensor]:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grad_x, grad_scale = kernel.lsq_backward(x, scale, grad, low, high)
    return [
        kernel.fake_quantize(x, scale, low, high),
        kernel.integer_codes(x, scale, low, high, torch.int8),
        kernel.straight_through_backward(x, scale, grad, low, high),
        grad_x,
        grad_scale,
    ]


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "whole": lambda: torch.randn(2, 3, 5),
    "transposed": lambda: torch.randn(5, 3, 2).transpose(0, 2),
    "strided": lambda: torch.randn(4, 6, 10)[::2, ::2, ::2],
    "expanded": lambda: torch.randn(2, 1, 5).expand(2, 3, 5),
    "one row": lambda: torch.randn(1, 1, 5),
    "one": lambda: torch.randn(1),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0),
    "no rows": lambda: torch.randn(0, 3, 5),
}


@each_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_shape_and_layout(get: Any, kind: str, layout: str) -> None:
    torch.manual_seed(0)
    x, scale = LAYOUTS[layout](), torch.tensor(0.3)
    grad = torch.randn_like(x)
    right = expected(x, scale, grad, 4)
    rounded, codes, passed, grad_x, grad_scale = everything(get(kind), x, scale, grad)
    assert rounded.shape == codes.shape == passed.shape == grad_x.shape == x.shape
    assert grad_scale.shape == ()
    np.testing.assert_array_equal(codes, right["codes"])
    np.testing.assert_array_equal(grad_x, right["dx"].astype(np.float32))
    np.testing.assert_array_equal(passed, right["on_grid"].astype(np.float32))
    assert float(grad_scale) == pytest.approx(right["ds"].sum(), rel=1e-5, abs=1e-6)


@each_kind
@pytest.mark.parametrize("shape", [(6, 1), (50,)], ids=["rows", "columns"])
def test_ends_of_their_own_for_each_scale(get: Any, kind: str, shape: tuple[int, ...]) -> None:
    """Zero points z from -8 to 7, by the definition clip(round(x / s) + z, -8, 7) - z."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(6, 50, generator=generator) * 4 for _ in range(2))
    scale = torch.rand(shape, generator=generator) * 0.5 + 0.1
    zero = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int32)
    code = np.rint((x / scale).numpy()) + zero.numpy()
    kernel, ends = get(kind), (-8 - zero, 7 - zero)
    rounded = (np.clip(code, -8, 7) - zero.numpy()).astype(np.float32) * scale.numpy()
    np.testing.assert_array_equal(kernel.fake_quantize(x, scale, *ends), rounded)
    passed = kernel.straight_through_backward(x, scale, grad, *ends)
    np.testing.assert_array_equal(passed, np.where((code >= -8) & (code <= 7), grad, np.float32(0)))


@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
def test_zero_points_compile_anew_a_few_times(get: Any) -> None:
    """An end of 0 or 1 is compiled for itself, all others together."""
    torch._dynamo.reset()
    x, scale = torch.randn(6, 40), torch.tensor(0.21)
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        for zero in range(-128, 128, 17):
            low, high = -128 - zero, 127 - zero
            assert torch.equal(
                get("compiled").fake_quantize(x, scale, low, high), EAGER.fake_quantize(x, scale, low, high)
            )
            passed = (kernel.straight_through_backward(x, scale, x, low, high) for kernel in (get("compiled"), EAGER))
            assert torch.equal(*passed)


def test_inputs_are_left_alone() -> None:
    for shape, scale in (((3, 4), torch.tensor(0.3)), ((3, 4), torch.full((3, 1), 0.3))):
        x, grad = torch.randn(shape), torch.randn(shape)
        kept = x.clone(), scale.clone(), grad.clone()
        everything(EAGER, x, scale, grad)
        assert all(torch.equal(a, b) for a, b in zip(kept, (x, scale, grad), strict=True))


@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_no_shape_or_width_compiles_anew_or_gives_other_bits(get: Any, per_channel: bool) -> None:
    def inputs(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        x, grad = torch.randn(rows, columns), torch.randn(rows, columns)
        return x, torch.rand(rows, 1) * 0.3 + 0.05 if per_channel else torch.tensor(0.21), grad

    torch.manual_seed(0)
    for rows in (6, 600):  # inductor sums less than 4096 elements otherwise
        everything(get("compiled"), *inputs(rows, 40))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows, columns, bits in ((6, 40, 4), (3, 2, 4), (50, 768, 8), (768, 33, 3), (7, 1000, 8)):
            x, scale, grad = inputs(rows, columns)
            *found, slope = everything(get("compiled"), x, scale, grad, bits)
            *plain, plain_slope = everything(EAGER, x, scale, grad, bits)
            assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
            assert float((slope - plain_slope).abs().max()) <= 1e-5 * float(grad.norm()) * 2 ** (bits - 1)


@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_a_run_compiles_each_kernel_a_few_times(build_visual: Any, images: Tensor, amp: bool) -> None:
    """Training, scoring, another batch size: beyond torch's limit of 8 the rest would silently be computed eagerly."""
    model = quantize(build_visual(), partial(LSQ, 8, per_channel=True), partial(LSQ, 8))
    calibrate(model, [images])
    prepare_training(model, "compiled", "float")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        for _ in range(2):
            for batch in (images, images[:2]):
                with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                    loss = model.train()(batch).float().square().mean()
                loss.backward()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
                model.eval()(images)
            verify(model, images)


# -- which kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "device", "elements", "missing", "chosen"),
    [
        ("eager", CPU, math.inf, None, "eager"),
        ("eager", CUDA, math.inf, None, "eager"),
        ("compiled", CPU, 0, None, "compiled"),
        ("compiled", CUDA, 0, None, "compiled"),
        ("auto", CPU, LONG_RUN * 0.99, None, "eager"),
        ("auto", CPU, LONG_RUN, None, "compiled"),
        ("auto", CPU, math.inf, "a C++ compiler", "eager"),
        ("auto", CUDA, 0, None, "compiled"),
        ("auto", CUDA, math.inf, "triton", "eager"),
    ],
)
def test_the_choice(
    monkeypatch: pytest.MonkeyPatch, asked: str, device: torch.device, elements: float, missing: str | None, chosen: str
) -> None:
    monkeypatch.setattr(kernels, "_missing_compiler", lambda _: missing)
    assert choose(asked, device, elements) == chosen


def test_what_cannot_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"quant\.kernels=compile is unknown.*did you mean 'compiled'.*auto, eager"):
        choose("compile", CPU, 1)
    monkeypatch.setattr(kernels.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"compiled needs a C\+\+ compiler.*install it, or set quant\.kernels=eager"):
        choose("compiled", CPU, 1)
    assert choose("auto", CPU, math.inf) == "eager"
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"compiled needs triton.*quant\.kernels=eager"):
        choose("compiled", CUDA, 1)


@pytest.mark.parametrize("found", [True, False])
def test_the_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    from torch._inductor import cpp_builder, exc

    def compiler() -> str:
        if not found:
            raise exc.InvalidCxxCompiler
        return "/usr/bin/some-compiler"

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", compiler)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: name)
    monkeypatch.setattr(kernels, "find_spec", lambda name: name if found else None)
    assert choose("auto", CPU, math.inf) == choose("auto", CUDA, 1) == ("compiled" if found else "eager")
