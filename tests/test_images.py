"""Runs on images without captions: a folder of them is all that post-training methods need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qatlab.config import Config, compose
from qatlab.data.embedded.sets import EmbeddedSet
from qatlab.evaluate import evaluate
from qatlab.fit import fit
from qatlab.results.rowfile import FIT, Row
from qatlab.results.run import Run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    images = EmbeddedSet("id", 32)
    for i in range(32):
        Image.fromarray(images[i][0].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return folder


def configured(options: list[str], photos: Path, folder: Path, *overrides: str) -> Config:
    kept = [option for option in options if not option.startswith("data.")]
    return compose(*kept, "data=images", f"data.path={photos}", f"output={folder}", *overrides)


def fits(run: Run) -> list[Row]:
    return [row for row in run.rows() if row["score"] == FIT]


def test_using_a2_post_training_calibrates_and_refits_on_a_folder_of_images(
    small_options: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = "callbacks.temperature.source=proxy"
    run = fit(configured(small_options, photos, tmp_path, "recipe=ptq", proxy), "ptq")
    said = capsys.readouterr().out
    assert "calibrating on 16 images of photos0" in said
    assert "on 16 images of photos0 and 16 class prompts, no labels" in said
    quantized = [row for row in run.rows() if row["stage"] == "quantized"]
    assert {row["data"] for row in quantized} == {"photos0"}
    [row] = fits(run)
    assert (row["n"], row["definition"] == "") == (16, False)
    assert {row["stage"] for row in run.rows()} >= {"fp32", "quantized", "temperature_proxy"}
    # The class prompts decide the fit: with others it is another one, which lies beside the first.
    config = configured(small_options, photos, tmp_path, proxy)
    config.checkpoint, config.suite.templates = str(run.folder), "a picture of a {}"
    evaluate(config, "evaluate")
    assert len({row["definition"] for row in fits(run)}) == 2
    assert set(json.loads((run.folder / "scales.json").read_text())) >= {
        f"{row['stage']}/{row['definition']}" for row in fits(run)
    }


def test_using_a2_a_student_imitates_its_teacher_on_a_folder_of_images(
    small_options: list[str], photos: Path, tmp_path: Path
) -> None:
    training = ["fit.steps=2", "fit.batch_size=8", "fit.eval_every=0", "objective={contrastive: 0, feature_mse: 1}"]
    options = [option for option in small_options if not option.startswith("fit.eval")]
    run = fit(
        configured(options, photos, tmp_path, "recipe=light_qat", "fit.unique_samples=null", *training), "light_qat"
    )
    assert {row["stage"] for row in run.rows()} >= {"fp32", "quantized", "adapted"}
