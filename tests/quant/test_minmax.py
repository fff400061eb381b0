from __future__ import annotations

import pytest
import torch

from qatlab.quant import MinMax


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
