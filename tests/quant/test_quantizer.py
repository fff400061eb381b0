"""What must hold for every quantizer: a new subclass in qatlab/quant is tested here by itself."""

from __future__ import annotations

import copy
import importlib
import pkgutil

import numpy as np
import pytest
import torch

import qatlab.quant
from qatlab.errors import UserError
from qatlab.quant import Quantizer


def all_quantizers() -> list[type[Quantizer]]:
    for module in pkgutil.iter_modules(qatlab.quant.__path__, "qatlab.quant."):
        importlib.import_module(module.name)
    found, queue = [], [Quantizer]
    while queue:
        subclasses = queue.pop().__subclasses__()
        found += subclasses
        queue += subclasses
    return sorted(found, key=lambda kind: kind.__name__)


QUANTIZERS = all_quantizers()
# batched, per_channel
USES = [(True, False), (False, False), (False, True)]


def tensor(batched: bool, seed: int = 0) -> torch.Tensor:
    shape = (5, 7, 12) if batched else (12, 40)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fitted(kind: type[Quantizer], bits: int, batched: bool, per_channel: bool) -> Quantizer:
    quantizer = kind(bits, channels=12, batched=batched, per_channel=per_channel)
    quantizer.observe(tensor(batched))
    quantizer.fit()
    return quantizer


each_use = pytest.mark.parametrize(("batched", "per_channel"), USES)
each_kind = pytest.mark.parametrize("kind", QUANTIZERS)


def test_both_quantizers_are_found() -> None:
    assert {"LSQ", "MinMax"} <= {kind.__name__ for kind in QUANTIZERS}


@each_kind
@each_use
@pytest.mark.parametrize("bits", range(2, 9))
def test_result_lies_on_the_grid(kind: type[Quantizer], bits: int, batched: bool, per_channel: bool) -> None:
    quantizer = fitted(kind, bits, batched, per_channel)
    x = tensor(batched, seed=1) * 2
    result = quantizer(x).detach()
    scale = quantizer.scale.detach()
    assert scale.shape == ((12, 1) if per_channel else ())
    codes = quantizer.codes(x)
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1
    torch.testing.assert_close(codes * scale, result, rtol=0, atol=0)
    for row in result if per_channel else [result]:
        assert len(row.unique()) <= 2**bits
    expected = (x.double() / scale.double()).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale.double()
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=0)


@each_kind
def test_ties_are_those_of_the_division(kind: type[Quantizer]) -> None:
    """Multiplying by 1 / s, as torch's own fake quantization does, rounds some of these half-way values otherwise."""
    quantizer = kind(8, channels=12, batched=True)
    for scale in np.linspace(0.011, 0.93, 50, dtype=np.float32):
        x = (np.arange(-100, 100, dtype=np.float32) + np.float32(0.5)) * scale
        quantizer.store_scale(torch.tensor(scale))
        step = quantizer.scale.detach().numpy()
        expected = np.rint(x / step).astype(np.int8)
        assert quantizer.codes(torch.from_numpy(x)).tolist() == expected.tolist()


@each_kind
@each_use
@pytest.mark.parametrize("bits", range(2, 9))
def test_idempotent_on_its_own_grid(kind: type[Quantizer], bits: int, batched: bool, per_channel: bool) -> None:
    quantizer = fitted(kind, bits, batched, per_channel)
    once = quantizer(tensor(batched, seed=2))
    assert torch.equal(quantizer(once), once)


@each_kind
@each_use
def test_state_dict_round_trip(kind: type[Quantizer], batched: bool, per_channel: bool) -> None:
    quantizer = fitted(kind, 4, batched, per_channel)
    loaded = kind(4, channels=12, batched=batched, per_channel=per_channel)
    loaded.load_state_dict(quantizer.state_dict())
    x = tensor(batched, seed=3)
    assert torch.equal(loaded(x), quantizer(x))
    assert torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))


@each_kind
@each_use
def test_gradient_passes_inside_and_stops_outside(kind: type[Quantizer], batched: bool, per_channel: bool) -> None:
    quantizer = fitted(kind, 4, batched, per_channel)
    x = (tensor(batched, seed=4) * 1.5).requires_grad_()
    quantizer(x).sum().backward()
    ratio = (x / quantizer.scale).detach()
    assert torch.equal(x.grad[(ratio > -7.9) & (ratio < 6.9)].unique(), torch.ones(1))
    assert torch.equal(x.grad[(ratio < -8.6) | (ratio > 7.6)].unique(), torch.zeros(1))


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(kind: type[Quantizer], dtype: torch.dtype) -> None:
    quantizer = fitted(kind, 8, True, False)
    x = tensor(True, seed=5).to(dtype).requires_grad_()
    result = quantizer(x)
    assert result.dtype == dtype
    assert torch.equal(result, quantizer(x.detach().float()).to(dtype))
    result.sum().backward()
    assert x.grad.dtype == dtype
    assert len(result.unique()) <= 256


@each_kind
def test_float64_stays_float64(kind: type[Quantizer]) -> None:
    assert fitted(kind, 8, True, False)(tensor(True).double()).dtype == torch.float64
    assert fitted(kind, 8, False, True)(tensor(False).double()).dtype == torch.float64


@each_kind
def test_running_before_calibration_is_an_error(kind: type[Quantizer]) -> None:
    quantizer = kind(8, channels=12, batched=True)
    with pytest.raises(UserError, match="calibrate"):
        quantizer(tensor(True))
    fresh = copy.deepcopy(quantizer.state_dict())
    ready = fitted(kind, 8, True, False)
    ready.load_state_dict(fresh)
    with pytest.raises(UserError, match="calibrate"):
        ready(tensor(True))
    with pytest.raises(UserError, match="nothing was observed"):
        quantizer.fit()


@each_kind
@each_use
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(kind: type[Quantizer], batched: bool, per_channel: bool, bad: float) -> None:
    quantizer = kind(8, channels=12, batched=batched, per_channel=per_channel)
    x = tensor(batched)
    x.view(-1)[17] = bad
    with pytest.raises(UserError, match="NaN or infinite"):
        quantizer.observe(x)


@each_kind
@each_use
def test_zeros_give_a_positive_scale(kind: type[Quantizer], batched: bool, per_channel: bool) -> None:
    quantizer = kind(8, channels=12, batched=batched, per_channel=per_channel)
    x = torch.zeros_like(tensor(batched)) if not per_channel else tensor(batched)
    x[3] = 0
    quantizer.observe(x)
    quantizer.fit()
    assert torch.isfinite(quantizer.scale).all()
    assert (quantizer.scale > 0).all()
    result = quantizer(x.requires_grad_())
    assert torch.equal(result[3], torch.zeros_like(result[3]))
    result.sum().backward()
    assert torch.isfinite(x.grad).all()


@each_kind
@pytest.mark.parametrize("bits", [1, 9, 8.0, True, "8"])
def test_bits_out_of_range(kind: type[Quantizer], bits: object) -> None:
    with pytest.raises(UserError, match="2 to 8"):
        kind(bits, channels=12, batched=True)


@each_kind
def test_per_channel_activations_are_refused(kind: type[Quantizer]) -> None:
    with pytest.raises(UserError, match="per_channel"):
        kind(8, channels=12, batched=True, per_channel=True)


@each_kind
def test_convolution_weights_share_a_scale_per_output_channel(kind: type[Quantizer]) -> None:
    weight = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(6))
    quantizer = kind(4, channels=6, batched=False, per_channel=True)
    quantizer.observe(weight)
    quantizer.fit()
    flat = kind(4, channels=6, batched=False, per_channel=True)
    flat.load_state_dict(quantizer.state_dict())
    assert torch.equal(quantizer(weight).flatten(1), flat(weight.flatten(1)))
