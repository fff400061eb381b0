"""LSQ against its paper's formula in float64, its N convention and its three starts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qatlab.core.errors import UserError
from qatlab.quant import LSQ


def formula(x: np.ndarray, scale: np.ndarray, bits: int, grad: np.ndarray, n: int) -> tuple[np.ndarray, ...]:
    """Esser 2020, element by element: output, dx, and ds summed over the elements of each scale (a row, or all)."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    output, grad_x, slope = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    for index in np.ndindex(*x.shape):
        s = scale[index[0]] if scale.size > 1 else scale.item()
        v = x[index] / s
        if low < v < high:
            output[index], grad_x[index], slope[index] = np.rint(v) * s, grad[index], np.rint(v) - v
        else:
            end = low if v <= low else high
            output[index], grad_x[index], slope[index] = end * s, 0.0, end
    total = (slope * grad).sum(tuple(range(1, x.ndim))) if scale.size > 1 else (slope * grad).sum()
    return output, grad_x, total / math.sqrt(n * high)


def with_boundaries(shape: tuple[int, ...], scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Values in and out of range, and in every row some exactly at both ends and within half a step beyond them."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(bits), dtype=torch.float64) * 2 ** (bits - 2)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    special = torch.tensor([high, low, high + 0.25, high + 0.5, low - 0.25, low - 0.5, high - 0.5, 0.5, 1.5, -0.5, 0.0])
    x.reshape(shape[0], -1)[:, : len(special)] = special.double()
    return x * scale.reshape(-1, *[1] * (len(shape) - 1))


def built(bits: int, scale: torch.Tensor, batched: bool, log_scale: bool) -> LSQ:
    per_channel = scale.ndim > 0
    lsq = LSQ(bits, channels=4, batched=batched, per_channel=per_channel, log_scale=log_scale).double()
    lsq.store_scale(scale)
    return lsq


# Powers of two and logs that exp() gives back exactly keep the boundary elements exactly at the boundary.
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("log_scale", [True, False])
@pytest.mark.parametrize("use", ["activation", "weight", "weight per channel"])
def test_gradients_are_the_papers(bits: int, log_scale: bool, use: str) -> None:
    per_channel = use == "weight per channel"
    shape = (4, 5, 7) if use == "activation" else (4, 35)
    scale = (
        torch.tensor([[0.25], [0.5], [1.0], [2.0]], dtype=torch.float64) if per_channel else torch.tensor(1.0).double()
    )
    lsq = built(bits, scale, batched=use == "activation", log_scale=log_scale)
    scale = lsq.scale.detach()
    x = with_boundaries(shape, scale, bits).requires_grad_()
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    output = lsq(x)
    output.backward(grad)
    n = {"activation": 35, "weight": 140, "weight per channel": 35}[use]
    parts = formula(x.detach().numpy(), scale.flatten().numpy(), bits, grad.numpy(), n)
    parameter = lsq.log_step if log_scale else lsq.step
    expected = torch.from_numpy(np.asarray(parts[2])).reshape(scale.shape) * (scale if log_scale else 1)
    torch.testing.assert_close(output.detach(), torch.from_numpy(parts[0]), rtol=1e-15, atol=0)
    torch.testing.assert_close(x.grad, torch.from_numpy(parts[1]), rtol=0, atol=0)
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-14)


def test_the_half_step_beyond_the_end_counts_as_clipped() -> None:
    lsq = built(3, torch.tensor(1.0).double(), batched=False, log_scale=False)
    x = torch.tensor([[3.25, 3.0, -4.0, -4.25, 2.75]], dtype=torch.float64, requires_grad=True)
    lsq(x).sum().backward()
    assert x.grad.tolist() == [[0, 0, 0, 0, 1]]
    assert float(lsq.step.grad) == pytest.approx((3 + 3 - 4 - 4 + 0.25) / math.sqrt(5 * 3))


def test_n_leaves_the_batch_out() -> None:
    """Two processes with half the batch each give, summed, the scale gradient of one with all of it."""
    x = torch.randn(8, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, half = (built(4, torch.tensor(0.2).double(), batched=True, log_scale=True) for _ in range(2))
    whole(x).square().sum().backward()
    for part in x.chunk(2):
        half(part).square().sum().backward()
    torch.testing.assert_close(whole.log_step.grad, half.log_step.grad, rtol=1e-12, atol=0)


def test_float32_agrees_with_float64() -> None:
    x = torch.randn(16, 50, 64, generator=torch.Generator().manual_seed(1))
    single, double = LSQ(8, channels=64, batched=True), LSQ(8, channels=64, batched=True).double()
    for lsq in (single, double):
        lsq.store_scale(torch.tensor(0.0137))
    single(x).square().mean().backward()
    double(x.double()).square().mean().backward()
    assert float(single.log_step.grad) == pytest.approx(float(double.log_step.grad), rel=1e-3)


def observed(init: str, bits: int, x: torch.Tensor, batches: int = 1, **options: bool) -> torch.Tensor:
    lsq = LSQ(
        bits,
        channels=len(x),
        batched=options.get("batched", False),
        per_channel=options.get("per_channel", False),
        init=init,
    )
    for part in x.chunk(batches):
        lsq.observe(part)
    lsq.fit()
    return lsq.scale.detach().double()


def heavy_tailed(rows: int) -> torch.Tensor:
    """Like the input of CLIP's c_proj: narrow, skewed, with a few huge values."""
    generator = torch.Generator().manual_seed(2)
    x = torch.nn.functional.gelu(torch.randn(rows, 4000, generator=generator) * 0.5)
    x[:, ::500] *= 20 * torch.rand(rows, 8, generator=generator)
    return x


@pytest.mark.parametrize("batched", [True, False])
def test_absmax_and_paper_starts(batched: bool) -> None:
    x = heavy_tailed(6)
    assert float(observed("absmax", 8, x, 3 if batched else 1, batched=batched)) == pytest.approx(
        float(x.abs().max()) / 127
    )
    paper = 2 * float(x.double().abs().mean()) / math.sqrt(127)
    assert float(observed("lsq", 8, x, 3 if batched else 1, batched=batched)) == pytest.approx(paper, rel=1e-6)
    rows = observed("lsq", 4, x, per_channel=True)
    torch.testing.assert_close(rows, 2 * x.double().abs().mean(1, keepdim=True) / math.sqrt(7), rtol=1e-6, atol=0)


def squared_error(x: torch.Tensor, scale: float, bits: int) -> float:
    high = 2 ** (bits - 1) - 1
    return float(((x / scale).round().clamp(-high - 1, high) * scale - x).square().sum())


def least_error(x: torch.Tensor, bits: int) -> float:
    largest = float(x.abs().max()) / (2 ** (bits - 1) - 1)
    return min(squared_error(x, largest * ratio, bits) for ratio in np.geomspace(0.003, 1, 3000))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("sample", ["gaussian", "heavy-tailed", "one-sided"])
def test_mse_start_against_a_dense_search(bits: int, sample: str) -> None:
    gaussian = torch.randn(4, 4000, generator=torch.Generator().manual_seed(3))
    x = {"gaussian": gaussian, "heavy-tailed": heavy_tailed(4), "one-sided": -gaussian.abs()}[sample]
    least = least_error(x.double(), bits)
    for batches, batched in ((4, True), (1, False)):
        scale = float(observed("mse", bits, x, batches, batched=batched))
        assert squared_error(x.double(), scale, bits) <= least * 1.003
    for row, scale in zip(x, observed("mse", bits, x, per_channel=True), strict=True):
        assert squared_error(row.double(), float(scale), bits) <= least_error(row.double(), bits) * 1.003


def test_a_linear_scale_survives_zero() -> None:
    lsq = LSQ(8, channels=4, batched=True, log_scale=False)
    lsq.store_scale(torch.tensor(0.1))
    with torch.no_grad():
        lsq.step.zero_()
    assert torch.isfinite(lsq(torch.randn(2, 4))).all()
    assert float(lsq.scale.detach()) > 0


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'absmax'"):
        LSQ(8, channels=4, batched=True, init="abs_max")
