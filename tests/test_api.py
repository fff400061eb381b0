"""What programs and notebooks use: the names that qatlab shows, the examples in docstrings and docs, and the notebook."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import polars as pl
import pytest
import torch

import qatlab
from qatlab import api
from qatlab.core.errors import UserError
from qatlab.data.preprocess import Preprocess
from qatlab.results.run import Run

ROOT = Path(__file__).resolve().parents[1]


def test_qatlab_shows_its_api_and_nothing_else() -> None:
    assert sorted(dir(qatlab)) == sorted([*api.__all__, "__version__"])
    assert qatlab.__all__ == dir(qatlab)
    for name in api.__all__:
        assert getattr(qatlab, name) is getattr(api, name)
        assert getattr(api, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'fitt'"):
        _ = qatlab.fitt


def test_the_examples_in_docstrings_hold() -> None:
    failed, tried = doctest.testmod(api)
    assert (failed, tried > 10) == (0, True)


def test_the_examples_in_the_docs_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(str(ROOT / "docs/API.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert (failed, tried > 10) == (0, True)


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples/quickstart.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    small = code.replace("suite.images=256", "suite.images=16").replace("suite.resamples=200", "suite.resamples=10")
    assert small.count("suite.images=16") == 2
    names: dict[str, object] = {}
    exec(compile(small, "quickstart.ipynb", "exec"), names)
    images = names["images"]
    assert isinstance(images, torch.Tensor)
    model, run = names["model"], names["run"]
    assert isinstance(run, qatlab.FinishedRun)
    with torch.no_grad():
        expected = qatlab.load_quantized(run.folder)(images)
        torch.testing.assert_close(model.encode_image(images), expected, rtol=0, atol=0)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def folder(small_fit, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    run: Run = small_fit("light_qat_lsq", tmp_path_factory.mktemp("api"))
    return run.folder


def test_a_run_is_opened_without_its_lock_and_left_as_it_is(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run = qatlab.open_run(folder)
    assert (run.recipe, run.id) == ("light_qat_lsq", folder.name[-8:])
    assert run.config.fit.steps == 2
    assert {row["stage"] for row in run.rows()} == {"fp32", "quantized", "adapted", "temperature", "probe"}
    assert run.frame().shape[0] == len(run.rows()) <= len(run.rows(every=True))
    predicted = run.predictions("adapted").filter(pl.col("dataset") == "id")
    row = next(
        row for row in run.rows() if (row["stage"], row["dataset"], row["score"]) == ("adapted", "id", "zero_shot")
    )
    assert predicted["correct"].mean() == row["metrics"]["top1"]
    assert "output_sqnr_db" in run.layers().columns
    assert run.curves()["step"].to_list() == [0, 1, 2]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(UserError, match=r"has no predictions of the stage 'adpated' \(did you mean 'adapted'\?\)"):
        run.predictions("adpated")
    with pytest.raises(
        UserError, match=r"left no image tower of the stage 'trained'; there are fp32, quantized, adapted"
    ):
        run.encoder("trained")
    with pytest.raises(UserError, match=r"config\.yaml is not there"):
        qatlab.open_run(folder / "curves")


def test_features_are_those_of_the_stage(folder: Path) -> None:
    run = qatlab.open_run(folder)
    clip = qatlab.load_clip()
    suite = qatlab.load_suite(clip, "suite.images=32")
    full, quantized, last = (qatlab.features(run, "id", stage) for stage in ("fp32", "quantized", None))
    torch.testing.assert_close(full, qatlab.embed(clip.visual, suite["id"], clip.preprocess))
    assert full.shape == quantized.shape == (32, 64)
    assert not torch.equal(full, quantized)
    assert not torch.equal(quantized, last)
    classes, labels = suite.heads["id"].classes.features, suite["id"].labels
    scored = qatlab.score_zero_shot(last @ classes.T, labels, clip.logit_scale)
    row = next(
        row for row in run.rows() if (row["stage"], row["dataset"], row["score"]) == ("adapted", "id", "zero_shot")
    )
    assert scored.correct.double().mean() == row["metrics"]["top1"]


def test_what_does_not_fit_is_told() -> None:
    clip = qatlab.load_clip()
    images = torch.zeros(1, 3, clip.preprocess.size, clip.preprocess.size)
    with pytest.raises(UserError, match="wieght is not an option of quant"):
        qatlab.quantize_model(clip.visual, images, wieght=None)
    with pytest.raises(UserError, match=r"the suite has no set 'ids' \(did you mean 'id'\?\)"):
        _ = qatlab.load_suite(clip, "suite.images=8")["ids"]
    assert isinstance(clip.preprocess, Preprocess)
