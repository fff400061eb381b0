"""The grid of each observer, against torch's observers and the definition."""

from __future__ import annotations

import pytest
import torch
from torch.ao.quantization import MinMaxObserver, MovingAverageMinMaxObserver

from qatlab.core.errors import UserError
from qatlab.quant import MinMax
from qatlab.quant.quantizers.grids import OBSERVERS, Observer, spanning
from qatlab.quant.quantizers.observers import ActivationStatistics


def seen(observer: Observer, batches: list[torch.Tensor]) -> ActivationStatistics:
    statistics = ActivationStatistics(histogram=observer.needs_histogram)
    for batch in batches:
        statistics.update(batch)
    return statistics


def drawn(shift: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(400, generator=generator) * factor + shift for factor in (1, 2, 0.3)]


@pytest.mark.parametrize("shift", [-9.0, -0.7, 0.0, 0.4, 11.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["absmax", "ema"])
def test_with_zero_point_it_is_torchs(name: str, bits: int, shift: float) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    options = {"dtype": torch.qint8, "quant_min": low, "quant_max": high, "qscheme": torch.per_tensor_affine}
    peer = MinMaxObserver(**options)
    if name == "ema":
        peer = MovingAverageMinMaxObserver(averaging_constant=0.1, **options)
    batches = drawn(shift)
    for batch in batches:
        peer(batch)
    scale, zero = Observer(name).grid(seen(Observer(name), batches), low, high)
    peer_scale, peer_zero = peer.calculate_qparams()
    assert float(scale) == pytest.approx(float(peer_scale), rel=1e-6)
    assert int(zero) == int(peer_zero)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("shift", [-9.0, 0.0, 11.0])
def test_zero_is_a_code_and_the_ends_are_near(name: str, shift: float) -> None:
    observer = Observer(name, 100.0)
    statistics = seen(observer, drawn(shift))
    scale, zero = (float(value) for value in observer.grid(statistics, -128, 127))
    assert zero == int(zero)
    assert -128 <= zero <= 127
    if name in ("absmax", "percentile"):
        edge = float(statistics.absmax) / 2**15
        assert (-128 - zero) * scale == pytest.approx(min(0.0, float(statistics.low)), abs=scale / 2 + edge)
        assert (127 - zero) * scale == pytest.approx(max(0.0, float(statistics.high)), abs=scale / 2 + edge)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (3.0, 3.0), (-3.0, -3.0), (2.0, 5.0), (-5.0, -2.0), (-1.0, 2.0)])
def test_spanning_any_range(low: float, high: float) -> None:
    scale, zero = spanning(torch.tensor(low).double(), torch.tensor(high).double(), -8, 7)
    assert float(scale) == max(1e-12, (max(high, 0) - min(low, 0)) / 15)
    assert -8 <= float(zero) <= 7


@pytest.mark.parametrize(
    ("name", "percentile", "message"),
    [
        ("abs_max", 99.9, "observer=abs_max is unknown .did you mean 'absmax'"),
        (3, 99.9, r"observer=3: it takes absmax \| ema \| percentile \| mse"),
        ("percentile", 50, "percentile=50: it takes a number above 50"),
        ("percentile", 100.1, "percentile=100.1"),
        ("percentile", "99", "percentile=99"),
        ("percentile", True, "percentile=true"),
        ("absmax", float("nan"), "percentile=nan"),
    ],
)
def test_what_is_refused(name: str, percentile: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MinMax(8, channels=2, batched=True, observer=name, percentile=percentile)
