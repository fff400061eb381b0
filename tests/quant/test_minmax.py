from __future__ import annotations

import numpy as np
import pytest
import torch

from qatlab.core.errors import UserError
from qatlab.quant import LSQ, MinMax


def test_scale_is_the_running_absmax_over_qmax() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 9, generator=generator) * factor for factor in (1, 3, 0.5)]
    quantizer = MinMax(6, channels=9, batched=True)
    for batch in batches:
        quantizer.observe(batch)
    quantizer.fit()
    assert float(quantizer.scale) == pytest.approx(float(torch.cat(batches).abs().max()) / 31, rel=1e-6)
    assert not list(quantizer.parameters())


def test_forward_and_gradient_agree_with_torch() -> None:
    x = (torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) * 2).requires_grad_()
    quantizer = MinMax(4, channels=64, batched=True)
    quantizer.observe(x[:1].detach())
    quantizer.fit()
    scale = float(quantizer.scale)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, 0, -8, 7)
    torch.testing.assert_close(quantizer(x), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(quantizer(x).sum(), x)
    (peer,) = torch.autograd.grad(expected.sum(), x)
    assert torch.equal(gradient, peer)


def test_per_channel_agrees_with_torch() -> None:
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(2))
    quantizer = MinMax(8, channels=12, batched=False, per_channel=True)
    quantizer.observe(weight)
    quantizer.fit()
    zeros = torch.zeros(12, dtype=torch.int32)
    peer = torch.fake_quantize_per_channel_affine(weight, quantizer.scale.flatten(), zeros, 0, -128, 127)
    torch.testing.assert_close(quantizer(weight), peer, rtol=1e-6, atol=0)


def test_the_largest_value_always_gets_its_gradient() -> None:
    weights = torch.rand(2000, 1, generator=torch.Generator().manual_seed(3)) + 0.5
    quantizer = MinMax(8, channels=2000, batched=False, per_channel=True)
    quantizer.observe(weights)
    quantizer.fit()
    weights.requires_grad_()
    quantizer(weights).sum().backward()
    assert torch.equal(weights.grad, torch.ones_like(weights))


def calibrated(x: torch.Tensor, **options: object) -> MinMax:
    quantizer = MinMax(channels=x.shape[-1], batched=True, **options)
    quantizer.observe(x)
    quantizer.fit()
    return quantizer


def skewed(seed: int = 4) -> torch.Tensor:
    x = torch.randn(6, 50, 24, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.gelu(x * torch.linspace(0.1, 3, 24))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_zero_point_forward_and_gradient_agree_with_torch(bits: int, dtype: torch.dtype) -> None:
    quantizer = calibrated(skewed()[:1], bits=bits, symmetric=False)
    x = (skewed(5).to(dtype) * 1.5).requires_grad_()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    peer = torch.fake_quantize_per_tensor_affine(x, float(quantizer.scale), int(quantizer.zero_point), low, high)
    torch.testing.assert_close(quantizer(x), peer, rtol=1e-5, atol=1e-9)
    (gradient,) = torch.autograd.grad(quantizer(x).sum(), x)
    (right,) = torch.autograd.grad(peer.sum(), x)
    assert torch.equal(gradient, right)
    assert 0 < float(right.mean()) < 1
    assert [type(end) for end in quantizer._grid_ends()] == [int, int]  # no step reads the zero point from a GPU
    assert torch.equal((quantizer.codes(x).to(dtype) - quantizer.zero_point) * quantizer.scale, quantizer(x).detach())


@pytest.mark.parametrize("symmetric", [True, False])
def test_per_input_channel_agrees_with_torch(symmetric: bool) -> None:
    quantizer = calibrated(skewed()[:1], bits=8, symmetric=symmetric, per_channel=True)
    x = skewed(5).requires_grad_()
    scale, zero = quantizer.scale, quantizer.zero_point.int()
    assert scale.shape == zero.shape == (24,)
    peer = torch.fake_quantize_per_channel_affine(x, scale, zero, 2, -128, 127)
    torch.testing.assert_close(quantizer(x), peer, rtol=1e-5, atol=1e-9)
    (gradient,) = torch.autograd.grad(quantizer(x).sum(), x)
    (right,) = torch.autograd.grad(peer.sum(), x)
    assert torch.equal(gradient, right)
    assert torch.equal((quantizer.codes(x).float() - zero) * scale, quantizer(x).detach())
    assert quantizer.grid_rows(x).shape == (24, 300)


@pytest.mark.parametrize("group_size", [1, 8, 40])
def test_groups_agree_with_torch(group_size: int) -> None:
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(2))
    quantizer = MinMax(4, channels=12, batched=False, width=40, group_size=group_size)
    quantizer.observe(weight)
    quantizer.fit()
    rows = weight.reshape(-1, group_size)
    torch.testing.assert_close(quantizer.scale, rows.abs().amax(1, keepdim=True) / 7, rtol=1e-6, atol=0)
    zeros = torch.zeros(len(rows), dtype=torch.int32)
    peer = torch.fake_quantize_per_channel_affine(rows, quantizer.scale.flatten(), zeros, 0, -8, 7)
    torch.testing.assert_close(quantizer(weight), peer.view(12, 40), rtol=1e-6, atol=0)
    if group_size == 40:
        channels = MinMax(4, channels=12, batched=False, per_channel=True)
        channels.load_state_dict(quantizer.state_dict())
        assert torch.equal(channels(weight), quantizer(weight))


@pytest.mark.parametrize("observer", ["absmax", "ema", "percentile", "mse"])
def test_each_observer_has_its_scale(observer: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(40, 9, generator=generator) * factor for factor in (1, 3, 0.5)]
    quantizer = MinMax(8, channels=9, batched=True, observer=observer, percentile=99)
    for batch in batches:
        quantizer.observe(batch)
    quantizer.fit()
    low, high = batches[0].min(), batches[0].max()
    for batch in batches[1:]:
        low, high = 0.9 * low + 0.1 * batch.min(), 0.9 * high + 0.1 * batch.max()
    x = torch.cat(batches)
    lsq = LSQ(8, channels=9, batched=True, init="mse")
    lsq.observe(x)
    lsq.fit()
    expected = {
        "absmax": x.abs().max() / 127,
        "ema": max(-low, high) / 127,
        "percentile": float(np.percentile(x.abs().numpy(), 99, method="inverted_cdf")) / 127,
        "mse": lsq.scale.detach(),
    }
    assert float(quantizer.scale) == pytest.approx(float(expected[observer]), rel=2e-3)


def test_what_a_product_of_codes_can_use() -> None:
    def make(**options: object) -> bool:
        return MinMax(8, channels=8, **{"batched": True, **options}).integer_product

    assert make()
    assert make(batched=False)
    assert make(batched=False, per_channel=True)
    assert not make(symmetric=False)
    assert not make(per_channel=True)
    assert not make(batched=False, group_size=4, width=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batched": False, "symmetric": False}, "are for activations"),
        ({"batched": False, "observer": "ema"}, "are for activations"),
        ({"per_channel": True, "observer": "mse"}, "take absmax or ema"),
        ({"group_size": 4}, "it is for weights"),
        ({"batched": False, "group_size": 4, "per_channel": True}, "without per_channel"),
        ({"batched": False, "group_size": 5, "width": 8}, "does not divide a layer's 8 inputs"),
        ({"batched": False, "group_size": 0, "width": 8}, "group_size=0: it takes a whole number from 1 on"),
        ({"batched": False, "group_size": True, "width": 8}, "group_size=true"),
        ({"observer": "minmax"}, "observer=minmax is unknown"),
        ({"observer": "percentile", "percentile": 0.9999}, "percentile=0.9999: it takes a number above 50"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MinMax(8, channels=8, **{"batched": True, **options})


def test_an_input_without_channels_at_its_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"shape \(2, 3, 8, 8\) does not end in its 3 channels.*act: null"):
        MinMax(8, channels=3, batched=True, per_channel=True).observe(torch.ones(2, 3, 8, 8))
