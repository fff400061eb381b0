"""Zero-shot numbers of a sigmoid for each class, against the formula in a loop, open_clip's loss and transformers' model."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from qatlab.metrics.calibration import score_zero_shot
from qatlab.metrics.classwise import classwise_gaps
from qatlab.metrics.ood import energy, max_logit, msp
from qatlab.metrics.sigmoid import score_sigmoid, top_sigmoid

SCALE, BIAS = 112.0, -16.5  # about those of SigLIP B/16


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def cosines() -> torch.Tensor:
    return 0.1 + 0.05 * torch.randn(40, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(7, (40,), generator=torch.Generator().manual_seed(1))


def test_every_number_is_that_of_a_loop(cosines: torch.Tensor, labels: torch.Tensor) -> None:
    found = score_sigmoid(cosines, labels, SCALE, BIAS)
    for i, (row, label) in enumerate(zip(cosines.double().tolist(), labels.tolist(), strict=True)):
        p = [sigmoid(SCALE * c + BIAS) for c in row]
        truth = [float(k == label) for k in range(7)]
        assert float(found.confidence[i]) == pytest.approx(max(p), rel=1e-12)
        assert int(found.prediction[i]) == p.index(max(p))
        answers = [of if y else 1 - of for of, y in zip(p, truth, strict=True)]
        assert float(found.nll[i]) == pytest.approx(-math.fsum(map(math.log, answers)), rel=1e-9)
        assert float(found.brier[i]) == pytest.approx(
            sum((of - y) ** 2 for of, y in zip(p, truth, strict=True)), rel=1e-9
        )
    assert bool((found.confidence < 1).all())


def test_the_nll_is_open_clips_loss_of_as_many_texts_as_images() -> None:
    drawn = torch.Generator().manual_seed(2)
    images, texts = (normalize(torch.randn(9, 16, generator=drawn, dtype=torch.float64), dim=-1) for _ in range(2))
    found = score_sigmoid(images @ texts.T, torch.arange(9), 12.0, -3.0)
    loss = open_clip.loss.SigLipLoss()(images, texts, torch.tensor(12.0), torch.tensor(-3.0))
    assert float(found.nll.mean()) == pytest.approx(float(loss), rel=1e-12)


def test_what_the_cosines_decide_is_as_under_a_softmax(cosines: torch.Tensor, labels: torch.Tensor) -> None:
    of_softmax, found = score_zero_shot(cosines, labels, SCALE), score_sigmoid(cosines, labels, SCALE, BIAS)
    for name in ("prediction", "correct", "rank"):
        assert torch.equal(getattr(found, name), getattr(of_softmax, name))


def test_certain_images_keep_finite_and_exact_numbers() -> None:
    found = score_sigmoid(torch.tensor([[1.0, -1.0], [1.0, -1.0]]), torch.tensor([0, 1]), 1000.0, -10.0)
    assert found.nll.tolist() == pytest.approx([math.exp(-990), 990 + 1010], rel=1e-12)
    assert found.brier.tolist() == pytest.approx([0, 2])
    with pytest.raises(ValueError, match="NaN or infinite"):
        score_sigmoid(torch.tensor([[math.nan, 0.1]]), torch.tensor([0]), 10.0, -1.0)


def test_classwise_gaps_are_those_of_a_loop(cosines: torch.Tensor, labels: torch.Tensor) -> None:
    gaps = [[0.0] * 15 for _ in range(7)]
    for row, label in zip(cosines.double().tolist(), labels.tolist(), strict=True):
        for k, c in enumerate(row):
            p = sigmoid(SCALE * c + BIAS)
            gaps[k][min(int(p * 15), 14)] += p - (k == label)
    found = classwise_gaps(cosines, labels, SCALE, logit_bias=BIAS)
    assert torch.from_numpy(found) == pytest.approx(torch.tensor(gaps, dtype=torch.float64), abs=1e-7)


def test_no_ood_score_needs_the_bias(cosines: torch.Tensor) -> None:
    """With it in every logit, MSP stays, Energy and MaxLogit move by a constant, and the largest sigmoid ranks as MaxLogit."""
    shifted = cosines.double() + BIAS / SCALE
    torch.testing.assert_close(msp(shifted, SCALE), msp(cosines.double(), SCALE))
    for score in (lambda c: energy(c, SCALE), max_logit):
        moved = score(shifted) - score(cosines.double())
        torch.testing.assert_close(moved, torch.full_like(moved, BIAS / SCALE))
    largest = top_sigmoid(cosines.amax(dim=1), SCALE, BIAS)
    assert largest.argsort().tolist() == max_logit(cosines).argsort().tolist()


def test_probabilities_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    sides = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config={**sides, "vocab_size": 20, "max_position_embeddings": 5, "projection_size": 16},
        vision_config={**sides, "image_size": 8, "patch_size": 4},
    )
    model = transformers.SiglipModel(config).double().eval()
    model.logit_scale.data.fill_(2.0)
    model.logit_bias.data.fill_(-1.5)
    pixels = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        found = model(input_ids=torch.randint(20, (4, 5)), pixel_values=pixels)
        expected = found.logits_per_image.sigmoid()
        cosines = normalize(found.image_embeds, dim=-1) @ normalize(found.text_embeds, dim=-1).T
    scored = score_sigmoid(cosines, torch.zeros(6, dtype=torch.int64), math.exp(2), -1.5)
    torch.testing.assert_close(scored.confidence, expected.amax(dim=1), rtol=1e-9, atol=0)
