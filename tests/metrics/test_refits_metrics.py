from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression

from qatlab.metrics.calibration import ZeroShot, expected_calibration_error, score_zero_shot
from qatlab.metrics.refits import fit_vector_scaling, folds, refit_isotonic, refit_temperature, refit_vector
from qatlab.metrics.temperature import fit_logit_scale


def images(n: int = 300, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    cosines = 0.2 + 0.03 * torch.randn(n, classes, generator=generator) + 0.02 * torch.arange(classes) / classes
    cosines[torch.arange(n), labels] += 0.03
    return cosines, labels


def temperature(cosines: torch.Tensor, labels: torch.Tensor, fold: np.ndarray) -> ZeroShot:
    return refit_temperature(cosines, labels, 50.0, fold)[0]


@pytest.mark.parametrize(("n", "k"), [(10, 5), (11, 5), (2, 2), (5, 5)])
def test_folds_are_even_seeded_and_mixed(n, k):
    fold = folds(n, k, seed=1)
    sizes = np.bincount(fold, minlength=k)
    assert sizes.max() - sizes.min() <= 1
    assert (fold == folds(n, k, seed=1)).all()
    assert (folds(100, 5, seed=1) != folds(100, 5, seed=2)).any()


@pytest.mark.parametrize("k", [1, 4])
def test_folds_that_cannot_be_are_refused(k):
    with pytest.raises(ValueError, match=f"3 images cannot be divided into {k} folds"):
        folds(3, k)


def test_the_temperature_of_an_image_never_saw_it():
    cosines, labels = images()
    fold = folds(len(labels))
    found, kept = refit_temperature(cosines, labels, 50.0, fold)
    assert not kept.any()
    for part in range(5):
        rest, held_out = fold != part, fold == part
        scale = fit_logit_scale(cosines[rest], labels[rest]).logit_scale
        expected = score_zero_shot(cosines[held_out], labels[held_out], scale)
        for name in expected._fields:
            assert torch.equal(getattr(found, name)[held_out], getattr(expected, name)), name
    assert torch.equal(found.prediction, cosines.argmax(1))


def test_a_changed_label_changes_every_image_but_its_own_fold():
    cosines, labels = images()
    fold, changed = folds(len(labels)), labels.clone()
    changed[17] = (labels[17] + 1) % 5
    for refit in (temperature, lambda c, y, f: refit_vector(c, y, 50.0, f)):
        before, after = refit(cosines, labels, fold), refit(cosines, changed, fold)
        same = (before.confidence == after.confidence).numpy()
        assert same[fold == fold[17]].all()
        assert not same[fold != fold[17]].any()


def test_vector_scaling_is_where_torchs_own_gradient_vanishes():
    cosines, labels = images()
    scale, bias = (values.clone().requires_grad_() for values in fit_vector_scaling(cosines, labels, 50.0))
    loss = torch.nn.functional.cross_entropy(cosines.double() * scale + bias, labels)
    loss.backward()
    # in the fit's own units: a scale is in parts of the logit scale
    assert float(bias.grad.abs().max()) < 1e-5
    assert float(scale.grad.abs().max()) < 1e-5
    one = fit_logit_scale(cosines, labels)
    assert float(loss.detach()) < one.nll_after
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):  # convex: no neighbour is better
        moved = scale.detach() * (1 + 0.02 * torch.randn(5, generator=generator).double())
        other = torch.nn.functional.cross_entropy(cosines.double() * moved + bias.detach(), labels)
        assert float(other) > float(loss.detach())


def test_vector_scaling_undoes_a_bias_and_a_scale_per_class():
    cosines, _ = images(4000, 3)
    scale, bias = torch.tensor([40.0, 60.0, 50.0]).double(), torch.tensor([0.5, -0.5, 0.0]).double()
    generator = torch.Generator().manual_seed(2)
    labels = torch.multinomial((cosines.double() * scale + bias).softmax(1), 1, generator=generator).squeeze(1)
    truth = float(torch.nn.functional.cross_entropy(cosines.double() * scale + bias, labels))
    found = fit_vector_scaling(cosines, labels, 50.0)
    fitted = float(torch.nn.functional.cross_entropy(cosines.double() * found[0] + found[1], labels))
    assert truth - 0.003 < fitted <= truth


def test_a_class_that_the_fit_lacks_stays_finite():
    cosines, labels = images(60, 6)
    labels[labels == 3] = 2
    scored = refit_vector(cosines, labels, 50.0, folds(60))
    assert torch.isfinite(scored.nll).all()
    assert not (scored.prediction == 3).any()


@pytest.mark.parametrize("digits", [12, 1])
def test_isotonic_matches_sklearn(digits):
    rng = np.random.default_rng(0)
    confidence = np.round(rng.beta(4, 1.5, size=3000), digits)
    correct = rng.uniform(size=3000) < confidence**2
    fold = folds(3000)
    found = refit_isotonic(torch.tensor(confidence), torch.tensor(correct), fold)
    for part in range(5):
        theirs = IsotonicRegression(out_of_bounds="clip").fit(confidence[fold != part], correct[fold != part])
        np.testing.assert_allclose(found[fold == part], theirs.predict(confidence[fold == part]), atol=1e-7)
    assert expected_calibration_error(found, correct) < expected_calibration_error(confidence, correct)
    with pytest.raises(ValueError, match="not a probability"):
        refit_isotonic([math.nan, 0.5], [1, 0], folds(2, 2))


def test_refits_repeat_to_the_bit():
    cosines, labels = images()
    for refit in (temperature, lambda c, y, f: refit_vector(c, y, 50.0, f)):
        first, again = (refit(cosines, labels, folds(len(labels), seed=4)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_using_a6_a_fold_whose_fit_ends_at_its_bound_keeps_the_scale():
    """The first fold's images are all told apart but for one of the second: only the fits that see it have a root."""
    labels = torch.arange(40) % 4
    cosines = torch.eye(4)[labels] * 0.1
    fold = np.arange(40) // 8
    cosines[9] = torch.eye(4)[(labels[9] + 1) % 4] * 0.1  # wrong, in the fold 1
    found, kept = refit_temperature(cosines, labels, 30.0, fold)
    assert (kept == (fold == 1)).all()
    expected = score_zero_shot(cosines[8:16], labels[8:16], 30.0)
    assert torch.equal(found.nll[8:16], expected.nll)
    # 31 images with the right class's cosine 0.1 ahead of three, one with it 0.1 behind one: s minimises their NLL
    scale = minimize_scalar(
        lambda s: 31 * np.log1p(3 * np.exp(-0.1 * s)) + np.log(3 + np.exp(0.1 * s)), bounds=(1, 1000), method="bounded",
        options={"xatol": 1e-9},
    ).x  # fmt: skip
    assert float(found.confidence[0]) == pytest.approx(1 / (1 + 3 * np.exp(-0.1 * scale)), abs=1e-6)
