"""SigLIP's objective in training: its bias and scale, learned from scratch, and constants where a student is adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import open_clip
import pytest
import siglip
import torch
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from qatlab.config import ModelConfig, compose
from qatlab.core.errors import UserError
from qatlab.models import clip as clips
from qatlab.models import tokenizers
from qatlab.training.student import Student

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning", "ignore::FutureWarning:lightning")
MODEL = ModelConfig(siglip.NAME, quick_gelu=False, preprocess="openai")


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> clips.Clip:
    monkeypatch.setattr(tokenizers, "find_spec", lambda name: True)
    monkeypatch.setattr(tokenizers, "HFTokenizer", lambda *_, **__: None)
    siglip.register(tmp_path)
    torch.manual_seed(0)
    return clips.load(MODEL, from_scratch=True)


@pytest.fixture
def batch() -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=drawn)
    return {"images": images, "caption_ids": torch.arange(6), "tokens": torch.randint(0, 50, (6, 8), generator=drawn)}


def student(clip: clips.Clip, *overrides: str) -> Student:
    config = compose("recipe=fp32", "fit.steps=1", "fit.lr=1e-3", "objective.sigmoid=1", *overrides)
    return Student(config, clip, clip.visual)


def train(module: Student, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one step, and the gradients of the parameters that have one."""
    found: dict[str, torch.Tensor] = {}

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            found.update({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})

    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Watch()],
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    return float(trainer.callback_metrics["train/sigmoid"]), found


def expected(clip: clips.Clip, batch: dict[str, Any]) -> torch.Tensor:
    """open_clip's own loss of the model as it is."""
    model: Any = clip.model
    images = normalize(clip.visual(clip.preprocess.normalize(batch["images"])), dim=-1)
    texts = model.encode_text(batch["tokens"], normalize=True)
    loss: torch.Tensor = open_clip.loss.SigLipLoss()(images, texts, model.logit_scale.exp(), model.logit_bias)
    return loss


@pytest.mark.parametrize("micro_batch", [6, 4])
def test_from_scratch_scale_and_bias_learn_as_open_clip_has_it(
    clip: clips.Clip, batch: dict[str, Any], micro_batch: int
) -> None:
    assert (clip.logit_bias, clip.facts["logit_bias"]) == (-10, -10)
    loss = expected(clip, batch)
    model: Any = clip.model
    names = [name for name, _ in model.named_parameters()]
    wanted = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    module = student(clip, "fit.from_scratch=true", f"fit.micro_batch={micro_batch}")
    value, gradients = train(module, batch)
    assert value == pytest.approx(float(loss.detach()), rel=1e-5)
    # The image tower is a part of both: torch names its parameters once, as the student's.
    found = {name.removeprefix("both_towers."): of for name, of in gradients.items()}
    assert found.keys() == wanted.keys()
    for name, of in wanted.items():
        torch.testing.assert_close(found[name].reshape(of.shape), of, rtol=1e-4, atol=1e-5)
    assert module.logit_bias == float(model.logit_bias.detach()) != -10


def test_a_student_is_adapted_with_the_models_own_scale_and_bias(clip: clips.Clip, batch: dict[str, Any]) -> None:
    module, loss = student(clip), expected(clip, batch)
    value, gradients = train(module, batch)
    assert value == pytest.approx(float(loss.detach()), rel=1e-5)
    assert {name.partition(".")[0] for name in gradients} == {"visual"}
    assert (module.logit_bias, float(clip.model.logit_bias)) == (-10, -10)  # type: ignore[union-attr, arg-type]


def test_a_checkpoint_brings_the_bias_back(clip: clips.Clip) -> None:
    module = student(clip, "fit.from_scratch=true")
    clip.model.logit_bias.data.fill_(-4.5)  # type: ignore[union-attr, operator]
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert module.logit_bias == -10
    module.on_load_checkpoint(checkpoint)
    assert module.logit_bias == -4.5


def test_a_model_without_a_bias_is_told() -> None:
    clip = clips.load(ModelConfig())
    assert (clip.logit_bias, "logit_bias" in clip.facts) == (None, False)
    with pytest.raises(UserError, match=r"objective\.sigmoid needs a logit bias, which tiny does not have"):
        student(clip)
