from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from qatlab.metrics.bins import reliability_bins
from qatlab.metrics.calibration import confidence_gap, expected_calibration_error, score_zero_shot, softmax_peak


def images(n: int = 400, classes: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cosines = 0.2 + 0.03 * torch.randn(n, classes, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    cosines[torch.arange(n), labels] += 0.03
    return cosines, labels


def brute_force_ece(confidence, correct, n_bins: int = 15) -> float:
    """Bins [lo, hi), the last one closed, image by image."""
    members: list[list[tuple[float, float]]] = [[] for _ in range(n_bins)]
    for value, hit in zip(confidence, correct, strict=True):
        members[min(int(float(value) * n_bins), n_bins - 1)].append((float(value), float(hit)))
    total = 0.0
    for bin_ in members:
        if bin_:
            total += abs(sum(v for v, _ in bin_) - sum(h for _, h in bin_)) / len(confidence)
    return total


@pytest.mark.parametrize("scale", [1.0, 37.5, 100.0, 1000.0])
def test_zero_shot_matches_a_formula_in_exact_order(scale):
    cosines, labels = images()
    scored = score_zero_shot(cosines, labels, scale)
    assert scored.confidence.dtype == scored.nll.dtype == torch.float64
    for i in range(0, len(labels), 7):
        logits = [scale * float(c) for c in cosines[i]]
        top = max(logits)
        normaliser = math.fsum(math.exp(z - top) for z in logits)
        assert float(scored.confidence[i]) == pytest.approx(1 / normaliser, rel=1e-12)
        assert float(scored.nll[i]) == pytest.approx(math.log(normaliser) + top - logits[labels[i]], abs=1e-11)
        assert int(scored.prediction[i]) == logits.index(top)
        assert bool(scored.correct[i]) == (logits.index(top) == int(labels[i]))


def test_zero_shot_matches_torch_over_many_blocks():
    cosines, labels = images(n=1500, classes=300)
    scored = score_zero_shot(cosines, labels, 100.0)
    logits = 100.0 * cosines.double()
    torch.testing.assert_close(scored.confidence, logits.softmax(1).amax(1), rtol=1e-12, atol=0)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(scored.nll, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("classes", [3, 10, 1000, 1003])
def test_an_images_numbers_do_not_depend_on_the_batch_it_comes_in(classes):
    cosines, labels = images(n=70, classes=classes)
    together = score_zero_shot(cosines, labels, 100.0)
    for batch in (1, 8, 33):
        parts = [score_zero_shot(c, y, 100.0) for c, y in zip(cosines.split(batch), labels.split(batch), strict=True)]
        for name in together._fields:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(together, name)), name


@pytest.mark.parametrize("label", [-1, 10, 99])
def test_a_label_outside_the_classes_is_named(label):
    cosines, labels = images()
    labels[5] = label
    with pytest.raises(ValueError, match=rf"label {label} is outside 0\.\.9 \(1 of 400"):
        score_zero_shot(cosines, labels, 100.0)


def test_no_scale_overflows():
    cosines = torch.tensor([[1.0, -1.0, 0.5], [0.3, 0.3, 0.3]])
    scored = score_zero_shot(cosines, torch.tensor([1, 2]), 1e6)
    assert scored.nll.tolist() == [pytest.approx(2e6), pytest.approx(math.log(3))]
    assert scored.confidence.tolist() == [1.0, pytest.approx(1 / 3)]
    assert torch.isfinite(softmax_peak(cosines, 1e-6).mass).all()


@pytest.mark.parametrize("scale", [10.0, 60.0, 100.0, 200.0])
def test_ece_matches_torchmetrics_and_brute_force(scale):
    cosines, labels = images(n=2000)
    scored = score_zero_shot(cosines, labels, scale)
    ece = expected_calibration_error(scored.confidence, scored.correct)
    assert ece == pytest.approx(brute_force_ece(scored.confidence, scored.correct), abs=1e-12)
    assert ece == float(binary_calibration_error(scored.confidence, scored.correct.long(), n_bins=15))
    # torchmetrics takes the multiclass confidence to float32
    multiclass = multiclass_calibration_error((scale * cosines.double()).softmax(1), labels, 10, n_bins=15)
    assert ece == pytest.approx(float(multiclass), abs=1e-6)


def test_ece_accepts_arrays_and_repeats_to_the_bit():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=999)
    correct = rng.uniform(size=999) < confidence**2
    ece = expected_calibration_error(confidence, correct)
    assert ece == expected_calibration_error(torch.tensor(confidence), torch.tensor(correct).double())
    assert ece == pytest.approx(brute_force_ece(confidence, correct), abs=1e-12)


def test_a_confidence_of_one_counts_in_the_last_bin():
    confidence, correct = [1.0, 0.96, 0.95, 1.0], [0, 1, 1, 1]
    # one bin: mean confidence 0.9775, accuracy 0.75; with a bin of their own the ones would give 0.2725
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.2275, abs=1e-12)
    bins = reliability_bins(confidence, correct)
    assert bins.images.tolist() == [0] * 14 + [4]


@pytest.mark.parametrize("bad", [-1e-9, 1.0001, 42.0, math.nan])
def test_ece_never_takes_values_for_logits(bad):
    with pytest.raises(ValueError, match=r"is not a probability \(1 of 3\)"):
        expected_calibration_error([0.5, bad, 0.6], [1, 0, 1])


@pytest.mark.parametrize(("confidence", "correct"), [([], []), ([0.5], [1, 0]), ([[0.5]], [[1]])])
def test_shapes_are_checked(confidence, correct):
    with pytest.raises(ValueError, match="same shape"):
        expected_calibration_error(confidence, correct)


def test_the_gap_is_signed():
    assert confidence_gap([0.9, 0.7], [1, 0]) == pytest.approx(0.3)
    assert confidence_gap([0.2, 0.4], [1, 0]) == pytest.approx(-0.2)


@pytest.mark.parametrize("n_bins", [1, 7, 15, 20])
def test_reliability_bins_add_up_to_the_ece(n_bins):
    rng = np.random.default_rng(1)
    confidence = np.concatenate([rng.uniform(0.3, 1, size=500), np.arange(0, n_bins + 1) / n_bins])
    correct = rng.uniform(size=len(confidence)) < 0.7
    bins = reliability_bins(confidence, correct, n_bins)
    assert bins.images.sum() == len(confidence)
    gaps = np.nansum(bins.images * np.abs(bins.accuracy - bins.confidence)) / len(confidence)
    assert gaps == pytest.approx(expected_calibration_error(confidence, correct, n_bins), abs=1e-12)
