from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, log_loss, top_k_accuracy_score

from qatlab.metrics.accuracy import mean_per_class_accuracy, top_k_accuracy
from qatlab.metrics.calibration import score_zero_shot


def images(n: int = 600, classes: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    cosines = 0.2 + 0.03 * torch.randn(n, classes, generator=generator)
    cosines[torch.arange(n), labels] += 0.03
    return cosines, labels


def test_the_pass_matches_sklearn():
    cosines, labels = images()
    scored = score_zero_shot(cosines, labels, 100.0)
    probabilities = (100.0 * cosines.double()).softmax(1).numpy()
    for k in range(1, 9):
        expected = top_k_accuracy_score(labels, probabilities, k=k, labels=range(9))
        assert top_k_accuracy(scored.rank, k) == pytest.approx(expected, abs=1e-12)
    assert float((scored.rank < 5).double().mean()) == top_k_accuracy(scored.rank, 5)
    assert float(scored.correct.double().mean()) == top_k_accuracy(scored.rank, 1)
    assert float(scored.nll.mean()) == pytest.approx(log_loss(labels, probabilities), abs=1e-12)
    brier = brier_score_loss(labels, probabilities, labels=list(range(9)), scale_by_half=False)
    assert float(scored.brier.mean()) == pytest.approx(brier, abs=1e-12)


@pytest.mark.parametrize("classes", [1, 3, 200])
def test_rank_and_brier_match_a_loop_with_ties(classes):
    generator = torch.Generator().manual_seed(1)
    cosines = (torch.randint(4, (40, classes), generator=generator) / 8).float()
    labels = torch.randint(classes, (40,), generator=generator)
    scored = score_zero_shot(cosines, labels, 3.0)
    for i in range(40):
        order = sorted(range(classes), key=lambda k: (-float(cosines[i, k]), k))
        assert int(scored.rank[i]) == order.index(int(labels[i]))
        assert int(scored.prediction[i]) == order[0]
        powers = [math.exp(3.0 * float(c)) for c in cosines[i]]
        p = [value / math.fsum(powers) for value in powers]
        brier = math.fsum((p[k] - (k == int(labels[i]))) ** 2 for k in range(classes))
        assert float(scored.brier[i]) == pytest.approx(brier, abs=1e-12)
    assert (scored.correct == (scored.rank == 0)).all()
    assert (scored.brier >= 0).all()


def test_no_image_gives_no_rows_and_a_nan_is_refused():
    empty = score_zero_shot(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 100.0)
    assert [len(column) for column in empty] == [0] * 6
    cosines, labels = images(5000, 100)
    cosines[[3, 4000], 2] = math.nan
    cosines[4001, 5] = math.inf
    with pytest.raises(ValueError, match="3 of 5000 images have cosines that are NaN or infinite"):
        score_zero_shot(cosines, labels, 100.0)


def test_memory_of_the_pass_is_that_of_a_block(monkeypatch):
    sizes = []
    original = torch.empty

    def recorded(*shape, **options):
        out = original(*shape, **options)
        sizes.append(out.numel() * out.element_size())
        return out

    monkeypatch.setattr(torch, "empty", recorded)
    cosines, labels = images(4000, 1000)
    score_zero_shot(cosines, labels, 100.0)
    assert sum(sizes) < 4 * 2**20


def test_mean_per_class_matches_sklearn():
    cosines, labels = images()
    keep = labels != 4
    cosines, labels = cosines[keep], labels[keep]
    scored = score_zero_shot(cosines, labels, 100.0)
    hit = torch.where(scored.correct, labels, -1)
    with pytest.warns(UserWarning, match="y_pred contains classes"):
        expected = balanced_accuracy_score(labels, hit)
    assert mean_per_class_accuracy(scored.correct, labels) == pytest.approx(expected, abs=1e-12)
    assert mean_per_class_accuracy([1, 0, 1], [7, 7, 2]) == 0.75
    assert mean_per_class_accuracy([True], [0]) == 1.0


@pytest.mark.parametrize("bad", [[], [math.nan], [[1]]])
def test_what_has_no_number_is_refused(bad):
    with pytest.raises(ValueError, match=r"needs the shape \(N,\)"):
        top_k_accuracy(bad)
    with pytest.raises(ValueError, match=r"needs the shape \(N,\)"):
        mean_per_class_accuracy(bad, np.zeros(1))
    with pytest.raises(ValueError, match="same shape"):
        mean_per_class_accuracy([1, 0], [1])
    with pytest.raises(ValueError, match="0 or more"):
        top_k_accuracy([-1])
