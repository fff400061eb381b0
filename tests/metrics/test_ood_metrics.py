from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torchmetrics.functional.classification import binary_auroc

from qatlab.metrics.detection import auroc, fpr95_id_pos, fpr95_ood_pos
from qatlab.metrics.ood import ALL_SCORES, SCORES, energy, entropy, inputs_of, mcm, msp, score_images

OF_COSINES = [name for name in ALL_SCORES if inputs_of([name]) <= {"cosines", "logit_scale"}]


def plainly(name: str, cosines: list[float], scale: float, temperature: float) -> float:
    """The definitions of the field, written out for one image."""
    softmax = {"msp": scale, "mcm": 1 / temperature}
    if name in softmax:
        return 1 / math.fsum(math.exp(softmax[name] * (c - max(cosines))) for c in cosines)
    if name == "energy":
        return math.log(math.fsum(math.exp(scale * c) for c in cosines)) / scale
    if name == "entropy":
        gaps = sorted(scale * (c - max(cosines)) for c in cosines)
        others = math.fsum(math.exp(gap) for gap in gaps[:-1])
        return math.fsum(math.exp(gap) * gap for gap in gaps) / (1 + others) - math.log1p(others)
    return {"max_logit": max(cosines)}[name]


@pytest.mark.parametrize("name", OF_COSINES)
@pytest.mark.parametrize(("scale", "temperature"), [(100.0, 1.0), (17.0, 0.01)])
def test_scores_match_brute_force_in_value_and_order(name, scale, temperature):
    cosines = 0.2 + 0.05 * torch.randn(300, 37, generator=torch.Generator().manual_seed(0))
    scores = score_images([name], cosines, scale, temperature)[name]
    expected = torch.tensor([plainly(name, row, scale, temperature) for row in cosines.tolist()], dtype=torch.float64)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)
    assert torch.equal(scores.argsort(), expected.argsort())


@pytest.mark.parametrize("name", OF_COSINES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0, 1e6])
def test_scores_are_finite_on_extreme_cosines(name, scale):
    values = torch.tensor([-1.0, 0.0, 1.0, 1e-30])
    cosines = torch.stack([torch.full((1000,), -1.0), torch.full((1000,), 1.0), values.repeat(250)])
    for temperature in (1e-6, 1.0, 1e6):
        assert torch.isfinite(score_images([name], cosines, scale, temperature)[name]).all()


@pytest.mark.parametrize("name", OF_COSINES)
def test_a_clear_winner_scores_higher_than_a_flat_image(name):
    cosines = torch.tensor([[0.35, 0.1, 0.1], [0.2, 0.2, 0.2]])
    clear, flat = score_images([name], cosines, 100.0, 1.0)[name]
    assert clear > flat


def test_mcm_keeps_images_apart_that_float32_would_tie():
    generator = torch.Generator().manual_seed(0)
    cosines = 0.2 + 0.002 * torch.randn(5000, 1000, generator=generator)
    assert len(mcm(cosines).unique()) == 5000
    assert len(mcm(cosines).float().unique()) < 5000


def test_msp_and_energy_follow_the_logit_scale():
    cosines = torch.tensor([[0.3, 0.2]])
    assert msp(cosines, 10.0) < msp(cosines, 100.0)
    assert float(energy(cosines, 1e5)) == pytest.approx(0.3, abs=1e-5)
    torch.testing.assert_close(mcm(cosines, 0.02), msp(cosines, 50.0))


def test_entropy_lies_between_a_certain_and_an_even_image():
    cosines = torch.tensor([[1.0, -1.0, -1.0], [0.3, 0.3, 0.3]])
    torch.testing.assert_close(entropy(cosines, 1e3), torch.tensor([0.0, -math.log(3)], dtype=torch.float64))
    chances = (20 * torch.randn(50, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).softmax(1)
    torch.testing.assert_close(entropy(chances.log(), 1.0), -torch.tensor(scipy.stats.entropy(chances, axis=1)))
    certain = torch.tensor([[0.3 + step / 100, 0.0] for step in range(40)])
    assert (entropy(certain, 100.0).diff() > 0).all()


def test_a_score_says_what_it_needs():
    assert list(SCORES) == ["msp", "energy", "max_logit", "mcm"]
    assert [*SCORES, "entropy"] == OF_COSINES
    assert inputs_of(["max_logit"]) == {"cosines"}
    assert inputs_of(["mcm", "gl_mcm"]) == {"cosines", "local"}
    assert inputs_of(ALL_SCORES) == {
        *("cosines", "logit_scale", "features", "local", "negatives", "generic", "gaussian", "neighbours", "subspace")
    }


def test_a_score_is_given_what_it_asks_for():
    cosines = torch.tensor([[0.3, 0.2], [0.1, 0.2]])
    scored = score_images(["gl_mcm", "mcm"], cosines, 100.0, 0.5, local=torch.ones(2), local_weight=3.0, generic=None)
    torch.testing.assert_close(scored["gl_mcm"], mcm(cosines, 0.5) + 3)
    assert list(scored) == ["gl_mcm", "mcm"]
    with pytest.raises(ValueError, match="the score 'neglabel' needs features, negatives"):
        score_images(["msp", "neglabel"], cosines, 100.0, 1.0)


def pairs():
    rng = np.random.default_rng(0)
    yield "continuous", rng.normal(size=500), rng.normal(-1, 2, size=300)
    yield "coarse ties", rng.integers(0, 6, 400).astype(float), rng.integers(-2, 4, 333).astype(float)
    yield "energies near 40", 40 + 5 * rng.normal(size=400), 33 + 5 * rng.normal(size=300)
    yield "mcm, spread 1e-9", 1e-3 + 1e-9 * rng.normal(size=200), 1e-3 + 1e-9 * rng.normal(-1, 1, size=100)
    yield "reversed", rng.normal(-2, 1, size=200), rng.normal(size=200)
    yield "all equal", np.ones(40), np.ones(21)
    yield "one image each", np.ones(1), np.zeros(1)
    for n, m in ((1, 20), (20, 1), (19, 21), (100, 40)):
        yield f"{n} and {m}", np.round(rng.normal(size=n), 1), np.round(rng.normal(size=m), 1)


PAIRS = [pytest.param(inside, outside, id=name) for name, inside, outside in pairs()]


@pytest.mark.parametrize(("inside", "outside"), PAIRS)
def test_auroc_matches_sklearn_and_counting(inside, outside):
    truth = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(truth, np.r_[inside, outside]), abs=1e-12)
    counted = sum((a > b) + 0.5 * (a == b) for a, b in product(inside, outside)) / (len(inside) * len(outside))
    assert auroc(inside, outside) == pytest.approx(counted, abs=1e-12)
    assert auroc(outside, inside) == pytest.approx(1 - counted, abs=1e-12)


def sklearn_fpr95(positive, negative) -> float:
    truth = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    fpr, tpr, _ = roc_curve(truth, np.r_[positive, negative], drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= 0.95)])


@pytest.mark.parametrize(("inside", "outside"), PAIRS)
def test_fpr95_matches_sklearn_in_both_conventions(inside, outside):
    assert fpr95_id_pos(inside, outside) == pytest.approx(sklearn_fpr95(inside, outside), abs=1e-12)
    assert fpr95_ood_pos(inside, outside) == pytest.approx(sklearn_fpr95(-outside, -inside), abs=1e-12)


@pytest.mark.parametrize(("inside", "outside"), PAIRS)
def test_fpr95_matches_a_loop_over_thresholds(inside, outside):
    thresholds = sorted({*inside, *outside})
    accepted = next(t for t in reversed(thresholds) if 100 * np.sum(inside >= t) >= 95 * len(inside))
    assert fpr95_id_pos(inside, outside) == np.mean(outside >= accepted)
    flagged = next(t for t in thresholds if 100 * np.sum(outside <= t) >= 95 * len(outside))
    assert fpr95_ood_pos(inside, outside) == np.mean(inside <= flagged)


def test_the_two_conventions_are_different_numbers():
    # ID: a tail of 6 in 100 that scores low. OOD: a bulk of 68 in 100 below the rest of ID and 32 within it.
    inside = np.r_[np.zeros(6), np.linspace(1, 2, 94)]
    outside = np.r_[np.full(68, 0.5), np.linspace(1, 1.3, 32)]
    id_positive, ood_positive = fpr95_id_pos(inside, outside), fpr95_ood_pos(inside, outside)
    assert id_positive == 1.0
    assert ood_positive == np.mean(inside <= np.sort(outside)[94])
    assert id_positive - ood_positive > 0.3


def test_energies_near_40_are_not_put_through_a_sigmoid():
    rng = np.random.default_rng(0)
    inside, outside = 40 + 5 * rng.normal(size=2000), 30 + 5 * rng.normal(size=2000)
    truth = torch.tensor(np.r_[np.ones(2000), np.zeros(2000)]).long()
    trap = float(binary_auroc(torch.tensor(np.r_[inside, outside], dtype=torch.float32), truth))
    assert trap < 0.6
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(truth.numpy(), np.r_[inside, outside]), abs=1e-12)
    assert auroc(inside, outside) > 0.9


def test_ranks_only_matter():
    rng = np.random.default_rng(3)
    inside, outside = rng.normal(size=300), rng.normal(-1, 1, size=300)
    for measure in (auroc, fpr95_id_pos, fpr95_ood_pos):
        value = measure(inside, outside)
        assert value == measure(np.exp(inside), np.exp(outside)) == measure(inside + 40, outside + 40)
        assert value == measure(torch.tensor(inside), torch.tensor(outside))


@pytest.mark.parametrize("measure", [auroc, fpr95_id_pos, fpr95_ood_pos])
@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        ([], [1.0], "there are no ID scores"),
        ([1.0], [], "there are no OOD scores"),
        ([1.0, math.nan], [1.0], "1 of 2 ID scores are NaN or infinite"),
        ([1.0], [math.inf, -math.inf, 0.0], "2 of 3 OOD scores are NaN or infinite"),
    ],
)
def test_what_cannot_be_ranked_is_refused(measure, inside, outside, message):
    with pytest.raises(ValueError, match=message):
        measure(inside, outside)
