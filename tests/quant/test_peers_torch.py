"""Whole quantizers, from observed tensor to codes and gradients, against torchao's primitives and torch's quantization."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.ao.quantization import (
    HistogramObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from qatlab.quant import LSQ, DynamicMinMax, LSQPlus, MinMax, Quantizer

# What makes the quantizer, the shape that shares a scale, whether the grid may have a zero point.
WEIGHT, ACTIVATION = partial(MinMax, channels=12, batched=False), partial(MinMax, channels=16, batched=True)
GRANULARITIES = {
    "weight": (WEIGHT, (12, 40), False),
    "weight per channel": (partial(WEIGHT, per_channel=True), (1, 40), False),
    "weight in groups": (partial(WEIGHT, width=40, group_size=8), (1, 8), False),
    "activation": (ACTIVATION, (3, 5, 16), True),
    "activation per channel": (partial(ACTIVATION, per_channel=True), (3, 5, 1), True),
    "activation per token": (partial(DynamicMinMax, channels=16, batched=True), (1, 1, 16), True),
}
CASES = [
    (name, symmetric)
    for name, (*_, both) in GRANULARITIES.items()
    for symmetric in ((True, False) if both else (True,))
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Skewed, each channel and token of another size."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3
    x = x * torch.linspace(0.2, 3, shape[-1])
    return x * torch.linspace(0.5, 2, shape[-2])[:, None]


def ends(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def fitted(quantizer: Quantizer, *batches: Tensor) -> Quantizer:
    for batch in batches:
        quantizer.observe(batch)
    quantizer.fit()
    return quantizer


def spread(values: Tensor, block: tuple[int, ...], x: Tensor) -> Tensor:
    """One value per block, as a tensor like x."""
    counts = [size // length for size, length in zip(x.shape, block, strict=True)]
    values = values.reshape(counts)
    for dim, length in enumerate(block):
        values = values.repeat_interleave(length, dim)
    return values


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("name", "symmetric"), CASES)
def test_scales_codes_and_values_are_torchaos(name: str, symmetric: bool, bits: int) -> None:
    make, block, both = GRANULARITIES[name]
    low, high = ends(bits)
    seen = drawn(*((12, 40) if name.startswith("weight") else (3, 5, 16)))
    quantizer = fitted(make(bits, **({"symmetric": symmetric} if both else {})), seen)
    # The static grids of activations meet values they have not seen.
    x = drawn(3, 5, 16, seed=1) * 1.5 if name in ("activation", "activation per channel") else seen
    # torchao's symmetric scale is absmax over half the number of steps: that of a grid without its lowest code is ours.
    kind = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    scale, zero = choose_qparams_affine(seen, kind, block, torch.int8, -high if symmetric else low, high)
    found, found_zero = quantizer.grid(x)
    torch.testing.assert_close(found.flatten(), scale.flatten(), rtol=1e-6, atol=0)
    assert torch.equal(found_zero.flatten().int(), zero.flatten())

    codes = quantize_affine(x, block, scale, zero, torch.int8, low, high)
    values = dequantize_affine(codes, block, scale, zero, torch.int8, low, high)
    # torchao multiplies by 1 / scale, which may round what is a tie in float32 the other way.
    settled = ((x.double() / spread(scale, block, x) % 1) - 0.5).abs() > 1e-4
    assert settled.double().mean() > 0.98
    assert torch.equal(quantizer.codes(x)[settled], codes[settled])
    torch.testing.assert_close(quantizer(x)[settled], values[settled], rtol=1e-5, atol=1e-9)


def learnable(x: Tensor, scale: Tensor, zero: Tensor, bits: int, factor: float) -> Tensor:
    """Torch's fused operator with learned scale, one or one per row of x."""
    if scale.numel() > 1:
        return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero, 0, *ends(bits), factor)
    return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, *ends(bits), factor)


def without_half_steps(x: Tensor, scale: Tensor, zero: float, bits: int) -> Tensor:
    """Move what lies less than half a step beyond an end, where torch takes it for inside and LSQ for clipped."""
    low, high = ends(bits)
    code = x / scale + zero
    beyond = ((code >= high) & (code < high + 0.5)) | ((code <= low) & (code > low - 0.5))
    assert beyond.any()
    return torch.where(beyond, (code.round() - 0.25 * code.sign() - zero) * scale, x)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("log_scale", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_lsq_is_torchs_operator(per_channel: bool, log_scale: bool, bits: int) -> None:
    """Values and gradients, but within the half step beyond an end, where the paper has another gradient."""
    rows = drawn(12, 4000)
    scale = rows.abs().amax(1, keepdim=True) / 2**bits if per_channel else rows.abs().max() / 2**bits
    quantizer = LSQ(bits, channels=12, batched=False, per_channel=per_channel, log_scale=log_scale)
    quantizer.store_scale(scale)
    scale = quantizer.scale.detach()
    x = without_half_steps(rows, scale, 0.0, bits)
    grad = drawn(12, 4000, seed=1)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    output = quantizer(ours)
    output.backward(grad)
    step = scale.reshape(-1).clone().requires_grad_()
    factor = 1 / math.sqrt((4000 if per_channel else 48000) * ends(bits)[1])
    peer = learnable(theirs, step, torch.zeros_like(step), bits, factor)
    peer.backward(grad)
    torch.testing.assert_close(output, peer, rtol=1e-6, atol=0)
    assert torch.equal(ours.grad, theirs.grad)
    parameter, chain = (quantizer.log_step, scale) if log_scale else (quantizer.step, 1.0)
    expected = step.grad.reshape(scale.shape) * chain
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_plus_is_torchs_operator_with_zero_point(bits: int) -> None:
    """Torch learns (s, z), LSQ+ (s, beta) with beta = -z s: the same derivatives by the chain rule, where z is whole."""
    rows = drawn(12, 4000)
    quantizer = LSQPlus(bits, channels=4000, batched=True, log_scale=False)
    # Not below zero: the operator's backward takes a negative z, and only that, for z + 1.
    scale, zero_point = rows.abs().max() / 2**bits, 1.0
    quantizer.store_scale(scale)
    quantizer.offset.data.copy_(-zero_point * scale)
    x = without_half_steps(rows, scale, zero_point, bits)
    grad = drawn(12, 4000, seed=1)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    output = quantizer(ours)
    output.backward(grad)
    step, zero = scale.reshape(1).requires_grad_(), torch.tensor([zero_point], requires_grad=True)
    peer = learnable(theirs, step, zero, bits, 1 / math.sqrt(4000 * ends(bits)[1]))
    peer.backward(grad)
    torch.testing.assert_close(output, peer, rtol=1e-6, atol=1e-6 * float(scale))
    assert torch.equal(ours.grad, theirs.grad)
    by_scale = quantizer.step.grad - zero_point * quantizer.offset.grad
    torch.testing.assert_close(by_scale, step.grad[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(-scale * quantizer.offset.grad, zero.grad[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_running_ends_make_torchs_grid(per_channel: bool, symmetric: bool) -> None:
    batches = [drawn(4, 50, 16, seed=seed) * factor - 0.2 for seed, factor in enumerate((1.0, 3.0, 0.5))]
    options = {
        "averaging_constant": 0.1,
        "dtype": torch.qint8,
        "quant_max": 127,
        "quant_min": -127 if symmetric else -128,
    }
    kind = "symmetric" if symmetric else "affine"
    if per_channel:
        scheme = getattr(torch, f"per_channel_{kind}")
        peer = MovingAveragePerChannelMinMaxObserver(ch_axis=2, qscheme=scheme, **options)
    else:
        peer = MovingAverageMinMaxObserver(qscheme=getattr(torch, f"per_tensor_{kind}"), **options)
    for batch in batches:
        peer(batch)
    quantizer = MinMax(8, channels=16, batched=True, observer="ema", per_channel=per_channel, symmetric=symmetric)
    fitted(quantizer, *batches)
    scale, zero = peer.calculate_qparams()
    torch.testing.assert_close(quantizer.scale.flatten(), scale.flatten(), rtol=1e-6, atol=0)
    assert torch.equal(quantizer.zero_point.flatten().int(), zero.flatten().int())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tail", [1.0, 30.0])
def test_the_mse_grid_is_no_worse_than_that_of_torchs_histogram(tail: float, symmetric: bool) -> None:
    batches = [torch.nn.functional.gelu(drawn(4, 500, 16, seed=seed)) for seed in range(3)]
    for batch in batches:
        batch[..., 0, 3] *= tail
    peer = HistogramObserver(
        dtype=torch.qint8, qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    )
    for batch in batches:
        peer(batch)
    quantizer = fitted(MinMax(8, channels=16, batched=True, observer="mse", symmetric=symmetric), *batches)
    x = torch.cat(batches)
    scale, zero = (float(value) for value in peer.calculate_qparams())
    theirs = (torch.fake_quantize_per_tensor_affine(x, scale, int(zero), -128, 127) - x).double().square().mean()
    ours = (quantizer(x) - x).double().square().mean()
    assert ours <= 1.001 * theirs
