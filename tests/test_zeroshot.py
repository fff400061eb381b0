"""suite.zeroshot=sigmoid through the programs: what rows, files, cards and exports hold, and what is refused."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import polars as pl
import pytest
import torch
from PIL import Image

from qatlab.config import Config, deciding
from qatlab.core.errors import UserError
from qatlab.evaluate import evaluate
from qatlab.export import export
from qatlab.metrics.calibration import expected_calibration_error
from qatlab.models import clip as clips
from qatlab.reports.table import SIGMOID
from qatlab.results.identity import evaluation_id, run_id
from qatlab.results.run import Run

BIAS = -9.0
SIGMOIDS = ["suite.zeroshot=sigmoid", "callbacks.temperature=null", "callbacks.refits.kinds=[isotonic]"]
Options = Callable[..., Config]


@contextlib.contextmanager
def biased() -> Any:
    """Within it the tiny model has a logit bias, as a SigLIP has."""
    load = clips.load

    def loaded(*arguments: Any, **options: Any) -> clips.Clip:
        clip = load(*arguments, **options)
        return replace(clip, logit_bias=BIAS, facts={**clip.facts, "logit_bias": BIAS})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "load", loaded)
        yield


@pytest.fixture(scope="module")
def run(small_fit: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of seven bits, which every machine multiplies exactly, whose model has a bias, scored by sigmoids."""
    with biased():
        return small_fit("ptq", tmp_path_factory.mktemp("runs"), "quant.weight.bits=7", *SIGMOIDS)


def asked(small: Options, run: Run, *overrides: str) -> Config:
    return small("fp32", f"checkpoint={run.folder}", f"output={run.folder.parent}", *overrides)


def predictions(run: Run, stage: str) -> pl.DataFrame:
    return pl.read_parquet(run.folder / "predictions" / f"{stage}.parquet")


def test_rows_state_it_and_hold_the_calibration_of_the_largest_sigmoid(run: Run) -> None:
    rows = run.rows()
    found = {row["score"]: row.get("zeroshot") for row in rows}
    assert {score for score, stated in found.items() if stated} == {"zero_shot", "refit_none", "refit_isotonic"}
    assert found["msp"] is None  # an OOD score is what it is by its definition
    assert {row["logit_bias"] for row in rows} == {BIAS}
    for stage in ("fp32", "quantized"):
        scored = predictions(run, stage).filter(pl.col("dataset") == "id")
        # MaxLogit is the cosine to the top class.
        logits = scored["logit_scale"].to_numpy() * scored["max_logit"].to_numpy() + BIAS
        np.testing.assert_allclose(scored["confidence"].to_numpy(), 1 / (1 + np.exp(-logits)), rtol=1e-12)
        assert set(scored["logit_bias"]) == {BIAS}
        row = next(r for r in rows if (r["stage"], r["dataset"], r["score"]) == (stage, "id", "zero_shot"))
        ece = expected_calibration_error(scored["confidence"].to_numpy(writable=True), scored["correct"].to_list())
        assert row["metrics"]["ece"] == pytest.approx(ece, rel=1e-12)
        assert row["metrics"]["nll"] == pytest.approx(scored["nll"].mean(), rel=1e-12)
        unlabelled = predictions(run, stage).filter(pl.col("dataset") == "near_ood")
        logits = unlabelled["logit_scale"].to_numpy() * unlabelled["max_logit"].to_numpy() + BIAS
        np.testing.assert_allclose(unlabelled["confidence"].to_numpy(), 1 / (1 + np.exp(-logits)), rtol=1e-12)


def test_the_same_run_by_a_softmax_has_rows_of_its_own(
    run: Run, small: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    by_sigmoid = run.rows()
    capsys.readouterr()
    with biased():
        evaluate(asked(small, run, "callbacks.temperature=null"), "evaluate")
    assert "zeroshot=sigmoid" not in capsys.readouterr().out
    added = run.rows()[len(by_sigmoid) :]
    assert added
    assert not any("zeroshot" in row for row in added)

    def of(rows: list[dict[str, Any]], score: str) -> dict[str, float]:
        return next(r["metrics"] for r in rows if (r["stage"], r["score"]) == ("quantized", score))

    assert of(added, "zero_shot")["top1"] == of(by_sigmoid, "zero_shot")["top1"]
    assert of(added, "zero_shot")["ece"] != of(by_sigmoid, "zero_shot")["ece"]
    for score in ("msp", "energy", "max_logit", "mcm"):
        assert of(added, score) == of(by_sigmoid, score)
    # Asked again, nothing is scored: each way has its definition.
    with biased():
        evaluate(asked(small, run, *SIGMOIDS), "evaluate")
    assert len(run.rows()) == len(by_sigmoid) + len(added)
    printed = " ".join(capsys.readouterr().out.split())
    assert SIGMOID in printed


def told_by_example(folder: Path, photo: Path, session: Any, monkeypatch: Any, capsys: Any) -> dict[str, list[float]]:
    """{class: the probability that examples/classify.py prints, that of the file's own second output}."""
    script = Path(__file__).resolve().parents[1] / "examples" / "classify.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(folder), str(photo), "--top", "16"])
    capsys.readouterr()
    example = runpy.run_path(str(script), run_name="__main__")
    printed = re.findall(r"^ +([\d.]+) % +(\S.*)$", capsys.readouterr().out, re.MULTILINE)
    with Image.open(photo) as image:
        pixels = example["prepare"](image, json.loads((folder / "export.json").read_text())["preprocess"])
    (probabilities,) = session.run(["probabilities"], {session.get_inputs()[0].name: pixels[None]})[0]
    names = np.load(folder / "classes.npz")["id.names"].tolist()
    return {name: [float(share) / 100, float(probabilities[names.index(name)])] for share, name in printed}


@pytest.mark.slow
def test_an_export_has_the_sigmoids_and_another_one_is_refused(
    run: Run, small: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with biased():
        folder = export(asked(small, run, "format=onnx", "probabilities=true", *SIGMOIDS), "evaluate")
        about = json.loads((folder / "export.json").read_text())
        assert (about["zeroshot"], about["logit_bias"]) == ("sigmoid", BIAS)
        assert "sigmoid of" in (folder / "README.md").read_text()
        pixels = np.random.default_rng(0).standard_normal((3, 3, 64, 64), dtype=np.float32)
        session = onnxruntime.InferenceSession(folder / about["file"])
        features, probabilities = (np.float64(x) for x in session.run(None, {session.get_inputs()[0].name: pixels}))
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        logits = about["logit_scale"] * features @ np.load(folder / "classes.npz")["id"].T + BIAS
        np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-4)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
            tmp_path / "photo.png"
        )
        told = told_by_example(folder, tmp_path / "photo.png", session, monkeypatch, capsys)
        assert len(told) == 16
        for shown, served in told.values():
            assert shown == pytest.approx(served, abs=6e-4)
        rows = [row for row in run.rows() if row["stage"] == "integer_onnx" and row["score"] == "zero_shot"]
        assert {(row["zeroshot"], row["logit_bias"]) for row in rows} == {("sigmoid", BIAS)}
        evaluate(asked(small, run, f"checkpoint={folder}", *SIGMOIDS), "evaluate")
        export(asked(small, run, "format=onnx", "callbacks.temperature=null"), "evaluate")  # by a softmax
        with pytest.raises(
            UserError, match=r"suite\.zeroshot=sigmoid, and the export integer_onnx of run \w+ was made"
        ):
            evaluate(asked(small, run, f"checkpoint={folder}", *SIGMOIDS), "evaluate")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("callbacks.temperature.source=proxy", r"Set callbacks\.temperature=null\.$"),
        ("callbacks.refits.kinds=[temperature]", r"Set callbacks\.refits\.kinds=\[isotonic\]\.$"),
    ],
)
def test_refits_of_a_softmax_are_refused(override: str, told: str, small: Options, tmp_path: Path) -> None:
    others = [option for option in SIGMOIDS if not override.startswith(option.partition("=")[0])]
    with biased(), pytest.raises(UserError, match=told):
        evaluate(small("fp32", f"output={tmp_path}", *others, override), "evaluate")


def test_all_that_is_to_be_set_is_told_at_once(small: Options, tmp_path: Path) -> None:
    told = r"Set callbacks\.temperature=null and callbacks\.refits\.kinds=\[isotonic\]\.$"
    given = ("callbacks.temperature.source=proxy", "callbacks.refits.kinds=[temperature]")
    with biased(), pytest.raises(UserError, match=told):
        evaluate(small("fp32", f"output={tmp_path}", SIGMOIDS[0], *given), "evaluate")


def test_a_model_without_a_bias_is_refused(small: Options, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"suite\.zeroshot=sigmoid needs the logit bias .* and tiny has none"):
        evaluate(small("fp32", f"output={tmp_path}", *SIGMOIDS), "evaluate")


def test_the_option_changes_no_id_of_a_run_and_none_at_its_default(small: Options) -> None:
    plain, by_sigmoid = small("ptq"), small("ptq", "suite.zeroshot=sigmoid")
    assert run_id(plain) == run_id(by_sigmoid)
    assert "zeroshot" not in deciding(plain.suite)
    assert evaluation_id(plain) != evaluation_id(by_sigmoid)


def test_a_probe_reads_the_sigmoids(small: Options) -> None:
    from qatlab.training.student import Student

    with biased():
        clip = clips.load(small("ptq").model)
    for zeroshot, bias in (("sigmoid", BIAS), ("softmax", None)):
        student = Student(small("ptq", f"suite.zeroshot={zeroshot}"), clip, torch.nn.Identity())
        assert [view.logit_bias for view in student.views] == [bias]
