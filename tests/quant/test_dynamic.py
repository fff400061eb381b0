"""One grid for each token, against torch's own per-token quantization and a loop over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the peer

from qatlab.core.errors import UserError
from qatlab.quant import MinMax
from qatlab.quant.quantizers.dynamic import DynamicMinMax

PEER = torch.ops.quantized_decomposed


def tokens() -> torch.Tensor:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 5)[:, None]
    x[0, 1] = x[0, 1].abs() + 1
    x[0, 2] = -x[0, 2].abs() - 1
    return x


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_are_torchs(bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale, zero = DynamicMinMax(bits, channels=16, batched=True).grid(tokens())
    peer, _ = PEER.choose_qparams_per_token(tokens(), torch.int8)
    torch.testing.assert_close(scale * (high / 127), peer.float(), rtol=1e-6, atol=0)
    assert not zero.any()
    if bits == 8:
        scale, zero = DynamicMinMax(8, channels=16, batched=True, symmetric=False).grid(tokens())
        peer, peer_zero = PEER.choose_qparams_per_token_asymmetric(tokens(), torch.int8)
        torch.testing.assert_close(scale, peer.float(), rtol=1e-6, atol=0)
        assert torch.equal(zero, peer_zero.float())
    assert low < high


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_token_is_rounded_as_a_tensor_of_its_own(symmetric: bool, bits: int) -> None:
    x = tokens()
    quantizer = DynamicMinMax(bits, channels=16, batched=True, symmetric=symmetric)
    result, codes = quantizer(x), quantizer.codes(x)
    for index in torch.cartesian_prod(torch.arange(3), torch.arange(5)).tolist():
        token = x[tuple(index)]
        static = MinMax(bits, channels=16, batched=True, symmetric=symmetric)
        static.observe(token[None])
        static.fit()
        torch.testing.assert_close(result[tuple(index)], static(token[None])[0], rtol=1e-6, atol=0)
        assert torch.equal(codes[tuple(index)], static.codes(token[None])[0])


def test_the_gradient_passes_where_nothing_is_clipped() -> None:
    x = tokens().requires_grad_()
    grad = torch.randn_like(x)
    DynamicMinMax(8, channels=16, batched=True)(x).backward(grad)
    assert torch.equal(x.grad, grad)
    x.grad = None
    quantizer = DynamicMinMax(4, channels=16, batched=True, symmetric=False)
    quantizer(x).backward(grad)
    scale, zero = quantizer.grid(x.detach())
    code = (x.detach() / scale).round() + zero
    assert torch.equal(x.grad, torch.where((code >= -8) & (code <= 7), grad, 0))


def test_zero_tokens_and_strided_inputs() -> None:
    x = tokens()
    x[1, 3] = 0
    for symmetric in (True, False):
        quantizer = DynamicMinMax(8, channels=16, batched=True, symmetric=symmetric)
        assert not quantizer(x)[1, 3].any()
        assert torch.equal(quantizer(x.transpose(0, 1)), quantizer(x).transpose(0, 1))


def test_it_has_no_state_and_no_scale() -> None:
    quantizer = DynamicMinMax(8, channels=16, batched=True)
    assert not quantizer.state_dict()
    assert not quantizer.integer_product
    with pytest.raises(UserError, match="no scale of its own"):
        _ = quantizer.scale


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="a weight has no tokens"):
        DynamicMinMax(8, channels=16, batched=False)
    with pytest.raises(UserError, match="does not end in its 3 channels"):
        DynamicMinMax(8, channels=3, batched=True)(torch.ones(2, 3, 8, 8))
