from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from qatlab.core.errors import UserError
from qatlab.quant.quantizers.hadamard import RandomHadamard, _kept, walsh_hadamard

WIDTHS = [1, 2, 3, 5, 63, 64, 77, 192, 768, 1023, 1024, 3072]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def scipy_matrix(width: int) -> Tensor:
    return torch.from_numpy(hadamard(width)).double() / math.sqrt(width)


@pytest.mark.parametrize("width", [1, 2, 8, 16, 32, 64, 256, 512, 2048])
def test_the_transform_is_scipys_matrix(width: int) -> None:
    x = random(2, 3, width)
    torch.testing.assert_close(walsh_hadamard(x), x @ scipy_matrix(width), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.003)],
    ids=str,
)
def test_every_dtype(dtype: torch.dtype, tolerance: float) -> None:
    """The error is relative to the largest value: a unit in the last place per factor of the transform."""
    x = random(4, 3072).to(dtype)
    rotation = RandomHadamard(3072, seed=0)
    expected = rotation(x.double())
    y = rotation(x)
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() < tolerance * expected.abs().max()
    back = rotation.inverse(y)
    assert back.dtype == dtype
    assert (back.double() - x.double()).abs().max() < 2 * tolerance * x.abs().max()
    assert (walsh_hadamard(walsh_hadamard(x[:, :2048])) - x[:, :2048]).abs().max() < 2 * tolerance * x.abs().max()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_is_orthogonal(width: int) -> None:
    rotation = RandomHadamard(width, seed=1)
    matrix = rotation(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    x = random(5, width)
    torch.testing.assert_close(rotation.inverse(rotation(x)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation(rotation.inverse(x)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [3, 192, 768, 1024])
def test_the_two_windows(width: int) -> None:
    """Against RaanA's definition with dense matrices."""
    rotation = RandomHadamard(width, seed=2)
    window = 2 ** int(math.log2(width))
    first, last = torch.eye(width, dtype=torch.float64), torch.eye(width, dtype=torch.float64)
    first[:window, :window] = scipy_matrix(window) @ torch.diag(rotation.first_signs.double())
    last[-window:, -window:] = scipy_matrix(window) @ torch.diag(rotation.last_signs.double())
    x = random(4, width)
    torch.testing.assert_close(rotation(x), x @ (last @ first).T, rtol=0, atol=1e-12)


def test_a_rotated_weight_on_a_rotated_input() -> None:
    rotation, weight, x = RandomHadamard(192, seed=0), random(7, 192), random(5, 192)
    torch.testing.assert_close(rotation(x) @ rotation(weight).T, x @ weight.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [64, 768, 3072])
def test_one_outlier_is_spread(width: int) -> None:
    """Whichever feature it is in, all come out at less than 6 / sqrt(window) of its size: entries like normal ones."""
    matrix = RandomHadamard(width, seed=0)(torch.eye(width))
    assert matrix.abs().max() < 6 / math.sqrt(2 ** int(math.log2(width)))


def test_the_seed_decides() -> None:
    x = random(2, 768)
    torch.manual_seed(5)
    one = RandomHadamard(768, seed=7)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    two, other = RandomHadamard(768, seed=7), RandomHadamard(768, seed=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one(x), two(x))
    assert not torch.allclose(one(x), other(x))
    assert not list(one.parameters())
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), one(x))


def test_the_gradient() -> None:
    for width in (8, 12):
        rotation = RandomHadamard(width, seed=0)
        x = random(3, width).requires_grad_()
        assert torch.autograd.gradcheck(rotation, (x,))
        assert torch.autograd.gradgradcheck(rotation, (x,))
    x = random(2, 64, dtype=torch.float32).requires_grad_()
    grad = random(2, 64, dtype=torch.float32)
    walsh_hadamard(x).backward(grad)
    assert torch.equal(x.grad, walsh_hadamard(grad))


def test_nothing_of_the_input_is_kept_for_the_backward() -> None:
    kept = []
    x = random(50, 768, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        RandomHadamard(768, seed=0)(x)
    assert sum(kept) <= 2 * 512


def test_under_autocast_the_dtype_and_the_digits_stay() -> None:
    x, rotation = random(4, 192, dtype=torch.float32), RandomHadamard(192, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        y = rotation(x)
    assert torch.equal(y, rotation(x))


def test_work_is_d_log_d() -> None:
    """Multiplications and additions per feature grow with log2(d): at most 8 per doubling, where a dense H has 2 d."""
    for log in range(4, 15):
        with FlopCounterMode(display=False) as counter:
            walsh_hadamard(torch.zeros(3, 2**log))
        assert 0 < counter.get_total_flops() <= 3 * 2**log * 2 * 16 * math.ceil(log / 4)


def test_other_layouts_and_empty_batches() -> None:
    x = random(64, 5).T
    assert not x.is_contiguous()
    torch.testing.assert_close(walsh_hadamard(x), x @ scipy_matrix(64), rtol=0, atol=1e-12)
    assert walsh_hadamard(random(0, 64)).shape == (0, 64)
    assert RandomHadamard(12, seed=0)(random(12)).shape == (12,)
    with torch.inference_mode():
        RandomHadamard(24, seed=0)(torch.zeros(2, 24))
    RandomHadamard(24, seed=0)(torch.zeros(2, 24, requires_grad=True)).sum().backward()


def test_a_graph_that_is_traced_first_leaves_its_matrices_to_itself() -> None:
    """An encoder that was read back and is exported is traced before it ever ran."""
    _kept.cache_clear()
    rotation, x = RandomHadamard(64, seed=0), random(3, 64, dtype=torch.float32)
    traced = torch.export.export(rotation, (x,)).module()(x)
    torch.testing.assert_close(rotation(x), x @ rotation(torch.eye(64)), rtol=0, atol=1e-6)
    torch.testing.assert_close(traced, rotation(x), rtol=0, atol=1e-6)


def test_widths_that_cannot_be_done() -> None:
    with pytest.raises(UserError, match=r"768 features, and takes a power of two: RandomHadamard\(768, seed\)"):
        walsh_hadamard(torch.zeros(2, 768))
    with pytest.raises(UserError, match="power of two"):
        walsh_hadamard(torch.zeros(2, 0))
    for width in (0, -4, 2.0, True):
        with pytest.raises(UserError, match="at least 1"):
            RandomHadamard(width, seed=0)
    with pytest.raises(ValueError, match="192 features got an input of shape"):
        RandomHadamard(192, seed=0)(torch.zeros(2, 64))
