from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from qatlab.metrics.temperature import fit_logit_scale


def images(n: int = 500, classes: int = 40, gain: float = 0.06, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    cosines = 0.2 + 0.03 * torch.randn(n, classes, generator=generator)
    cosines[torch.arange(n), labels] += gain * torch.rand(n, generator=generator)
    return cosines, labels


def mean_nll(cosines: torch.Tensor, targets: torch.Tensor, scale: float) -> float:
    return float(torch.nn.functional.cross_entropy(scale * cosines.double(), targets))


def teacher(cosines: torch.Tensor, scale: float) -> torch.Tensor:
    return (scale * cosines.double()).softmax(1)


def both_kinds() -> list:
    cosines, labels = images()
    noisy = cosines + 0.02 * torch.randn(cosines.shape, generator=torch.Generator().manual_seed(9))
    return [
        pytest.param(cosines, labels, id="labels"),
        pytest.param(noisy, teacher(cosines, 100.0), id="teacher"),
        pytest.param(noisy, teacher(cosines, 100.0).float(), id="teacher in float32"),
    ]


@pytest.mark.parametrize(("cosines", "targets"), both_kinds())
def test_fit_matches_scipy_a_dense_grid_and_lbfgs(cosines, targets):
    fit = fit_logit_scale(cosines, targets)
    wide = targets.double() if targets.ndim == 2 else targets
    bounded = minimize_scalar(
        lambda t: mean_nll(cosines, wide, math.exp(t)),
        bounds=(0.0, math.log(1000.0)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert fit.logit_scale == pytest.approx(math.exp(bounded.x), rel=1e-6)
    grid = np.exp(np.linspace(math.log(fit.logit_scale) - 0.5, math.log(fit.logit_scale) + 0.5, 201))
    losses = [mean_nll(cosines, wide, scale) for scale in grid]
    assert np.argmin(losses) == 100
    assert fit.nll_after <= min(losses) + 1e-6
    log_scale = torch.tensor(math.log(50.0), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(log_scale.exp() * cosines.double(), wide)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert fit.logit_scale == pytest.approx(float(log_scale.detach().exp()), rel=1e-5)


@pytest.mark.parametrize(("cosines", "targets"), both_kinds())
def test_the_objective_is_convex_in_the_scale(cosines, targets):
    wide = targets.double() if targets.ndim == 2 else targets
    losses = np.array([mean_nll(cosines, wide, scale) for scale in np.linspace(1, 400, 200)])
    assert (np.diff(losses, 2) > -1e-12).all()


def test_nll_before_and_after():
    cosines, labels = images()
    fit = fit_logit_scale(cosines, labels, current=64.0)
    assert fit.nll_before == pytest.approx(mean_nll(cosines, labels, 64.0), abs=1e-12)
    assert fit.nll_after == pytest.approx(mean_nll(cosines, labels, fit.logit_scale), abs=1e-12)
    assert fit.nll_after < fit.nll_before
    assert not fit.at_bound
    again = fit_logit_scale(cosines, labels, current=fit.logit_scale)
    assert again.nll_after == again.nll_before


def test_a_teacher_with_the_same_cosines_gives_its_own_scale_back():
    cosines, _ = images()
    assert fit_logit_scale(cosines, teacher(cosines, 73.0)).logit_scale == pytest.approx(73.0, rel=1e-9)


def test_labels_and_their_one_hot_rows_agree():
    cosines, labels = images()
    soft = torch.nn.functional.one_hot(labels, cosines.shape[1]).double()
    assert fit_logit_scale(cosines, soft) == fit_logit_scale(cosines, labels)


def test_more_images_than_a_block():
    cosines, labels = images(n=3000, classes=100)
    fit = fit_logit_scale(cosines, labels)
    assert fit.nll_after == pytest.approx(mean_nll(cosines, labels, fit.logit_scale), abs=1e-12)


@pytest.mark.parametrize(("wrong", "end"), [(True, 1.0), (False, 1000.0)])
def test_a_bound_is_reported(wrong, end):
    cosines, _ = images(classes=5)
    labels = cosines.argmin(1) if wrong else cosines.argmax(1)
    fit = fit_logit_scale(cosines, labels)
    assert (fit.logit_scale, fit.at_bound) == (end, True)
    narrow = fit_logit_scale(*images(), bounds=(200.0, 300.0))
    assert (narrow.logit_scale, narrow.at_bound) == (200.0, True)


def test_what_cannot_be_fitted_is_refused():
    cosines, labels = images(n=20)
    with pytest.raises(ValueError, match=r"label -1 is outside 0\.\.39"):
        fit_logit_scale(cosines, torch.full((20,), -1))
    with pytest.raises(ValueError, match="sums to 2"):
        fit_logit_scale(cosines, 2 * teacher(cosines, 10.0))
    with pytest.raises(ValueError, match="there are no images"):
        fit_logit_scale(cosines[:0], labels[:0])
