"""What does not go together is told before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatlab.config import Config, compose
from qatlab.core.errors import UserError
from qatlab.core.signals import StopSignals
from qatlab.models import clip as clips
from qatlab.results.run import Run
from qatlab.stages.opening import open_experiment

IMAGES = ["data=images", "data.path=photos"]
SUITE = ["suite=folders", "+suite.sets.birds={path: birds, role: id}"]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were loaded."""
    found: list[str] = []

    def load(config: object, from_scratch: bool = False) -> None:
        found.append(str(config))
        raise LookupError

    monkeypatch.setattr(clips, "load", load)
    return found


def opened(config: Config) -> None:
    config.trainer.accelerator = "cpu"
    with StopSignals() as stop:
        open_experiment(config, Run(config, "test"), "test", stop)


def refused(tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as told:
        opened(compose(f"output={tmp_path}", "wandb.mode=disabled", *overrides))
    return str(told.value)


def accepted(tmp_path: Path, *overrides: str) -> None:
    with pytest.raises(LookupError):
        opened(compose(f"output={tmp_path}", "wandb.mode=disabled", *overrides))


def test_using_b1_a_real_model_without_a_suite_is_told_the_ways(tmp_path: Path, loaded: list[str]) -> None:
    told = refused(tmp_path, "recipe=fp32", "model=vit_b16_openai")
    assert "suite=embedded" in told
    assert "suite=paper suite.root=FOLDER" in told
    assert "suite=folders" in told
    assert "data=" not in told  # nothing is calibrated
    assert loaded == []


def test_using_a2_a_real_model_is_not_calibrated_on_the_toy_world(tmp_path: Path, loaded: list[str]) -> None:
    told = refused(tmp_path, "recipe=ptq", "model=vit_b16_openai", *SUITE)
    assert "data=images data.path=FOLDER" in told
    assert "suite=embedded" not in told
    both = refused(tmp_path, "recipe=light_qat", "model=vit_b16_openai")
    assert "suite=paper" in both
    assert "data=images" in both
    proxy = "callbacks.temperature.source=proxy"
    assert "data=images" in refused(tmp_path, "recipe=fp32", "model=vit_b16_openai", *SUITE, proxy)
    assert loaded == []


def test_using_a2_what_goes_together_is_not_refused(tmp_path: Path, loaded: list[str]) -> None:
    accepted(tmp_path, "recipe=ptq", "model=vit_b16_openai", *SUITE, *IMAGES)
    accepted(tmp_path, "recipe=fp32", "model=vit_b16_openai", *SUITE)
    accepted(tmp_path, "recipe=ptq")
    accepted(tmp_path, "recipe=ptq", *IMAGES)
    accepted(tmp_path, "recipe=light_qat", *IMAGES, "objective={contrastive: 0, feature_mse: 1}")
    bank = tmp_path / "bank.safetensors"
    bank.touch()
    accepted(tmp_path, "recipe=light_qat", *IMAGES, "objective={contrastive: 0, kl: 1}", f"data.text_bank={bank}:words")
    assert len(loaded) == 6


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["recipe=light_qat"], ["objective.contrastive needs captions", "objective.feature_mse"]),
        (["recipe=light_qat", "objective={contrastive: 0, kl: 1}"], ["objective.kl needs captions", "data.text_bank"]),
        (["recipe=ptq", "quant.tower=both"], ["quant.tower=both calibrates the text tower on captions"]),
    ],
)
def test_using_a2_what_needs_captions_is_refused_of_images_without(
    tmp_path: Path, loaded: list[str], overrides: list[str], words: list[str]
) -> None:
    told = refused(tmp_path, *overrides, *IMAGES)
    for word in words:
        assert word in told
    assert loaded == []
