"""Static grids, learned steps and a whole layer against those of Brevitas, which finds its scales by itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qatlab.quant import LSQ, MinMax, Quantizer, QuantLinear

pytest.importorskip("brevitas", reason="Brevitas is not installed: the extra 'peers', in an environment of its own")

import brevitas.nn as qnn
from brevitas.core.stats import NegativeMinOrZero
from brevitas.inject.enum import RestrictValueType, ScalingImplType, ScalingPerOutputType, StatsOp
from brevitas.proxy.groupwise_int_parameter_quant import GroupwiseWeightQuantProxyFromInjector
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    Int8WeightPerTensorFloatMSE,
    ShiftedUint8ActPerTensorFloat,
)

pytestmark = pytest.mark.peers

BITS = [2, 4, 8]


class PerGroup(Int8WeightPerChannelFloat):
    proxy_class = GroupwiseWeightQuantProxyFromInjector
    scaling_per_output_type = ScalingPerOutputType.GROUP
    group_size = 8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Skewed to positive values, each channel of another size."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 1.5
    return x * torch.linspace(0.2, 3, shape[-1])


def fitted(quantizer: Quantizer, *batches: Tensor) -> Quantizer:
    for batch in batches:
        quantizer.observe(batch)
    quantizer.fit()
    return quantizer


def its_layer(weight: Tensor, **options: object) -> nn.Module:
    layer = qnn.QuantLinear(weight.shape[1], weight.shape[0], bias=False, **options)
    layer.weight.data.copy_(weight)
    return layer.eval()


def its_identity(
    bits: int, *batches: Tensor, symmetric: bool, per_channel: bool = False, **options: object
) -> nn.Module:
    """Brevitas's activations in the same setting: its scale a running mean over batches of the largest |x| or the range.

    Its signed scale is absmax / 2^(b-1), or, without the lowest code (a narrow range), ours. No value here is so low.
    """
    if symmetric:
        options = {"act_quant": Int8ActPerTensorFloat, "scaling_stats_op": StatsOp.MAX, "narrow_range": True, **options}
    else:
        options |= {"act_quant": ShiftedUint8ActPerTensorFloat, "scaling_stats_op": StatsOp.MIN_MAX}
        options["zero_point_stats_impl"] = NegativeMinOrZero
    if per_channel:
        options["scaling_per_output_type"] = ScalingPerOutputType.CHANNEL
        options["per_channel_broadcastable_shape"] = (1, 1, batches[0].shape[-1])
        options["scaling_stats_permute_dims"] = (2, 0, 1)
    identity = qnn.QuantIdentity(bit_width=bits, return_quant_tensor=True, **options).train()
    for batch in batches:
        identity(batch)
    return identity.eval()


def settled(x: Tensor, scale: Tensor) -> Tensor:
    """Where x / scale is no tie to float32 rounding: Brevitas adds the zero point before it rounds, qatlab after."""
    found = ((x.double() / scale.double()) % 1 - 0.5).abs() > 1e-4
    assert found.double().mean() > 0.98
    return found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        (Int8WeightPerTensorFloat, {}),
        (Int8WeightPerChannelFloat, {"per_channel": True}),
        (PerGroup, {"width": 40, "group_size": 8}),
    ],
    ids=["per tensor", "per channel", "per group"],
)
def test_weights(theirs: type, options: dict, bits: int) -> None:
    weight = drawn(12, 40)
    quantizer = fitted(MinMax(bits, channels=12, batched=False, **options), weight)
    peer = its_layer(weight, weight_quant=theirs, weight_bit_width=bits).quant_weight()
    scale = peer.scale_ if theirs is PerGroup else peer.scale
    torch.testing.assert_close(quantizer.scale.flatten(), scale.detach().flatten(), rtol=1e-6, atol=0)
    torch.testing.assert_close(quantizer(weight), peer.value.detach(), rtol=1e-6, atol=0)
    assert torch.equal(quantizer.codes(weight), peer.int())


@pytest.mark.parametrize("bits", BITS)
def test_the_mse_grid_of_a_weight_is_no_worse(bits: int) -> None:
    weight = drawn(12, 400)
    theirs = its_layer(weight, weight_quant=Int8WeightPerTensorFloatMSE, weight_bit_width=bits).quant_weight().value
    ours = fitted(MinMax(bits, channels=12, batched=False, observer="mse"), weight)(weight)
    assert (ours - weight).square().sum() <= 1.001 * (theirs - weight).square().sum()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("observer", ["absmax", "ema"])
def test_activations(observer: str, per_channel: bool, symmetric: bool, bits: int) -> None:
    factors = [1.0] if observer == "absmax" else [1.0, 3.0, 0.5]
    batches = [drawn(4, 50, 16, seed=seed) * factor for seed, factor in enumerate(factors)]
    ends = [torch.aminmax(batch.reshape(-1, 16), dim=0) for batch in batches]
    assert all(bool((low < 0).all() and (high > -low).all()) for low, high in ends)  # so that their means are its mean
    quantizer = MinMax(bits, channels=16, batched=True, observer=observer, per_channel=per_channel, symmetric=symmetric)
    fitted(quantizer, *batches)
    peer = its_identity(bits, *batches, symmetric=symmetric, per_channel=per_channel)
    shift = 0 if symmetric else 2 ** (bits - 1)
    x = batches[0]
    result = peer(x)
    torch.testing.assert_close(quantizer.scale.flatten(), result.scale.detach().flatten(), rtol=1e-6, atol=0)
    assert bool((quantizer.zero_point + shift == result.zero_point).all())
    kept = settled(x, quantizer.scale)
    torch.testing.assert_close(quantizer(x)[kept], result.value.detach()[kept], rtol=1e-5, atol=1e-9)
    assert torch.equal(quantizer.codes(x, torch.int32)[kept] + shift, result.int().int()[kept])


def test_a_percentile() -> None:
    x = drawn(4, 50, 16)
    quantizer = fitted(MinMax(8, channels=16, batched=True, observer="percentile", percentile=99), x)
    peer = its_identity(8, x, symmetric=True, scaling_stats_op=StatsOp.PERCENTILE, high_percentile_q=99)(x)
    assert float(quantizer.scale) == pytest.approx(float(peer.scale), rel=1e-3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("log_scale", [True, False])
def test_a_learned_step(log_scale: bool, bits: int) -> None:
    """Values everywhere; gradients but for the half step beyond an end, where LSQ has its own."""
    x = drawn(4, 500, 16)
    x -= x.mean()
    scale = x.abs().max() / 2**bits
    quantizer = LSQ(bits, channels=16, batched=True, log_scale=log_scale)
    quantizer.store_scale(scale)
    restriction = RestrictValueType.LOG_FP if log_scale else RestrictValueType.FP
    peer = qnn.QuantIdentity(
        act_quant=Int8ActPerTensorFloat,
        bit_width=bits,
        scaling_impl_type=ScalingImplType.PARAMETER,
        scaling_init=float(scale) * 2 ** (bits - 1),
        restrict_scaling_type=restriction,
    )
    kept = settled(x, scale)
    torch.testing.assert_close(quantizer(x)[kept], peer(x)[kept], rtol=1e-5, atol=0)

    code, low, high = x / scale, quantizer.qmin, quantizer.qmax
    beyond = ((code >= high) & (code < high + 0.5)) | ((code <= low) & (code > low - 0.5))
    assert bool((code > high + 0.5).any())
    assert bool((code < low - 0.5).any())
    grad = torch.where(beyond | ~kept, 0, drawn(4, 500, 16, seed=1))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    quantizer(ours).backward(grad)
    peer(theirs).backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0)
    (learned,) = peer.parameters()
    factor = 1 / math.sqrt(500 * 16 * high)
    if log_scale:
        found, chain = quantizer.log_step.grad, 1 / math.log(2)  # its logarithm is that of base 2
    else:
        found, chain = quantizer.step.grad, 2 ** (bits - 1)  # it learns the end of the grid
    assert float(found) == pytest.approx(float(learned.grad) * factor * chain, rel=1e-3)


def test_a_layer() -> None:
    """W8A8, weights per channel, activations with zero point: one linear layer after another, calibrated and run."""
    x, weight = drawn(4, 50, 40), drawn(12, 40, seed=1)
    source = nn.Linear(40, 12, bias=False)
    source.weight.data.copy_(weight)
    weights = fitted(MinMax(8, channels=12, batched=False, per_channel=True), weight)
    layer = QuantLinear(source, weights, fitted(MinMax(8, channels=40, batched=True, symmetric=False), x)).eval()
    peer = its_layer(weight, weight_quant=Int8WeightPerChannelFloat)
    inputs = its_identity(8, x, symmetric=False)
    with torch.no_grad():
        result, expected = layer(x), peer(inputs(x).value)
    # A tie that falls the other way is one step of one input.
    step = float(layer.act_quantizer.scale * weight.abs().max())
    assert (result - expected).abs().max() <= 2 * step
    assert ((result - expected).abs() > 1e-4).double().mean() < 0.01
