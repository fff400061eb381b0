from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm
from sklearn.metrics import roc_auc_score

from qatlab.metrics.detection import auroc
from qatlab.metrics.paired import delong, holm, mcnemar, paired_bootstrap


def brute_components(inside, outside) -> tuple[list[float], list[float]]:
    def psi(a: float, b: float) -> float:
        return (a > b) + 0.5 * (a == b)

    return (
        [sum(psi(a, b) for b in outside) / len(outside) for a in inside],
        [sum(psi(a, b) for a in inside) / len(inside) for b in outside],
    )


def brute_covariance(first: list[float], second: list[float]) -> float:
    one, two = sum(first) / len(first), sum(second) / len(second)
    return math.fsum((a - one) * (b - two) for a, b in zip(first, second, strict=True)) / (len(first) - 1)


def pair(n: int, m: int, digits: int, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    common_in, common_out = rng.normal(1, 1, n), rng.normal(0, 1, m)
    noisy = (common_in + 0.7 * rng.normal(size=n), common_out + 0.7 * rng.normal(size=m))
    return tuple(np.round(side, digits) for side in (common_in, common_out)), tuple(np.round(s, digits) for s in noisy)


@pytest.mark.parametrize(("n", "m", "digits"), [(40, 30, 9), (40, 30, 0), (2, 17, 1), (25, 2, 1)])
def test_delong_matches_the_structural_components_counted_pair_by_pair(n, m, digits):
    reference, other = pair(n, m, digits)
    (in_a, out_a), (in_b, out_b) = (brute_components(*scores) for scores in (reference, other))
    variance = 0.0
    for size, a, b in ((n, in_a, in_b), (m, out_a, out_b)):
        variance += (brute_covariance(a, a) + brute_covariance(b, b) - 2 * brute_covariance(a, b)) / size
    value = auroc(*other) - auroc(*reference)
    found = delong(reference, other)
    assert found.value == pytest.approx(value, abs=1e-12)
    assert found.high - found.low == pytest.approx(2 * norm.isf(0.025) * math.sqrt(variance), rel=1e-9)
    assert (found.low + found.high) / 2 == pytest.approx(value, abs=1e-12)
    assert found.p_value == pytest.approx(2 * norm.sf(abs(value) / math.sqrt(variance)), rel=1e-9)


def test_delong_agrees_with_sklearns_auroc_and_is_antisymmetric():
    reference, other = pair(300, 200, 1)
    truth = np.r_[np.ones(300), np.zeros(200)]
    areas = [roc_auc_score(truth, np.concatenate(scores)) for scores in (reference, other)]
    there, back = delong(reference, other), delong(other, reference)
    assert there.value == pytest.approx(areas[1] - areas[0], abs=1e-12)
    assert (back.value, back.low, back.high, back.p_value) == pytest.approx(
        (-there.value, -there.high, -there.low, there.p_value), abs=1e-15
    )


def test_delong_holds_its_level_where_nothing_differs():
    rng, rejected = np.random.default_rng(0), 0
    for _ in range(400):
        inside, outside = rng.normal(1, 1, 80), rng.normal(0, 1, 60)
        noisy = [(inside + 0.5 * rng.normal(size=80), outside + 0.5 * rng.normal(size=60)) for _ in range(2)]
        rejected += delong(*noisy).p_value < 0.05
    assert 0.02 <= rejected / 400 <= 0.08


def test_scores_that_rank_alike_do_not_differ():
    (inside, outside), _ = pair(30, 20, 1)
    same = delong((inside, outside), (torch.tensor(inside).exp(), torch.tensor(outside).exp()))
    assert same == (0, 0, 0, 1)
    apart = ([3.0, 4.0], [1.0, 2.0])
    assert delong(apart, apart) == (0, 0, 0, 1)
    # both without a variance, at 1 and at 0
    assert delong(apart, apart[::-1]) == (-1, -1, -1, 0)


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        ([1.0], [0.0, 1.0], "two images or more on each side, not 1 ID and 2 OOD"),
        ([], [1.0, 2.0], "there are no ID scores"),
        ([1.0, math.nan], [1.0, 2.0], "1 of 2 ID scores are NaN"),
    ],
)
def test_what_delong_cannot_tell_is_refused(inside, outside, message):
    with pytest.raises(ValueError, match=message):
        delong((inside, outside), (inside, outside))
    with pytest.raises(ValueError, match="same images"):
        delong(([1.0, 2.0], [1.0, 2.0]), ([1.0, 2.0, 3.0], [1.0, 2.0]))


@pytest.mark.parametrize("n", [1, 40, 3000])
def test_mcnemar_matches_statsmodels(n):
    tables = pytest.importorskip("statsmodels.stats.contingency_tables", reason="statsmodels is not installed")
    rng = np.random.default_rng(n)
    first, second = rng.uniform(size=n) < 0.7, rng.uniform(size=n) < 0.75
    table = [[(first & second).sum(), (first & ~second).sum()], [(~first & second).sum(), (~first & ~second).sum()]]
    found = mcnemar(first, torch.tensor(second))
    assert mcnemar(second, first) == pytest.approx(found, abs=1e-12)
    if table[0][1] + table[1][0]:
        assert found == pytest.approx(tables.mcnemar(table, exact=True).pvalue, abs=1e-12)


def test_mcnemar_is_the_binomial_test_of_the_discordant_images():
    found = mcnemar([1, 1, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1, 0])
    assert found == binomtest(1, 5).pvalue
    assert mcnemar([1, 0], [1, 0]) == 1.0
    for bad in ([], [2], [math.nan]):
        with pytest.raises(ValueError, match=r"same images|0 or 1"):
            mcnemar(bad, bad)
    with pytest.raises(ValueError, match="same images"):
        mcnemar([1], [1, 0])


def test_holm_matches_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is not installed")
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 60):
        values = np.round(rng.uniform(size=size) ** 3, 2)
        np.testing.assert_allclose(holm(values), multitest.multipletests(values, method="holm")[1], atol=1e-15)


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    assert holm([]).tolist() == []
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    for bad in ([1.5], [-0.1], [math.nan]):
        with pytest.raises(ValueError, match=r"numbers in 0\.\.1"):
            holm(bad)


def test_the_paired_bootstrap_reads_the_differences_of_the_replicates():
    reference = np.zeros(999)
    other = np.r_[np.full(30, -1.0), np.full(969, 1.0)]
    found = paired_bootstrap(0.9, reference, other)
    assert (found.value, found.p_value) == (0.9, 2 * 31 / 1000)
    assert (found.low, found.high) == tuple(np.quantile(other, [0.025, 0.975]))
    assert paired_bootstrap(0.0, reference, reference) == (0, 0, 0, 1)
    assert paired_bootstrap(1.0, reference, reference + 1).p_value == 0.002
    with pytest.raises(ValueError, match="same number of replicates"):
        paired_bootstrap(0.0, reference, other[:3])
