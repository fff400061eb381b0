"""Calibration errors against those of netcal and of relplot, the code of the smooth error's authors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qatlab.metrics.bins import equal_mass_calibration_error, maximum_calibration_error
from qatlab.metrics.calibration import expected_calibration_error
from qatlab.metrics.smooth import smooth_calibration_error

pytestmark = pytest.mark.peers


def outcomes(seed: int, n: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    confidence = rng.beta(3, 1.2, size=n)
    return confidence, rng.uniform(size=n) < confidence ** rng.uniform(0.5, 2)


@pytest.mark.parametrize("seed", range(5))
def test_binned_errors_match_netcal(seed):
    metrics = pytest.importorskip("netcal.metrics", reason="netcal is not installed: the extra 'peers'")
    confidence, correct = outcomes(seed)
    arguments = confidence, correct.astype(int)
    assert expected_calibration_error(*arguments) == pytest.approx(metrics.ECE(15).measure(*arguments), abs=1e-9)
    assert maximum_calibration_error(*arguments) == pytest.approx(metrics.MCE(15).measure(*arguments), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_smooth_error_matches_its_authors(seed):
    relplot = pytest.importorskip("relplot", reason="relplot is not installed: the extra 'peers'")
    confidence, correct = outcomes(seed)
    # theirs searches the width in ten halvings
    expected = relplot.smECE(confidence, correct.astype(float))
    assert smooth_calibration_error(confidence, torch.tensor(correct)) == pytest.approx(expected, abs=2e-3)


def test_equal_mass_matches_the_equal_intervals_of_a_uniform_confidence():
    confidence = (np.arange(1500) + 0.5) / 1500
    correct = np.random.default_rng(0).uniform(size=1500) < confidence**2
    expected = expected_calibration_error(confidence, correct)
    assert equal_mass_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-12)
