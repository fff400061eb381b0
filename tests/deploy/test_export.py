"""From a run to an exported folder, and what is done with one."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import polars as pl
import pytest
import torch
from PIL import Image

from qatlab import deploy
from qatlab.config import Config
from qatlab.deploy import package as packaging
from qatlab.deploy.parity import LayerParity
from qatlab.deploy.tower import DeployedTower
from qatlab.errors import UserError
from qatlab.evaluate import evaluate
from qatlab.export import export
from qatlab.quantized import load_quantized
from qatlab.results import Run

ROOT = Path(__file__).resolve().parents[2]
Options = Callable[..., Config]
Fit = Callable[..., Run]


@pytest.fixture(scope="module")
def run(small_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_fit("light_qat_lsq_pc", tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def exported(run: Run, small: Options, said: io.StringIO) -> Path:
    with contextlib.redirect_stdout(said):
        return export(asked(small, run, "format=onnx"), "evaluate")


def asked(small: Options, run: Run, *overrides: str) -> Config:
    return small("fp32", f"checkpoint={run.folder}", f"output={run.folder.parent}", *overrides)


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text())


def test_the_folder_holds_all_that_is_needed(run: Run, exported: Path, said: io.StringIO) -> None:
    assert exported == run.folder / "export" / "onnx"
    assert {path.name for path in exported.iterdir()} == {
        *("model.onnx", "classes.npz", "export.json", "parity.csv", "README.md", "card.json"),
    }
    found = about(exported)
    assert (found["format"], found["file"], found["opset"]) == ("onnx", "model.onnx", 21)
    assert found["integer_layers"] == len(found["layers"]) == 16
    assert found["end_to_end"]["integer"] <= 1.3 * found["end_to_end"]["simulated"]
    assert "16 of 16 layers in integers" in said.getvalue()
    layers = pl.read_csv(exported / "parity.csv")
    assert layers["layer"].to_list() == list(found["layers"])
    assert layers["product_error"].max() <= 1e-4
    card = (exported / "README.md").read_text()
    assert re.search(r"\| id +\| top-1 % +\| [\d.]+ \([\d.]+ to [\d.]+\)", card)
    assert "python -m qatlab.export checkpoint=" in card
    assert (exported / "card.json").stat().st_size < 200_000
    assert "Apache-2.0 (part of qatlab)" in card


def same_features(run: Run, exported: Path) -> bool:
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        simulated = load_quantized(run.folder)(images)
    found = deploy.load(exported)(images.numpy())
    return bool(np.linalg.norm(found - simulated.numpy()) <= 2e-2 * float(simulated.norm()))


def test_the_integer_model_is_the_runs(run: Run, exported: Path) -> None:
    assert same_features(run, exported)


@pytest.mark.parametrize("form", ["openvino", "torch"])
def test_the_other_formats_pass_the_same_checks(run: Run, small: Options, form: str) -> None:
    if form == "torch" and not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN, whose int8 products inductor calls")
    folder = export(asked(small, run, f"format={form}", "suite.images=20"), "evaluate")
    found = about(folder)
    assert (found["format"], found["integer_layers"]) == (form, 16)
    layers = pl.read_csv(folder / "parity.csv")
    assert layers["product_error"].max() <= 1e-4
    assert layers["mismatch"].max() <= 1e-4
    assert same_features(run, folder)
    assert f"integer_{form}" in {row["stage"] for row in run.rows()}


def test_its_rows_are_those_of_its_own_features(run: Run, exported: Path) -> None:
    rows = {(row["stage"], row["dataset"], row["score"]): row for row in run.rows()}
    integer = {key[1:] for key in rows if key[0] == "integer_onnx"}
    assert integer == {key[1:] for key in rows if key[0] == "adapted" and not key[2].startswith("logit")}
    frame = pl.read_parquet(run.folder / "predictions" / "integer_onnx.parquet").filter(pl.col("dataset") == "id")
    assert frame["correct"].mean() == rows["integer_onnx", "id", "zero_shot"]["metrics"]["top1"]
    assert rows["integer_onnx", "id", "zero_shot"]["paired"]
    bases = {row["definition"].partition("+")[2] for row in rows.values() if row["stage"] == "integer_onnx"}
    assert bases == {DeployedTower(exported).digest}  # another file would have rows of its own


def test_it_is_evaluated_like_any_model(run: Run, exported: Path, small: Options) -> None:
    before = len(run.rows())
    config = small("fp32", f"checkpoint={exported}", f"output={run.folder.parent}", "suite.images=16")
    evaluate(config, "evaluate")
    rows = run.rows()[before:]
    assert {row["stage"] for row in rows} == {"fp32", "integer_onnx"}
    assert {row["n"] for row in rows} == {16}


def test_a_run_and_its_exports_are_scored_together(
    run: Run, exported: Path, small: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    """They share the run's folder, its FP32 and its table."""
    before = len(run.rows())
    both = f"checkpoint=[{exported},{run.folder},{exported}]"
    (scored,) = evaluate(small("fp32", both, f"output={run.folder.parent}", "suite.images=12"), "evaluate")
    assert scored.folder.resolve() == run.folder.resolve()
    rows = run.rows()[before:]
    assert {row["stage"] for row in rows} >= {"fp32", "adapted", "integer_onnx"}
    assert ", integer_onnx: scoring" in capsys.readouterr().out
    keys = [(row["stage"], row["dataset"], row["score"]) for row in rows]
    assert len(keys) == len(set(keys))


def test_the_threshold_accepts_95_percent(run: Run, exported: Path) -> None:
    found = about(exported)["in_distribution"]
    frame = pl.read_parquet(run.folder / "predictions" / "integer_onnx.parquet").filter(
        (pl.col("dataset") == found["of"]) & (pl.len().over("definition") == found["images"])
    )
    assert len(frame) == found["images"]
    assert (frame["mcm"] >= found["threshold"] - 1e-9).mean() >= 0.95


# -- the example that needs no torch ------------------------------------------------------------------------------------


def classify(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the example in a process where torch and qatlab cannot be imported."""
    script = ROOT / "examples" / "classify.py"
    blocked = "import sys, runpy; sys.modules.update(torch=None, torchvision=None, open_clip=None, qatlab=None); "
    program = f"{blocked}sys.argv = sys.argv[1:]; runpy.run_path({str(script)!r}, run_name='__main__')"
    command = [sys.executable, "-c", program, str(script), str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 225)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_photo_is_classified_without_torch(run: Run, exported: Path, photo: Path) -> None:
    done = classify(exported, str(photo), "--top", "16")
    assert done.returncode == 0, done.stderr
    found = about(exported)
    head, *lines = done.stdout.strip().splitlines()
    transform = open_clip.image_transform(
        64, is_train=False, mean=found["preprocess"]["mean"], std=found["preprocess"]["std"]
    )
    with torch.no_grad():
        features = load_quantized(run.folder)(transform(Image.open(photo).convert("RGB"))[None])
    stored = np.load(exported / "classes.npz")
    cosines = torch.nn.functional.normalize(features, dim=-1) @ torch.from_numpy(stored["id"]).T
    expected = (found["logit_scale"] * cosines[0]).softmax(0)
    told = {line.split("%")[1].strip(): float(line.split("%")[0]) / 100 for line in lines}
    for name, probability in zip(stored["id.names"], expected.tolist(), strict=True):
        assert told[name] == pytest.approx(probability, abs=0.03)
    score = float(cosines.double().softmax(1).max())
    assert float(head.split("mcm ")[1].split(",")[0]) == pytest.approx(score, abs=2e-3)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (300, 225), (97, 331), (65, 64), (500, 40), (31, 200)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK"])
def test_the_examples_pixels_are_open_clips(width: int, height: int, mode: str) -> None:
    """Within one of 255 levels."""
    prepare = runpy.run_path(str(ROOT / "examples" / "classify.py"))["prepare"]
    pixels = np.random.default_rng(0).integers(0, 255, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((width, height)).convert(mode)
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    about = {"size": 64, "mean": mean, "std": std, "resize_mode": "shortest", "interpolation": "bicubic"}
    expected = open_clip.image_transform(64, is_train=False, mean=tuple(mean), std=tuple(std))(image)
    levels = 255 * np.array(std)[:, None, None]
    assert np.abs((prepare(image, about) - expected.numpy()) * levels).max() <= 1 + 1e-3


def test_some_of_the_classes_and_a_table_of_ones_own(exported: Path, photo: Path, tmp_path: Path) -> None:
    done = classify(exported, str(photo), "--names", "star,heart")
    assert {line.split("%")[1].strip() for line in done.stdout.strip().splitlines()[1:]} == {"star", "heart"}
    done = classify(exported, str(photo), "--names", "star,hart")
    assert done.returncode == 2
    assert "'hart' is none of the classes" in done.stderr
    usual = np.load(exported / "classes.npz")
    np.savez(tmp_path / "table.npz", features=usual["id"][:2], names=np.array(["one", "two"]))
    other = classify(exported, str(photo), "--table", str(tmp_path / "table.npz"))
    assert {line.split("%")[1].strip() for line in other.stdout.strip().splitlines()[1:]} == {"one", "two"}
    whole = classify(exported, str(photo))
    assert other.stdout.splitlines()[0] == whole.stdout.splitlines()[0]  # in-distribution is asked of the usual classes


def test_what_the_example_cannot_use_is_told(exported: Path, photo: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", features=np.ones((3, 7), np.float32), names=np.array(["a", "b", "c"]))
    np.savez(tmp_path / "empty.npz", weights=np.ones(3))
    damaged = Path(shutil.copytree(exported, tmp_path / "onnx"))
    (damaged / "model.onnx").write_bytes((exported / "model.onnx").read_bytes()[:-100])
    (tmp_path / "text.jpg").write_text("no image")
    for folder, arguments, sentence in (
        (exported, (photo, "--table", tmp_path / "other.npz"), "holds features of shape (3, 7) and 3 names"),
        (exported, (photo, "--table", tmp_path / "empty.npz"), "holds weights: it takes features"),
        (exported, (tmp_path / "text.jpg",), "text.jpg cannot be read"),
        (exported, (tmp_path / "none.jpg",), "none.jpg cannot be read"),
        (exported.parent, (photo,), "has no export.json"),
        (damaged, (photo,), "model.onnx is missing, cut short or changed"),
    ):
        done = classify(folder, *map(str, arguments))
        assert done.returncode == 2
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


# -- damage and mistakes ------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "onnx"))


def test_a_model_file_cut_short_is_named(copied: Path) -> None:
    path = copied / "model.onnx"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.onnx is cut short or changed: export again"):
        deploy.load(copied)
    path.unlink()
    with pytest.raises(UserError, match=r"model\.onnx is missing: export again"):
        deploy.load(copied)
    with pytest.raises(UserError, match=r"has no export\.json"):
        deploy.load(copied.parent)


@pytest.mark.parametrize(
    ("recipe", "overrides", "reason"),
    [
        ("raana", (), "RaanA has no grid per tensor or output channel"),
        ("qat_lora", ("fit.steps=1",), "LoRA beside it reads the full-precision input"),
        ("fp32", (), "nothing of this encoder is quantized"),
    ],
)
def test_what_cannot_be_exact_says_so_and_leaves_nothing(
    small: Options, small_fit: Fit, tmp_path: Path, recipe: str, overrides: tuple[str, ...], reason: str
) -> None:
    run = small_fit(recipe, tmp_path, "suite.images=4", "callbacks.temperature=null", *overrides)
    with pytest.raises(UserError, match=reason):
        export(asked(small, run, "suite.images=4", "callbacks.temperature=null"), "evaluate")
    assert not (run.folder / "export").exists()


def test_a_failed_check_fails_the_export_and_leaves_the_last_one(
    run: Run, exported: Path, small: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = LayerParity("transformer.resblocks.1.mlp.c_fc", 0.1, 0.1, 0.0, True)
    monkeypatch.setattr(packaging, "compare_layers", lambda *_: [off])
    with pytest.raises(
        UserError, match=r"1 of 1 layers do not compute .* 'transformer\.resblocks\.1\.mlp\.c_fc' is 1\.0e-01"
    ):
        export(asked(small, run, "format=onnx"), "evaluate")
    assert (run.folder / "export" / "onnx.failed" / "parity.csv").exists()
    deploy.load(exported)


def test_mistakes_are_told_in_a_sentence(run: Run, exported: Path, small: Options, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"format=onxx is no format to export to \(did you mean 'onnx'\?\)"):
        export(asked(small, run, "format=onxx"), "evaluate")
    with pytest.raises(UserError, match=r"checkpoint= is missing: an export takes the folder of one finished run"):
        export(small("fp32"), "evaluate")
    with pytest.raises(UserError, match=r"checkpoint=\['a', 'b'\] names several"):
        export(small("fp32", "checkpoint=[a,b]"), "evaluate")
    shutil.copytree(exported, tmp_path / "away")
    with pytest.raises(UserError, match="is an export taken away from its run"):
        evaluate(small("fp32", f"checkpoint={tmp_path / 'away'}"), "evaluate")
    with pytest.raises(UserError, match=r"is an export: an export takes its run"):
        export(small("fp32", f"checkpoint={exported}"), "evaluate")
