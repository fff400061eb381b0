"""LSQ+ against its paper's formula in float64, element by element, and against LSQ."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qatlab.core.errors import UserError
from qatlab.quant import LSQ, MinMax
from qatlab.quant.quantizers.lsq_plus import LSQPlus


def built(bits: int, scale: float, offset: float, log_scale: bool = True) -> LSQPlus:
    quantizer = LSQPlus(bits, channels=7, batched=True, log_scale=log_scale).double()
    quantizer.store_scale(torch.tensor(scale))
    quantizer.offset.data.fill_(offset)
    return quantizer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("log_scale", [True, False])
def test_gradients_are_the_papers(bits: int, log_scale: bool) -> None:
    """With a scale of 1 and an offset of 0.25 the values at the ends are exactly there."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(4, 5, 7, generator=generator, dtype=torch.float64) * 2 ** (bits - 2) + 0.25
    special = torch.tensor([high, low, high + 0.25, high + 0.5, low - 0.25, low - 0.5, 0.5, 1.5, -0.5, 0.0])
    x.view(4, -1)[:, :10] = special.double() + 0.25
    x.requires_grad_()
    grad = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    quantizer = built(bits, 1.0, 0.25, log_scale)
    output = quantizer(x)
    output.backward(grad)

    expected, grad_x, slope, shift = (np.empty(x.shape) for _ in range(4))
    for index in np.ndindex(*x.shape):
        v, g = float(x.detach()[index]) - 0.25, float(grad[index])
        inside, end = low < v < high, low if v <= low else high
        expected[index] = (np.rint(v) if inside else end) + 0.25
        grad_x[index], shift[index] = (g, 0.0) if inside else (0.0, g)
        slope[index] = g * (np.rint(v) - v if inside else end)
    factor = 1 / math.sqrt(35 * high)
    np.testing.assert_array_equal(output.detach(), expected)
    np.testing.assert_array_equal(x.grad, grad_x)
    scale = quantizer.log_step if log_scale else quantizer.step
    assert float(scale.grad) == pytest.approx(slope.sum() * factor, rel=1e-12)
    assert float(quantizer.offset.grad) == pytest.approx(shift.sum() * factor, rel=1e-12)


def test_the_offsets_gradient_is_the_slope_of_the_clipped_output() -> None:
    """Where all is clipped the output is a straight line in s and beta, so that finite differences are exact."""
    x = torch.tensor([[9.0, -9.0, 8.0, 7.0, -7.0, 11.0, 12.0]], dtype=torch.float64)
    quantizer = built(2, 0.5, 0.1, log_scale=False)
    quantizer(x).sum().backward()
    factor = 1 / math.sqrt(7 * 1)
    for parameter in (quantizer.step, quantizer.offset):
        with torch.no_grad():
            before = quantizer(x).sum()
            parameter += 0.01
            slope = (quantizer(x).sum() - before) / 0.01
            parameter -= 0.01
        assert float(parameter.grad) == pytest.approx(float(slope) * factor, rel=1e-9)


def test_without_offset_it_is_lsq() -> None:
    x, grad = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plus, lsq = built(4, 0.2, 0.0), LSQ(4, channels=7, batched=True).double()
    lsq.store_scale(torch.tensor(0.2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for quantizer, value in zip((plus, lsq), inputs, strict=True):
        quantizer(value).backward(grad)
    assert torch.equal(plus(x), lsq(x))
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(plus.log_step.grad, lsq.log_step.grad)


@pytest.mark.parametrize("init", ["absmax", "percentile", "mse"])
def test_it_starts_on_the_asymmetric_grid(init: str) -> None:
    x = torch.nn.functional.gelu(torch.randn(4, 90, 7, generator=torch.Generator().manual_seed(2)) * 2)
    plus = LSQPlus(4, channels=7, batched=True, init=init, percentile=99)
    static = MinMax(4, channels=7, batched=True, observer=init, percentile=99, symmetric=False)
    for quantizer in (plus, static):
        quantizer.observe(x)
        quantizer.fit()
    torch.testing.assert_close(plus(x).detach(), static(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(plus.codes(x), static.codes(x))
    torch.testing.assert_close(plus.zero_point.detach(), static.zero_point.float(), rtol=1e-6, atol=0)


def test_a_few_steps_lower_the_error() -> None:
    x = torch.nn.functional.gelu(torch.randn(8, 200, 7, generator=torch.Generator().manual_seed(3)) * 2)
    quantizer = LSQPlus(3, channels=7, batched=True)
    quantizer.observe(x)
    quantizer.fit()
    before = float((quantizer(x) - x).detach().square().mean())
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert float((quantizer(x) - x).detach().square().mean()) < 0.85 * before


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="LSQ for weights"):
        LSQPlus(8, channels=7, batched=False)
    with pytest.raises(UserError, match="init=lsq is unknown"):
        LSQPlus(8, channels=7, batched=True, init="lsq")
    assert not LSQPlus(8, channels=7, batched=True).integer_product
