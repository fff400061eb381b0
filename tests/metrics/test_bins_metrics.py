from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from qatlab.metrics.bins import (
    equal_mass,
    equal_mass_calibration_error,
    equal_width,
    maximum_calibration_error,
    reliability_bins,
)
from qatlab.metrics.calibration import expected_calibration_error, score_zero_shot
from qatlab.metrics.classwise import classwise_calibration_error, classwise_gaps
from qatlab.metrics.selective import aurc
from qatlab.metrics.shift import bin_shift
from qatlab.metrics.smooth import smooth_calibration_error

MEASURES = [
    expected_calibration_error,
    equal_mass_calibration_error,
    maximum_calibration_error,
    smooth_calibration_error,
    aurc,
]


def outcomes(n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    confidence = rng.beta(4, 1.5, size=n)
    return confidence, rng.uniform(size=n) < confidence**1.7


def tied(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    confidence, correct = outcomes(n)
    return np.ceil(confidence * 8) / 8, correct


@pytest.mark.parametrize("n_bins", [1, 5, 15])
def test_the_maximum_matches_torchmetrics(n_bins):
    confidence, correct = map(torch.tensor, outcomes())
    expected = binary_calibration_error(confidence, correct.long(), n_bins=n_bins, norm="max")
    assert maximum_calibration_error(confidence, correct, n_bins) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("n_bins", [1, 5, 15])
def test_equal_mass_matches_a_cut_of_the_sorted_images(n_bins):
    confidence, correct = outcomes()
    order = np.argsort(confidence)
    expected = 0.0
    for members in np.array_split(order, n_bins):
        expected += abs(confidence[members].sum() - correct[members].sum()) / len(order)
    assert equal_mass_calibration_error(confidence, correct, n_bins) == pytest.approx(expected, abs=1e-12)
    assert reliability_bins(confidence, correct, n_bins, equal_mass).images.tolist() == [300 // n_bins] * n_bins


def test_equal_mass_keeps_ties_together_in_any_order():
    confidence = tied()[0]
    order = np.random.default_rng(1).permutation(len(confidence))
    bins, mixed = equal_mass(confidence, 15), equal_mass(confidence[order], 15)
    assert (bins[order] == mixed).all()
    assert len({(value, b) for value, b in zip(confidence, bins, strict=True)}) == len(np.unique(confidence))
    sizes = np.bincount(equal_mass(np.random.default_rng(2).uniform(size=301), 15))
    assert sizes.max() - sizes.min() == 1


def brute_classwise(probabilities, labels, n_bins: int = 15) -> float:
    n, classes = probabilities.shape
    total = 0.0
    for k in range(classes):
        sums = [0.0] * n_bins
        for p, label in zip(probabilities[:, k].tolist(), labels.tolist(), strict=True):
            sums[min(int(p * n_bins), n_bins - 1)] += p - (label == k)
        total += sum(map(abs, sums)) / n
    return total / classes


def test_classwise_matches_a_loop_and_adds_up_over_batches_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    cosines = 0.2 + 0.05 * torch.randn(400, 12, generator=generator)
    labels = torch.randint(12, (400,), generator=generator)
    gaps = classwise_gaps(cosines, labels, 50.0)
    expected = brute_classwise((50.0 * cosines.double()).softmax(1), labels)
    assert classwise_calibration_error(gaps, 400) == pytest.approx(expected, abs=1e-9)
    order = torch.randperm(400, generator=generator)
    parts = sum(classwise_gaps(cosines[part], labels[part], 50.0) for part in order.split(37))
    assert (parts == gaps).all()


def test_classwise_of_two_classes_is_the_binary_error():
    cosines, labels = torch.rand(200, 2), torch.randint(2, (200,))
    p = (9.0 * cosines.double()).softmax(1)
    expected = np.mean([expected_calibration_error(p[:, k], labels == k) for k in (0, 1)])
    assert classwise_calibration_error(classwise_gaps(cosines, labels, 9.0), 200) == pytest.approx(expected, abs=1e-9)


def test_classwise_refuses_what_has_no_number():
    with pytest.raises(ValueError, match="NaN or infinite"):
        classwise_gaps(torch.tensor([[0.1, math.nan]]), torch.tensor([0]), 100.0)
    with pytest.raises(ValueError, match="label 2 is outside"):
        classwise_gaps(torch.rand(1, 2), torch.tensor([2]), 100.0)
    with pytest.raises(ValueError, match="no images"):
        classwise_calibration_error(np.zeros((2, 15)), 0)


def direct_smooth_error(confidence, correct, width: float, points: int = 20_001) -> float:
    """The integral by quadrature, with the kernel as a sum over mirror images."""
    t = (np.arange(points) + 0.5) / points
    total = np.zeros(points)
    for p, y in zip(confidence, correct, strict=True):
        for image in (p + 2 * k for k in range(-4, 5)):
            total += (y - p) * (np.exp(-0.5 * ((t - image) / width) ** 2) + np.exp(-0.5 * ((t + image) / width) ** 2))
    return float(np.abs(total).mean() / (len(confidence) * width * math.sqrt(2 * math.pi)))


@pytest.mark.parametrize(("confidence", "correct"), [outcomes(60), tied(40), ([0.9], [0]), ([1.0, 0.0], [0, 1])])
def test_the_smooth_error_is_the_width_at_which_it_is_smoothed(confidence, correct):
    error = smooth_calibration_error(confidence, correct)
    assert direct_smooth_error(confidence, correct, error) == pytest.approx(error, abs=1e-5)


def test_the_smooth_error_of_a_perfect_model_is_nothing():
    assert smooth_calibration_error([1.0, 0.0, 1.0], [1, 0, 1]) == pytest.approx(0, abs=1e-8)


def test_aurc_matches_a_loop_and_the_mean_over_orders_of_ties():
    confidence, correct = outcomes(80)
    order = np.argsort(-confidence)
    errors = 1 - correct[order]
    expected = np.mean([errors[:n].mean() for n in range(1, 81)])
    assert aurc(confidence, correct) == pytest.approx(expected, abs=1e-12)
    # two of three share a confidence: (0 + ½ + ⅓)/3 and (1 + ½ + ⅓)/3 behind nothing, in equal shares
    assert aurc([0.5, 0.5, 0.2], [1, 0, 1]) == pytest.approx((0.5 + 0.5 + 1 / 3) / 3, abs=1e-12)
    values, hits = tied(40)
    rng, sums = np.random.default_rng(0), 0.0
    for _ in range(4000):
        shuffled = np.lexsort((rng.uniform(size=40), -values))
        sums += np.mean(np.cumsum(1 - hits[shuffled]) / np.arange(1, 41))
    assert aurc(values, hits) == pytest.approx(sums / 4000, abs=2e-3)


@pytest.mark.parametrize("measure", MEASURES)
def test_one_image_and_the_order_of_images(measure):
    wrong = measure([0.75], [0])
    assert wrong == pytest.approx(1.0 if measure is aurc else 0.75, abs=1e-3)
    confidence, correct = tied()
    order = np.random.default_rng(0).permutation(len(confidence))
    assert measure(confidence, correct) == pytest.approx(measure(confidence[order], correct[order]), abs=1e-13)
    assert measure(confidence, correct) == measure(torch.tensor(confidence), torch.tensor(correct))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([], [], "same shape"),
        ([0.5, math.nan], [1, 0], "not a probability"),
        ([0.5, 1.5], [1, 0], "not a probability"),
        ([0.5, 0.5], [1, 2], "neither 0 nor 1"),
        ([0.5, 0.5], [1, math.nan], "neither 0 nor 1"),
    ],
)
def test_what_has_no_number_is_refused(measure, confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        measure(confidence, correct)


def test_images_are_followed_from_their_first_bin():
    confidence, correct = outcomes()
    quantized = np.clip(confidence - 0.1, 0, 1)
    shifts = bin_shift(confidence, {"fp32": (confidence, correct), "quantized": (quantized, ~correct)}, 10)
    reference = reliability_bins(confidence, correct, 10)
    np.testing.assert_allclose(shifts["fp32"].confidence, reference.confidence)
    np.testing.assert_allclose(shifts["fp32"].accuracy, reference.accuracy)
    assert (shifts["fp32"].moved == np.diag(reference.images)).all()
    for bin_ in range(10):
        members = (confidence >= bin_ / 10) & (confidence < (bin_ + 1) / 10)
        assert shifts["quantized"].images[bin_] == members.sum() == shifts["quantized"].moved[bin_].sum()
        if members.any():
            assert shifts["quantized"].confidence[bin_] == pytest.approx(quantized[members].mean())
            assert shifts["quantized"].accuracy[bin_] == pytest.approx(1 - correct[members].mean())
            for to in range(10):
                there = (equal_width(quantized, 10) == to) & members
                assert shifts["quantized"].moved[bin_, to] == there.sum()
    assert np.isnan(bin_shift([0.5], {"a": ([0.5], [1])}, 10)["a"].confidence).sum() == 9
    with pytest.raises(ValueError, match="a has 1 images, the reference 300"):
        bin_shift(confidence, {"a": ([0.5], [1])})
    with pytest.raises(ValueError, match="same shape"):
        bin_shift([], {})


def test_a_temperature_moves_every_image_of_a_bin_one_way():
    generator = torch.Generator().manual_seed(0)
    cosines, labels = 0.05 * torch.randn(500, 6, generator=generator), torch.randint(6, (500,), generator=generator)
    hot, cold = (score_zero_shot(cosines, labels, scale) for scale in (30.0, 60.0))
    shift = bin_shift(hot.confidence, {"cold": (cold.confidence, cold.correct)})["cold"]
    assert (np.tril(shift.moved, -1) == 0).all()
