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
from scipy.special import softmax
from sklearn.metrics import log_loss

from qatlab import deploy
from qatlab.config import Config
from qatlab.core.errors import UserError
from qatlab.deploy.parity import BlockParity, LayerParity
from qatlab.deploy.tower import DeployedTower
from qatlab.evaluate import evaluate
from qatlab.export import export
from qatlab.models import clip
from qatlab.models.quantized import load_quantized
from qatlab.reports.card import write_card
from qatlab.results.run import Run
from qatlab.stages import export as packaging
from qatlab.stages.threshold import accepting
from qatlab.suites.pools import places_of, pool_of
from qatlab.suites.suite import build_suite

ROOT = Path(__file__).resolve().parents[2]
Options = Callable[..., Config]
Fit = Callable[..., Run]


@pytest.fixture(scope="module")
def run(small_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Seven bits, which every machine's instructions multiply exactly; its last refit is that of another suite."""
    made = small_fit("light_qat_lsq_pc", tmp_path_factory.mktemp("runs"), "quant.weight.bits=7")
    scales = json.loads((made.folder / "scales.json").read_text())
    (made.folder / "scales.json").write_text(json.dumps(scales | {"temperature/00000000": 999.0}))
    return made


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
        *(
            "model.onnx",
            "classes.npz",
            "export.json",
            "parity.csv",
            "blocks.csv",
            "README.md",
            "card.json",
            "check.npz",
            "check.onnx",
            "scores.npz",
        ),
    }
    found = about(exported)
    assert (found["format"], found["file"], found["opset"]) == ("onnx", "model.onnx", 21)
    assert found["integer_layers"] == len(found["layers"]) == 16
    assert found["end_to_end"]["integer"] <= 1.3 * found["end_to_end"]["simulated"]
    assert found["weight_share"] == found["product_share"] == run.rows()[-1]["weight_share"] > 0.9
    assert "16 of 16 layers in integers" in said.getvalue()
    layers = pl.read_csv(exported / "parity.csv")
    assert layers["layer"].to_list() == list(found["layers"])
    assert layers["product_error"].max() <= 1e-4
    blocks = pl.read_csv(exported / "blocks.csv")
    assert blocks["block"].to_list() == [*(f"transformer.resblocks.{n}" for n in range(4)), "features"]
    assert (blocks["error"] <= 1.5 * blocks["simulated"]).all()
    card = (exported / "README.md").read_text()
    assert re.search(r"\| id +\| top-1 % +\| [\d.]+ \([\d.]+ to [\d.]+\)", card)
    assert "python -m qatlab.export checkpoint=" in card
    assert (exported / "card.json").stat().st_size < 200_000
    assert "Apache-2.0 (part of qatlab)" in card


SHARES = {"weight_share": 0.9, "act_share": 0.5, "product_share": 0.5, "skipped_share": 0.1, "attention_share": 0.02}


def test_models_d1_the_card_states_what_is_rounded(tmp_path: Path) -> None:
    found = {
        **{
            "model": "ViT-B-32",
            "pretrained": "openai",
            "method": "m",
            "recipe": "ptq",
            "data": "cc3m",
            "format": "onnx",
        },
        **{"runtime": "onnxruntime 1", "file": "model.onnx", "weight_bits": 8, "act_bits": 8, "integer_layers": 48},
        **{"preprocess": {"size": 224}, "logit_scale": 100.0, **SHARES},
        **{"cpu": "a CPU", "exact": True, "logit_scale_of": "the model's own"},
        "end_to_end": {"integer": 0.1, "simulated": 0.1, "agreement": 1.0, "n": 9, "of": "birds"},
        "sets": {"birds": {"integer": 0.1, "simulated": 0.1, "agreement": 1.0, "n": 9}},
        "in_distribution": {
            **{"score": "mcm", "temperature": 1.0, "threshold": 0.1, "images": 9, "of": "birds"},
            **{"reached": 1.0, "accepted": {}, "asked": ""},
        },
    }
    metrics = {"metrics": {"top1": 0.5}, "intervals": {}}
    row = {"dataset": "birds", "score": "zero_shot", "versions": {}, "commit": None, "config": {}, **metrics}
    rows = [row | {"stage": stage} for stage in ("fp32", "quantized", "integer_onnx")]
    write_card(tmp_path, found, rows, tmp_path, "quantized", "integer_onnx")
    assert (
        "* 90.0 % of the products with a weight have the weight rounded, 50.0 % both operands, 10.0 % are left out by "
        "quant.rules; QK^T and PV, 2.0 % of all products, stay in full precision.\n"
    ) in (tmp_path / "README.md").read_text()
    assert SHARES.items() <= json.loads((tmp_path / "card.json").read_text()).items()


def same_features(run: Run, exported: Path) -> bool:
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        simulated = load_quantized(run.folder)(images)
    found = deploy.load(exported, trust=True)(images.numpy())
    return bool(np.linalg.norm(found - simulated.numpy()) <= 2e-2 * float(simulated.norm()))


def test_the_integer_model_is_the_runs(run: Run, exported: Path) -> None:
    assert same_features(run, exported)


@pytest.mark.parametrize("form", ["openvino", pytest.param("torch", marks=pytest.mark.slow)])
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
    rows = [row for row in run.rows() if row["stage"] == f"integer_{form}"]
    # Its calibration images are other ones, which no refit of this run was fitted on.
    own = json.loads((run.folder / "scales.json").read_text())["logit_scale"]
    assert {row["logit_scale"] for row in rows} == {found["logit_scale"]} == {own}
    assert found["logit_scale_of"].startswith("the model's own")
    if form == "torch":
        with pytest.raises(UserError, match=r"can run code of whoever made it: .* trust=true"):
            deploy.load(folder)


def test_using_a9_the_logit_scale_is_this_suites_refit_and_not_the_last_one(run: Run, exported: Path) -> None:
    refitted = {row["logit_scale"] for row in run.rows() if row["score"] == "logit_scale_fit"}
    assert refitted == {about(exported)["logit_scale"]}
    (fit,) = [row for row in run.rows() if row["score"] == "logit_scale_fit"]
    assert about(exported)["logit_scale_of"] == f"refitted on the calibration images {fit['definition']}"


def test_using_a1_the_card_scores_the_probabilities_that_it_prescribes(
    run: Run, exported: Path, small: Options
) -> None:
    config = asked(small, run)
    loaded = clip.load(config.model)
    entry = build_suite(config.suite, loaded).only(names={"id"}).sets[0]
    images = loaded.preprocess.normalize(pool_of(entry).batch(places_of(entry)))
    features = deploy.load(exported)(images.numpy()).astype(np.float64)
    cosines = features @ np.load(exported / "classes.npz")["id"].T / np.linalg.norm(features, axis=1, keepdims=True)
    told = (exported / "README.md").read_text()
    scale = about(exported)["logit_scale"]
    assert f"softmax of {scale:.4g} times the cosines" in told
    rows = json.loads((exported / "card.json").read_text())["rows"]
    (row,) = [r for r in rows if (r["stage"], r["dataset"], r["score"]) == ("integer_onnx", "id", "zero_shot")]
    expected = log_loss(entry.labels, softmax(scale * cosines, axis=1), labels=np.arange(cosines.shape[1]))
    assert row["metrics"]["nll"] == pytest.approx(expected, abs=1e-6)
    own = json.loads((run.folder / "scales.json").read_text())["logit_scale"]
    assert abs(log_loss(entry.labels, softmax(own * cosines, axis=1)) - expected) > 0.01  # the other one shows
    assert re.search(rf"\| id +\| NLL +\|.*\| {expected:.3f} \([^|]*\) +\|$", told, re.MULTILINE)
    stages = {r["stage"]: r["logit_scale"] for r in rows}
    assert stages == {"fp32": own, "temperature": scale, "integer_onnx": scale}


def test_using_a1_a_card_without_intervals_speaks_of_none(exported: Path, tmp_path: Path) -> None:
    card = json.loads((exported / "card.json").read_text())
    rows = [row | {name: card[name] for name in ("versions", "commit", "config")} for row in card["rows"]]
    for intervals, told in ((True, True), (False, False)):
        given = [row if intervals else row | {"intervals": {}} for row in rows]
        write_card(tmp_path, about(exported), given, exported.parents[1], "temperature", "integer_onnx")
        assert ("95 % bootstrap intervals" in (tmp_path / "README.md").read_text()) is told


def test_using_c1_every_set_is_compared_and_named(run: Run, exported: Path, said: io.StringIO) -> None:
    predicted = [
        pl.read_parquet(run.folder / "predictions" / f"{name}.parquet") for name in ("adapted", "integer_onnx")
    ]
    found = about(exported)["sets"]
    assert list(found) == ["id", "near_ood", "noise"]
    for name, of in found.items():
        answers = [frame.filter(pl.col("dataset") == name).head(32).sort("index")["prediction"] for frame in predicted]
        assert (of["n"], of["agreement"]) == (32, (answers[0] == answers[1]).mean())
    told = re.search("answers that are the simulation's: (.*)", said.getvalue())
    assert told is not None
    assert re.sub(r"\d+\.\d %", "x", told[1]) == ", ".join(
        f"{name} {round(32 * of['agreement'])} of 32 (x)" for name, of in found.items()
    )
    assert told[1] in (exported / "README.md").read_text()


def test_training_f1_the_card_says_what_it_needs(exported: Path) -> None:
    found, told = about(exported), (exported / "README.md").read_text()
    assert found["exact"] is True
    assert f"Certified on {found['cpu']}. Its products are exact on every CPU." in told


def test_faults_s9_names_in_a_card_are_shown_letter_by_letter(exported: Path, tmp_path: Path) -> None:
    text = (exported / "card.json").read_text().replace('"near_ood"', '"<script>alert(1)</script>|[x](y)"')
    card = json.loads(text)
    rows = [row | {name: card[name] for name in ("versions", "commit", "config")} for row in card["rows"]]
    stored = {name: card[name] for name in about(exported)}
    write_card(tmp_path, stored, rows, exported.parents[1], "temperature", "integer_onnx")
    told = (tmp_path / "README.md").read_text()
    assert "<script" not in told
    assert told.count("&lt;script&gt;alert(1)&lt;/script&gt;\\|\\[x\\](y)") >= 4


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


def of_export(run: Run, found: dict[str, Any]) -> pl.DataFrame:
    """The export's predictions of the images that it was scored on first."""
    frame = pl.read_parquet(run.folder / "predictions" / "integer_onnx.parquet")
    return frame.filter(pl.len().over("definition") == found["images"])


def test_the_threshold_accepts_95_percent(run: Run, exported: Path) -> None:
    found = about(exported)["in_distribution"]
    frame = of_export(run, found)
    mcm = {name: frame.filter(pl.col("dataset") == name)["mcm"].to_numpy() for name in ("id", "near_ood")}
    assert len(mcm["id"]) == found["images"] == 32
    assert found["threshold"] == pytest.approx(np.quantile(mcm["id"], 0.05, method="lower"), abs=1e-9)
    assert found["reached"] == (mcm["id"] >= found["threshold"] - 1e-9).mean() >= 0.95
    share = (mcm["near_ood"] >= found["threshold"] - 1e-9).mean()
    assert found["accepted"] == {"near_ood": {"share": share, "images": 32}}
    told = (exported / "README.md").read_text()
    assert f"of the 32 images of id reach. It accepts {100 * share:.1f} % of near_ood (32 images).\n" in told


def test_another_threshold_is_asked_for_by_score_rate_and_set(
    run: Run, exported: Path, small: Options, tmp_path: Path
) -> None:
    """A copy of the run is exported again: nothing but the threshold changes."""
    copy = Path(shutil.copytree(run.folder, tmp_path / run.folder.name))
    asking = ["threshold.score=energy", "threshold.tpr=0.75", "threshold.set=id"]
    folder = export(small("fp32", f"checkpoint={copy}", f"output={tmp_path}", "format=onnx", *asking), "evaluate")
    found, before = about(folder)["in_distribution"], about(exported)["in_distribution"]
    energy = of_export(run, before).filter(pl.col("dataset") == "id")["energy"].to_numpy()
    assert (found["score"], found["tpr"], found["of"]) == ("energy", 0.75, "id")
    assert found["threshold"] == pytest.approx(np.quantile(energy, 0.25, method="lower"), abs=1e-6)
    assert about(folder)["sha256"]["classes.npz"] == about(exported)["sha256"]["classes.npz"]
    told = (folder / "README.md").read_text()
    assert "Energy of at least" in told
    assert f"format=onnx {' '.join(asking)}`" in told
    # What the example makes of the first export's scores is what the second export says.
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(photo)
    by_option, by_export = classify(exported, str(photo), *asking), classify(folder, str(photo))
    assert by_option.returncode == by_export.returncode == 0, by_option.stderr + by_export.stderr
    assert by_option.stdout == by_export.stdout
    assert by_option.stdout.startswith(f"in-distribution: energy of at least {found['threshold']:.6g}, as ")
    assert f"accepts {100 * found['accepted']['near_ood']['share']:.1f} % of near_ood (32)" in by_option.stdout


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (
            "threshold.score=knn",
            "threshold.score=knn is unknown.*; there are msp, energy, max_logit, mcm, entropy",
        ),
        ("threshold.tpr=1.5", "threshold.tpr=1.5: it takes a number above 0, below 1"),
        ("threshold.set=near_ood", "threshold.set=near_ood is no ID set of this suite.*; there are id"),
        ("file=a.tex", "file=a.tex is where fit and evaluate write results"),
    ],
)
def test_a_threshold_that_cannot_be_is_told_before_anything_is_written(
    run: Run, exported: Path, small: Options, option: str, told: str
) -> None:
    written = (exported / "export.json").stat().st_mtime_ns
    with pytest.raises(UserError, match=told):
        export(asked(small, run, "format=onnx", option), "evaluate")
    assert (exported / "export.json").stat().st_mtime_ns == written


def test_more_images_of_equal_scores_are_accepted_and_never_fewer() -> None:
    scores = {"id": {"mcm": np.array([0.1, 0.2, 0.2, 0.3, 0.4])}, "far": {"mcm": np.array([0.0, 0.2])}}
    found = accepting(scores, "id", "mcm", 0.6)
    assert (found["threshold"], found["reached"]) == (0.2, 0.8)
    assert found["accepted"] == {"far": {"share": 0.5, "images": 2}}
    eleven = {"id": {"mcm": np.arange(11.0)}}
    assert accepting(eleven, "id", "mcm", 0.9)["threshold"] == 1.0  # though 1 - 0.9 is a little less than a tenth


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
    accepts, head, *lines = done.stdout.strip().splitlines()
    assert re.fullmatch(
        r"in-distribution: mcm of at least [\d.]+, as [\d.]+ % of the 32 images of id; accepts .*", accepts
    )
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
    assert {line.split("%")[1].strip() for line in done.stdout.strip().splitlines()[2:]} == {"star", "heart"}
    done = classify(exported, str(photo), "--names", "star,hart")
    assert done.returncode == 2
    assert "'hart' is none of the classes" in done.stderr
    usual = np.load(exported / "classes.npz")
    np.savez(tmp_path / "table.npz", features=usual["id"][:2], names=np.array(["one", "two"]))
    other = classify(exported, str(photo), "--table", str(tmp_path / "table.npz"))
    assert {line.split("%")[1].strip() for line in other.stdout.strip().splitlines()[2:]} == {"one", "two"}
    whole = classify(exported, str(photo))
    assert (
        other.stdout.splitlines()[:2] == whole.stdout.splitlines()[:2]
    )  # in-distribution is asked of the usual classes


def test_what_the_example_cannot_use_is_told(exported: Path, photo: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", features=np.ones((3, 7), np.float32), names=np.array(["a", "b", "c"]))
    np.savez(tmp_path / "empty.npz", weights=np.ones(3))
    damaged = Path(shutil.copytree(exported, tmp_path / "onnx"))
    (damaged / "model.onnx").write_bytes((exported / "model.onnx").read_bytes()[:-100])
    (tmp_path / "text.jpg").write_text("no image")
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    (other / "scores.npz").unlink()
    for folder, arguments, sentence in (
        (exported, (photo, "--table", tmp_path / "other.npz"), "holds features of shape (3, 7) and 3 names"),
        (exported, (photo, "--table", tmp_path / "empty.npz"), "holds weights: it takes features"),
        (exported, (tmp_path / "text.jpg",), "text.jpg cannot be read"),
        (exported, (tmp_path / "none.jpg",), "none.jpg cannot be read"),
        (exported.parent, (photo,), "has no export.json"),
        (exported, (photo, "threshold.score=knn"), "threshold.score=knn is unknown: there are msp, energy"),
        (exported, (photo, "threshold.tpr=x"), "threshold.tpr=x is the share of ID images"),
        (
            exported,
            (photo, "threshold.set=near_ood"),
            "threshold.set=near_ood is no ID set of this export: there are id",
        ),
        (exported, (photo, "threshold.rate=0.9"), "threshold.rate= is unknown"),
        (other, (photo, "threshold.tpr=0.9"), "scores.npz is missing, cut short or changed"),
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


def test_a_block_that_is_off_in_the_running_model_fails_the_export(
    run: Run, exported: Path, small: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = [BlockParity("transformer.resblocks.0", 0.01, 0.02), BlockParity("transformer.resblocks.1", 0.3, 0.02)]
    monkeypatch.setattr(packaging, "compare_blocks", lambda *_: off)
    with pytest.raises(UserError, match=r"'transformer\.resblocks\.1' is 3\.0e-01 off, .* format=onnx fuses"):
        export(asked(small, run, "format=onnx"), "evaluate")
    assert (run.folder / "export" / "onnx.failed" / "blocks.csv").exists()


def test_mistakes_are_told_in_a_sentence(run: Run, exported: Path, small: Options, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"format=onxx is unknown \(did you mean 'onnx'\?\)"):
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
