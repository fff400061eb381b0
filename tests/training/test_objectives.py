"""Every objective against a formula in plain float64, and what an objective must be: minimal at the teacher."""

from __future__ import annotations

from dataclasses import asdict, fields

import numpy as np
import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from qatlab.config import ObjectiveConfig
from qatlab.core.errors import UserError
from qatlab.training.objectives import OBJECTIVES, Features, Objective, teacher_probabilities

CAPTIONS = ["a cat", "a dog", "a cat", "two cats", "a dog", "a cat"]


def unit(rows: int, seed: int, width: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


@pytest.fixture
def batch() -> Features:
    return Features(
        student=unit(6, 0),
        scale=torch.tensor(7.0, dtype=torch.float64),
        teacher=unit(6, 1),
        captions=unit(6, 2),
        bank=unit(9, 3),
        classes=unit(4, 4),
        labels=torch.tensor([0, 3, 1, 1, 2, 0]),
        caption_ids=torch.tensor([7, 4, 7, 9, 4, 7]),
        bias=torch.tensor(-3.0, dtype=torch.float64),
    )


def value(name: str, batch: Features) -> torch.Tensor:
    """One objective on a batch, given what its parameters name."""
    return Objective(ObjectiveConfig(**{name: 1.0}))(batch)[name]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def plain_contrastive(images: np.ndarray, texts: np.ndarray, scale: float, captions: list[str]) -> float:
    logits, total = scale * images @ texts.T, 0.0
    for table in (log_softmax(logits), log_softmax(logits.T)):
        for i, caption in enumerate(captions):
            equal = [j for j, other in enumerate(captions) if other == caption]
            total -= sum(table[i, j] for j in equal) / len(equal) / len(captions)
    return total / 2


def test_contrastive_shares_the_target_among_equal_captions(batch: Features) -> None:
    expected = plain_contrastive(batch.student.numpy(), batch.captions.numpy(), 7.0, CAPTIONS)
    # the shared targets, thirds among them, are float32
    assert float(value("contrastive", batch)) == pytest.approx(expected, rel=1e-7)


def test_contrastive_is_clips_own_loss_when_captions_differ(batch: Features) -> None:
    batch.caption_ids = torch.arange(6)
    expected = open_clip.loss.ClipLoss()(batch.student, batch.captions, batch.scale)
    assert float(value("contrastive", batch)) == pytest.approx(float(expected), rel=1e-12)


def test_sigmoid_is_siglips_own_loss_when_captions_differ(batch: Features) -> None:
    batch.caption_ids = torch.arange(6)
    expected = open_clip.loss.SigLipLoss()(batch.student, batch.captions, batch.scale, batch.bias)
    assert float(value("sigmoid", batch)) == pytest.approx(float(expected), rel=1e-12)


def test_sigmoid_counts_a_caption_that_is_equal_to_an_images_own_as_its_own(batch: Features) -> None:
    total, logits = 0.0, 7.0 * batch.student.numpy() @ batch.captions.numpy().T - 3.0
    for i, j in np.ndindex(6, 6):
        total += np.log1p(np.exp(-logits[i, j] if CAPTIONS[i] == CAPTIONS[j] else logits[i, j]))
    assert float(value("sigmoid", batch)) == pytest.approx(total / 6, rel=1e-12)


def test_kl(batch: Features) -> None:
    student, teacher = (log_softmax(7.0 * f.numpy() @ batch.bank.numpy().T) for f in (batch.student, batch.teacher))
    expected = (np.exp(teacher) * (teacher - student)).sum(axis=1).mean()
    assert float(value("kl", batch)) == pytest.approx(expected, rel=1e-12)


def test_feature_mse(batch: Features) -> None:
    cosine = (batch.student * batch.teacher).sum(1).numpy()
    assert float(value("feature_mse", batch)) == pytest.approx((2 - 2 * cosine).mean(), rel=1e-12)


def test_class_cross_entropy(batch: Features) -> None:
    table = log_softmax(7.0 * batch.student.numpy() @ batch.classes.numpy().T)
    expected = -np.mean([table[i, label] for i, label in enumerate(batch.labels.tolist())])
    assert float(value("class_cross_entropy", batch)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["kl", "feature_mse"])
def test_a_distillation_is_zero_and_minimal_where_the_student_is_the_teacher(batch: Features, name: str) -> None:
    assert batch.teacher is not None
    batch.student = batch.teacher.clone().requires_grad_()
    loss = value(name, batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert batch.student.grad.abs().max() < 1e-12
    for seed in range(10, 30):
        batch.student = normalize(batch.teacher + 0.05 * unit(6, seed), dim=-1)
        assert float(value(name, batch)) > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_reaches_every_student_feature(batch: Features, name: str) -> None:
    batch.student.requires_grad_()
    value(name, batch).backward()
    assert (batch.student.grad.abs().sum(1) > 0).all()


def test_every_objective_has_an_option_and_every_option_an_objective() -> None:
    assert [entry.name for entry in fields(ObjectiveConfig)] == [*OBJECTIVES, "extra"]


def test_a_mix_is_the_weighted_sum_of_its_terms_alone(batch: Features) -> None:
    objective = Objective(ObjectiveConfig(contrastive=0.25, kl=2.0))
    terms = objective(batch)
    assert list(terms) == ["contrastive", "kl", "loss"]
    assert float(terms["loss"]) == pytest.approx(float(0.25 * terms["contrastive"] + 2.0 * terms["kl"]), rel=1e-12)
    assert str(objective) == "0.25 contrastive + 2 kl"
    assert "kl" in objective
    assert "feature_mse" not in objective


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_distillation_needs_the_teacher(name: str) -> None:
    assert Objective(ObjectiveConfig(**{name: 1.0})).needs_teacher == (name in ("kl", "feature_mse"))


def test_no_weight_is_refused() -> None:
    with pytest.raises(UserError, match=r"no objective.*objective\.contrastive"):
        Objective(ObjectiveConfig())
    assert not any(asdict(ObjectiveConfig()).values())


def test_teacher_probabilities_are_a_softmax_in_float64() -> None:
    features, texts = unit(6, 0, dtype=torch.float32), unit(9, 1, dtype=torch.float32)
    logits = 50.0 * features.numpy().astype(np.float64) @ texts.numpy().astype(np.float64).T
    found = teacher_probabilities(features, texts, 50.0)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), np.exp(log_softmax(logits)), rtol=1e-12)
