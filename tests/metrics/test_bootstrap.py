from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, norm

from qatlab.metrics import bootstrap as module
from qatlab.metrics.accuracy import mean_per_class_accuracy, top_k_accuracy
from qatlab.metrics.bins import equal_mass_calibration_error, maximum_calibration_error
from qatlab.metrics.bootstrap import bootstrap_classification, bootstrap_detection, bootstrap_means
from qatlab.metrics.calibration import confidence_gap, expected_calibration_error, score_zero_shot
from qatlab.metrics.detection import detection
from qatlab.metrics.resampling import percentile_interval, resampled_counts
from qatlab.metrics.selective import aurc
from qatlab.metrics.smooth import smooth_calibration_error


def scored(n: int = 60, classes: int = 7, coarse: bool = False, seed: int = 0) -> tuple[dict, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    cosines = 0.2 + 0.03 * torch.randn(n, classes, generator=generator)
    if coarse:
        cosines = (cosines * 40).round() / 40
    labels = torch.randint(classes, (n,), generator=generator)
    return score_zero_shot(cosines, labels, 60.0)._asdict(), labels.numpy()


def drawn(strata: np.ndarray, resamples: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(list(resampled_counts(strata, resamples, 7, seed)))


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("stratified", [False, True])
def test_every_replicate_is_the_metric_of_the_resampled_images(coarse, stratified):
    columns, labels = scored(coarse=coarse)
    strata = labels if stratified else None
    replicates = bootstrap_classification(columns, labels, resamples=20, seed=5, strata=strata)
    counts = drawn(labels if stratified else np.zeros(60), 20, (5, 0))
    for r, row in enumerate(counts):
        images = np.repeat(np.arange(60), row)
        confidence, correct = columns["confidence"][images], columns["correct"][images]
        expected = {
            "top1": float(correct.double().mean()),
            "top5": top_k_accuracy(columns["rank"][images], 5),
            "mean_per_class": mean_per_class_accuracy(correct, labels[images]),
            "ece": expected_calibration_error(confidence, correct),
            "ece_equal_mass": equal_mass_calibration_error(confidence, correct),
            "mce": maximum_calibration_error(confidence, correct),
            "smooth_ece": smooth_calibration_error(confidence, correct),
            "confidence_gap": confidence_gap(confidence, correct),
            "nll": float(columns["nll"][images].mean()),
            "brier": float(columns["brier"][images].mean()),
            "aurc": aurc(confidence, correct),
        }
        assert replicates.keys() == expected.keys()
        for name, value in expected.items():
            assert replicates[name][r] == pytest.approx(value, abs=1e-10), name


def test_every_replicate_is_the_mean_of_the_resampled_rows():
    values = np.random.default_rng(0).random((40, 3))
    found = bootstrap_means(values, resamples=20, seed=5, side=2)
    counts = drawn(np.zeros(40), 20, (5, 2))
    expected = [values[np.repeat(np.arange(40), row)].mean(axis=0) for row in counts]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert not np.array_equal(found, bootstrap_means(values, resamples=20, seed=5, side=1))


@pytest.mark.parametrize("digits", [8, 1, 0], ids=["distinct", "ties", "many ties"])
@pytest.mark.parametrize(("n", "m"), [(40, 25), (7, 90), (1, 5), (5, 1)])
def test_every_replicate_is_the_measure_of_the_resampled_scores(digits, n, m):
    rng = np.random.default_rng(0)
    ids = {name: np.round(rng.normal(1, 1, n), digits) for name in ("msp", "energy")}
    oods = {name: np.round(rng.normal(0, 1, m), digits) for name in ("msp", "energy")}
    replicates = bootstrap_detection(ids, oods, resamples=15, seed=3)
    id_counts, ood_counts = drawn(np.zeros(n), 15, (3, 1)), drawn(np.zeros(m), 15, (3, 2))
    for name in ids:
        for r in range(15):
            expected = detection(np.repeat(ids[name], id_counts[r]), np.repeat(oods[name], ood_counts[r]))
            assert replicates[name].keys() == expected.keys()
            for measure, value in expected.items():
                assert replicates[name][measure][r] == pytest.approx(value, abs=1e-12), measure


def test_the_same_seed_gives_the_same_bits_in_blocks_of_any_size(monkeypatch):
    columns, labels = scored(300)
    scores = {"msp": columns["confidence"]}, {"msp": columns["confidence"][:70] - 0.1}
    first = bootstrap_classification(columns, labels, resamples=50, seed=1)
    detected = bootstrap_detection(*scores, resamples=50, seed=1)["msp"]
    other = bootstrap_classification(columns, labels, resamples=50, seed=2)
    assert (first["nll"] != other["nll"]).any()
    monkeypatch.setattr(module, "BLOCK", 1000)
    again = bootstrap_classification(columns, labels, resamples=50, seed=1)
    for name, values in first.items():
        assert (values == again[name]).all(), name
    for name, values in bootstrap_detection(*scores, resamples=50, seed=1)["msp"].items():
        assert (values == detected[name]).all(), name


def test_resamples_keep_the_size_of_every_stratum():
    strata = np.array([3, 1, 1, 3, 3, 0, 1, 3])
    counts = drawn(strata, 200, (0,))
    for value, size in ((0, 1), (1, 3), (3, 4)):
        assert (counts[:, strata == value].sum(axis=1) == size).all()
    assert (counts[:, 5] == 1).all()
    # an image of four is drawn Binomial(4, ¼) times: mean 1, variance ¾
    assert counts[:, 0].mean() == pytest.approx(1, abs=0.15)
    assert counts[:, 0].var() == pytest.approx(0.75, abs=0.2)


def test_blocks_of_resamples_bound_the_memory():
    shapes = [block.shape for block in resampled_counts(np.zeros(50), 10, 4, (0,))]
    assert shapes == [(4, 50), (4, 50), (2, 50)]


def test_the_interval_of_a_mean_matches_scipys_bootstrap():
    hits = scored(400)[0]["correct"].double().numpy()
    ours = percentile_interval(drawn(np.zeros(400), 2000, (0,)) @ hits / 400)
    theirs = bootstrap((hits,), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.0076)


def test_intervals_cover_the_means_of_known_distributions():
    rng, covered = np.random.default_rng(0), np.zeros(2)
    for trial in range(300):
        accuracy_and_nll = np.stack([rng.uniform(size=200) < 0.7, rng.exponential(2.0, size=200)], axis=1)
        replicates = drawn(np.zeros(200), 200, (trial,)) @ accuracy_and_nll / 200
        low, high = np.array([percentile_interval(column) for column in replicates.T]).T
        covered += (low <= (0.7, 2.0)) & (high >= (0.7, 2.0))
    assert ((covered / 300 >= 0.91) & (covered / 300 <= 0.98)).all(), covered


def test_intervals_cover_the_auroc_of_two_normal_distributions():
    rng, covered, truth = np.random.default_rng(1), 0, norm.cdf(1 / math.sqrt(2))
    for trial in range(300):
        scores = {"s": rng.normal(1, 1, 100)}, {"s": rng.normal(0, 1, 80)}
        replicates = bootstrap_detection(*scores, resamples=150, seed=trial)
        low, high = percentile_interval(replicates["s"]["auroc"])
        covered += low <= truth <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_what_cannot_be_resampled_is_refused():
    columns, labels = scored(10)
    with pytest.raises(ValueError, match="0 resamples"):
        bootstrap_classification(columns, labels, resamples=0)
    with pytest.raises(ValueError, match="labels needs the shape"):
        bootstrap_classification(columns, labels[:5])
    with pytest.raises(ValueError, match="nll needs the shape"):
        bootstrap_classification({**columns, "nll": np.full(10, np.nan)}, labels)
    with pytest.raises(ValueError, match="strata needs the shape"):
        bootstrap_classification(columns, labels, strata=labels[:2])
    with pytest.raises(ValueError, match="there are no OOD scores"):
        bootstrap_detection({"a": [1.0]}, {"a": []})
    with pytest.raises(ValueError, match=r"ID scores need the same number of images, not \[1, 2\]"):
        bootstrap_detection({"a": [1.0], "b": [1.0, 2.0]}, {"a": [1.0], "b": [1.0]})
    for values in (np.empty((0, 2)), np.ones(3), np.full((3, 1), np.nan)):
        with pytest.raises(ValueError, match="values need the shape"):
            bootstrap_means(values)
