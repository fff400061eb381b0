"""The whole run, end to end: what it writes, what it never does twice, and how it goes on after it was stopped."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import polars as pl
import pytest
import torch
from hydra.utils import instantiate
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy, kl_div, normalize

from qatlab.config import Config, ModelConfig, compose, recipe_files
from qatlab.core.errors import UserError
from qatlab.core.signals import StopSignals
from qatlab.data import TextTable, save_text_table
from qatlab.data.embedded.sets import CLASS_NAMES, EmbeddedSet, write_caption_shards
from qatlab.evaluate import evaluate
from qatlab.fit import fit
from qatlab.models import clip as clips
from qatlab.models.quantized import quantized_copy
from qatlab.models.zeroshot import class_features, encode_text
from qatlab.quant.inspect import coverage
from qatlab.results.run import Run
from qatlab.stages.opening import open_experiment
from qatlab.stages.outline import outline

Options = Callable[..., Config]
Fit = Callable[..., Run]

STAGES = {
    "fp32": ["fp32"],
    "pretrain_tiny": ["trained"],
    **{recipe: ["fp32", "quantized"] for recipe in ("mixed_precision", "ptq", "raana", "smoothquant", "weight_only")},
    "vit_literature": ["fp32", "quantized"],
}
DRAWN = ("fp32", "ptq", "light_qat_distill", "pretrain_tiny")  # whose pictures are looked at
ADAPTED = ["fp32", "quantized", "adapted"]
SCORES = ["msp", "energy", "max_logit", "mcm"]
# What a row of the suite of conftest is about: (dataset, score)
ROWS = {
    *(("id", score) for score in ("zero_shot", "refit_none", "refit_temperature", "refit_isotonic")),
    ("noise", "zero_shot"),
    *((name, score) for name in ("noise", "near_ood") for score in SCORES),
}
FITTED = {("calibration", "logit_scale_fit"), *(row for row in ROWS if not row[1].startswith("refit"))}
# What every row says.
KEYS = {
    *("run_id", "stage", "step", "recipe", "model", "pretrained", "weights", "resized", "fp32_id", "activation"),
    *("text_activation", "preprocessing", "final_projection", "method", "tower", "weight_bits", "act_bits"),
    *("weight_share", "act_share", "product_share", "skipped_share", "attention_share", "objective", "data"),
    *("dataset", "role", "reference", "definition", "definition_version", "score", "prompts", "n", "metrics"),
    *(
        "intervals",
        "paired",
        "logit_scale",
        "temperature",
        "precision",
        "device",
        "seed",
        "config",
        "versions",
        "commit",
    ),
}


@dataclass
class Done:
    """A finished run and what it printed."""

    run: Run
    said: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.run.rows()

    def of(self, stage: str, dataset: str = "id", score: str = "zero_shot") -> dict[str, Any]:
        (row,) = [row for row in self.rows if (row["stage"], row["dataset"], row["score"]) == (stage, dataset, score)]
        return row


def listened(work: Callable[..., Run | list[Run]], *arguments: Any) -> Done:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        done = work(*arguments)
    (run,) = done if isinstance(done, list) else [done]
    return Done(run, said.getvalue())


@pytest.fixture(scope="module")
def runs(small_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    """``runs(recipe)``: that recipe's run, computed once for all tests that only look at it."""
    done: dict[str, Done] = {}
    folder = tmp_path_factory.mktemp("runs")

    def get(recipe: str) -> Done:
        if recipe not in done:
            with pictures.rendered() if recipe in DRAWN else contextlib.nullcontext():
                done[recipe] = listened(small_fit, recipe, folder)
        return done[recipe]

    return get


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch, cold: None) -> list[int]:
    """How many images each call of an image encoder got, the unquantized ones' and the quantized ones'; none is known yet."""
    found: list[int] = []
    forward = VisionTransformer.forward

    def counting(self: VisionTransformer, images: torch.Tensor) -> Any:
        found.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(VisionTransformer, "forward", counting)
    return found


# -- what a run leaves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", recipe_files())
def test_every_recipe_runs_and_stores_its_rows(runs: Callable[[str], Done], recipe: str) -> None:
    done = runs(recipe)
    stages = STAGES.get(recipe, ADAPTED)
    steps = 0 if stages[-1] in ("fp32", "quantized") else 2
    rows = done.rows
    for stage in [*stages, "temperature"]:
        at = [row for row in rows if row["stage"] == stage]
        expected = FITTED if stage == "temperature" else ROWS
        assert {(row["dataset"], row["score"]) for row in at} == expected
        assert {row["step"] for row in at} == {0 if stage in ("fp32", "quantized") else steps}
    probes = [row for row in rows if row["stage"] == "probe"]
    assert {row["step"] for row in probes} == ({1, 2} if steps else set())
    assert {row["stage"] for row in rows} == {*stages, "temperature", *(["probe"] if steps else [])}
    refitted = [row for row in rows if (row["stage"], row["score"]) == ("temperature", "zero_shot")]
    assert all(set(row) == KEYS | ({"refit"} if row in refitted else set()) for row in rows)
    keys = [tuple(row[key] for key in ("run_id", "stage", "step", "dataset", "score", "prompts")) for row in rows]
    assert len(set(keys)) == len(keys)
    assert all(math.isfinite(value) for row in rows for value in row["metrics"].values())
    assert {row["n"] for row in rows if row["stage"] not in ("probe",)} == {32}
    assert {row["run_id"] for row in rows} == {done.run.id}


@pytest.mark.parametrize("recipe", DRAWN)
def test_a_run_leaves_its_files(runs: Callable[[str], Done], recipe: str) -> None:
    done, steps = runs(recipe), recipe not in ("fp32", "ptq")
    folder = done.run.folder
    assert folder.name == f"{recipe}-{done.run.id}"
    stages = [*STAGES.get(recipe, ADAPTED), "temperature"]
    assert {path.stem for path in (folder / "predictions").iterdir()} == set(stages)
    predictions = pl.read_parquet(folder / "predictions" / f"{stages[-1]}.parquet")
    assert predictions.group_by("dataset").len().sort("dataset").rows() == [("id", 32), ("near_ood", 32), ("noise", 32)]
    with Image.open(folder / "reliability.png") as picture:
        assert picture.width > 300
    assert "recipe: " + recipe in (folder / "config.yaml").read_text()
    assert (folder / "layers.csv").exists() == ("quantized" in stages)
    if "quantized" in stages:
        layers = pl.read_csv(folder / "layers.csv")
        assert len(layers) == 16
        assert layers["weight_sqnr_db"].min() > 20
    assert (folder / "model.safetensors").exists() == (folder / "metrics.csv").exists() == steps
    if steps:
        curves = pl.read_csv(folder / "metrics.csv")
        assert {"train/loss", "probe/id@16/zero_shot/top1", "probe/near_ood@16/msp/auroc"} <= set(curves.columns)
        assert curves["train/loss"].is_finite().all()
        # The curves of the probes begin at step 0, which has no rows.
        assert curves.filter(pl.col("step") == 0)["probe/id@16/zero_shot/top1"].to_list() != [None]
        assert not (folder / "curves").exists()
    for name in ("results.jsonl", "predictions", "reliability.png", *(["metrics.csv", "model.safetensors"] * steps)):
        assert str(folder / name) in done.said


def test_what_was_done_is_said_and_tabled(runs: Callable[[str], Done]) -> None:
    done = runs("light_qat_distill")
    first, second, third, *_ = done.said.splitlines()
    assert first.startswith(f"light_qat_distill {done.run.id}: fp32 -> quantized -> adapted, tiny (tiny, gelu)")
    assert second.split() == [
        "scoring:",
        "96",
        "images",
        "fp32",
        "+",
        "96",
        "images",
        "quantized",
        "+",
        "96",
        "images",
        "adapted",
    ]
    assert third.strip().startswith("training: 2 steps x 8 images of embedded, 16 looped samples, 0.5 contrastive")
    for title in ("FP32", "quantized", "adapted", "after temperature"):
        assert title in done.said
    lines = done.said.splitlines()
    headline = next(i for i, line in enumerate(lines) if line.startswith("W8A8, adapted: accuracy "))
    assert lines[headline + 1] == f"light_qat_distill {done.run.id}"  # above the table
    assert lines[-2].startswith("At W8A8 no loss of accuracy is shown")
    assert lines[-1].startswith("  python -m qatlab.fit recipe=light_qat_distill quant.weight.bits=4 ")
    top1 = f"{100 * done.of('fp32')['metrics']['top1']:.1f}"
    assert any("top-1 %" in line and line.split("│")[3].strip() == top1 for line in done.said.splitlines())


# The embedded model's products with a weight: 17 tokens of 192 in 4 blocks; a patch convolution and a projection.
BLOCKS, ENDS = 4 * 12 * 192**2 * 17, 16 * 3 * 16**2 * 192 + 192 * 64
SHARES = ("weight_share", "act_share", "product_share", "skipped_share", "attention_share")


@pytest.mark.parametrize(("recipe", "both"), [("ptq", True), ("weight_only", False)])
def test_models_d1_what_is_rounded_is_in_rows_plan_and_table(
    runs: Callable[[str], Done], small_fit: Fit, recipe: str, both: bool
) -> None:
    done = runs(recipe)
    share, attention = BLOCKS / (BLOCKS + ENDS), 4 * 2 * 17**2 * 192
    expected = [share, share * both, share * both, 0, attention / (BLOCKS + ENDS + attention)]
    found = {row["stage"]: [row[name] for name in SHARES] for row in done.rows}
    assert found == {"fp32": [None] * 5, "quantized": expected, "temperature": expected}
    stated = (
        f"{100 * share:.1f} % of the products with a weight have the weight rounded, {100 * share * both:.1f} % both "
        f"operands; QK^T and PV, {100 * expected[-1]:.1f} % of all products, stay in full precision"
    )
    again = listened(small_fit, recipe, done.run.folder.parent)
    for said in (done.said, again.said):
        assert f"  {stated}\n" in said[: said.index("┏")]
        assert stated in said[said.index("└") :]
        assert "warning" not in said


def test_models_d1_a_run_that_would_leave_most_in_full_precision_is_refused_before_it_starts(
    small: Options, small_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "REFUSED", 0.95)  # of the embedded model 92.7 % are rounded
    monkeypatch.setattr(coverage, "WARNED", 0.97)
    with pytest.raises(
        UserError, match=r"leave in full precision conv1 \(7\.3 %\), proj \(0\.0 %\).*quant\.partial=true"
    ):
        small_fit("ptq", tmp_path)
    assert not list(tmp_path.iterdir())
    done = listened(small_fit, "ptq", tmp_path, "quant.partial=true")
    assert (
        "  warning: 7.3 % of the products with a weight stay in full precision: conv1 (7.3 %), proj (0.0 %)\n"
        in done.said
    )
    # What is made is shown and scored as ever, and goes on being warned of.
    again = listened(evaluate, checkpoint(small, done.run, "quant.partial=false"), "evaluate")
    same = listened(small_fit, "ptq", tmp_path)
    for shown in (again, same):
        assert shown.run.folder == done.run.folder
        assert "  warning: 7.3 % of the products with a weight stay in full precision\n" in shown.said


def test_models_d1_rows_of_an_earlier_release_state_nothing_and_its_run_is_not_refused(
    small: Options, small_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_fit("ptq", tmp_path, "~suite.sets.noise")
    rows = [{key: value for key, value in row.items() if key not in SHARES} for row in run.rows()]
    run.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(coverage, "REFUSED", 0.95)
    done = listened(evaluate, checkpoint(small, run), "evaluate")
    assert "92.7 % of the products with a weight have the weight rounded" in done.said
    added = {row["dataset"]: row["weight_share"] for row in done.rows[len(rows) :] if row["stage"] == "quantized"}
    assert added == {"noise": BLOCKS / (BLOCKS + ENDS)}
    assert "weight_share" not in done.rows[0]


def test_models_d1_rules_that_skip_most_layers_are_named_and_nothing_is_refused(small: Options, tmp_path: Path) -> None:
    patterns = [f"transformer.resblocks.{block}.*" for block in range(3)]
    rules = f"+quant.rules={{{': null, '.join(patterns)}: null}}"
    with StopSignals() as stop:
        config = small("ptq", f"output={tmp_path}", rules)
        said = outline(open_experiment(config, Run(config, "ptq"), "ptq", stop))
    rounded, skipped = (100 * BLOCKS * part / 4 / (BLOCKS + ENDS) for part in (1, 3))
    assert f"{rounded:.1f} % of the products with a weight have the weight rounded" in said
    named = f"quant.rules leave out 12 layers, {skipped:.1f} % of the products with a weight: {', '.join(patterns)}"
    assert f"\n  {named}" in said
    assert rounded < 50
    assert "warning" not in said


def test_rows_say_what_was_trained_on_what(runs: Callable[[str], Done]) -> None:
    done = runs("light_qat_distill")
    found = {stage: done.of(stage) for stage in (*ADAPTED, "temperature")}
    assert [row["method"] for row in found.values()] == ["fp32", *["weight=LSQ(per_channel) act=LSQ"] * 3]
    assert [row["tower"] for row in found.values()] == [None, *["visual"] * 3]
    assert [row["weight_bits"] for row in found.values()] == [None, 8, 8, 8]
    assert [row["objective"] for row in found.values()] == [None, None, *["0.5 contrastive + 0.5 kl"] * 2]
    assert {row["data"] for row in found.values()} == {"embedded"}
    assert {row["activation"] for row in found.values()} == {"gelu"}
    assert found["adapted"]["config"]["fit.lr"] == 1e-6
    assert found["adapted"]["config"]["objective.kl"] == 0.5


# -- the numbers -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def embedded(done: Done, stage: str, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, cosines with the class prompts, and labels, from the stored weights and the images alone."""
    config = done.run.config
    clip = clips.load(config.model)
    visual = clip.visual
    if stage != "fp32":
        visual = quantized_copy(clip.visual, config.quant).eval()
        visual.load_state_dict(
            load_file(done.run.folder / ("quantized.safetensors" if stage == "quantized" else "model.safetensors"))
        )
    images, labels = zip(*[EmbeddedSet(kind, 32)[i] for i in range(32)], strict=True)
    features = normalize(visual(clip.preprocess.normalize(torch.stack(images))), dim=-1)
    head = class_features(clip, CLASS_NAMES, config.suite.templates)
    return features, features @ head.features.T, torch.tensor(labels)


@pytest.mark.parametrize("stage", ["fp32", "quantized", "adapted", "temperature"])
def test_the_rows_are_what_a_plain_evaluation_of_the_stored_model_gives(
    runs: Callable[[str], Done], stage: str
) -> None:
    done = runs("light_qat_distill")
    scale = done.of(stage)["logit_scale"]
    source = "adapted" if stage == "temperature" else stage
    (_, inside, labels), (_, outside, _) = (embedded(done, source, kind) for kind in ("id", "near_ood"))
    logits, other = (scale * cosines.double() for cosines in (inside, outside))
    row = done.of(stage)["metrics"]
    assert row["top1"] == pytest.approx(float((inside.argmax(1) == labels).double().mean()))
    assert row["nll"] == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-5)
    confidence = float(logits.softmax(1).amax(1).mean())
    assert row["confidence_gap"] == pytest.approx(confidence - row["top1"], abs=1e-5)
    truth = np.array([1] * 32 + [0] * 32)
    for score, values in {
        "msp": [z.softmax(1).amax(1) for z in (logits, other)],
        "energy": [z.logsumexp(1) / scale for z in (logits, other)],
        "max_logit": [z.amax(1) for z in (inside.double(), outside.double())],
        "mcm": [z.double().softmax(1).amax(1) for z in (inside, outside)],
    }.items():
        expected = roc_auc_score(truth, torch.cat(values).numpy())
        # two of the 1024 pairs may be too close for two ways of computing float32 features
        assert done.of(stage, "near_ood", score)["metrics"]["auroc"] == pytest.approx(expected, abs=2.1 / 1024)


def test_the_temperature_is_the_best_one_for_the_calibration_images(runs: Callable[[str], Done]) -> None:
    done = runs("light_qat_distill")
    _, cosines, labels = embedded(done, "adapted", "calibration")
    row = done.of("temperature", "calibration", "logit_scale_fit")
    best = row["logit_scale"]

    def nll(scale: float) -> float:
        return float(cross_entropy(scale * cosines.double(), labels))

    assert row["metrics"]["nll"] == pytest.approx(nll(best), rel=1e-5)
    assert row["metrics"]["nll_before"] == pytest.approx(nll(done.of("adapted")["logit_scale"]), rel=1e-5)
    assert nll(best) <= min(nll(best * 1.01), nll(best / 1.01)) or row["metrics"]["at_bound"]
    assert done.of("temperature")["logit_scale"] == best
    assert json.loads((done.run.folder / "scales.json").read_text())["logit_scale"] == done.of("adapted")["logit_scale"]


def test_a_proxy_temperature_uses_captions_and_no_labels(small_fit: Fit, tmp_path: Path) -> None:
    done = listened(small_fit, "ptq", tmp_path, "callbacks.temperature.source=proxy", "quant.weight.bits=3")
    assert {row["stage"] for row in done.rows} == {"fp32", "quantized", "temperature_proxy"}
    assert "refitting the temperature on 16 images of embedded, no labels" in done.said
    assert "after temperature (proxy)" in done.said
    config = done.run.config
    clip, data = clips.load(config.model), instantiate(config.data)
    captioned = data.first(16, clip.preprocess)
    student = quantized_copy(clip.visual, config.quant).eval()
    student.load_state_dict(load_file(done.run.folder / "quantized.safetensors"))
    images, texts = clip.preprocess.normalize(captioned.images), encode_text(clip, captioned.captions).double()
    with torch.no_grad():
        own, teacher = (normalize(v(images), dim=-1).double() @ texts.T for v in (student, clip.visual))
    best = done.of("temperature_proxy", "proxy", "logit_scale_fit")

    def divergence(scale: float) -> float:
        target = (clip.logit_scale * teacher).softmax(1)
        return float(kl_div((scale * own).log_softmax(1), target, reduction="batchmean"))

    scale = best["logit_scale"]
    assert divergence(scale) <= min(divergence(scale * 1.01), divergence(scale / 1.01)) or best["metrics"]["at_bound"]
    assert best["n"] == 16


def test_a_refit_can_be_left_out_or_lack_its_images(small: Options, small_fit: Fit, tmp_path: Path) -> None:
    run = small_fit("fp32", tmp_path, "callbacks.temperature=null")
    assert {row["stage"] for row in run.rows()} == {"fp32"}
    with pytest.raises(UserError, match=r"callbacks\.temperature needs a set with role: calibration.*source=proxy"):
        small_fit("fp32", tmp_path / "without", "~suite.sets.calibration")


def test_seeds_repeat_to_the_last_digit(runs: Callable[[str], Done], small_fit: Fit, tmp_path: Path) -> None:
    once, again = runs("light_qat_distill"), small_fit("light_qat_distill", tmp_path)
    assert again.rows() == once.rows
    for name in ("model.safetensors", "quantized.safetensors", "layers.csv"):
        assert (again.folder / name).read_bytes() == (once.run.folder / name).read_bytes()


def test_an_unquantized_student_leaves_its_teacher_alone(small_fit: Fit, tmp_path: Path) -> None:
    objective = ["objective.contrastive=1", "objective.feature_mse=1"]
    run = small_fit("fp32", tmp_path, *objective, "fit.steps=3", "fit.lr=1e-3", "fit.batch_size=8")
    distance = pl.read_csv(run.folder / "metrics.csv")["train/feature_mse"].drop_nulls().to_list()
    assert distance[0] == pytest.approx(0, abs=1e-6)
    assert distance[-1] > 1e-5
    assert {row["stage"] for row in run.rows()} == {"fp32", "adapted", "probe", "temperature"}


# -- nothing twice ---------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    kept = ("results.jsonl", "scales.json", "model.safetensors", "quantized.safetensors", "layers.csv")
    return {name: (folder / name).read_bytes() for name in kept if (folder / name).exists()}


@pytest.mark.parametrize("recipe", ["fp32", "ptq", "light_qat_distill", "pretrain_tiny"])
def test_the_same_command_again_computes_nothing(
    runs: Callable[[str], Done], small_fit: Fit, encoded: list[int], recipe: str
) -> None:
    first = runs(recipe)
    encoded.clear()
    before = snapshot(first.run.folder)
    again = listened(small_fit, recipe, first.run.folder.parent)
    assert encoded == []
    assert again.run.folder == first.run.folder
    assert snapshot(first.run.folder) == before
    assert "nothing left to compute" in again.said
    assert "was finished before" in again.said.replace("\n", " ")
    table = first.said[first.said.index("┏") : first.said.index("└")]
    assert table in again.said


def test_a_grown_suite_embeds_the_new_set_alone(
    small: Options, small_fit: Fit, tmp_path: Path, encoded: list[int]
) -> None:
    small_fit("ptq", tmp_path, "~suite.sets.noise")
    encoded.clear()
    done = listened(small_fit, "ptq", tmp_path)
    # in full precision and quantized (the refit is another reading); the features of its reference are there
    assert sum(encoded) == 2 * 32
    assert "scoring: 64 images fp32 + 64 images quantized" in done.said
    for stage in ("fp32", "quantized", "temperature"):
        at = {(row["dataset"], row["score"]) for row in done.rows if row["stage"] == stage}
        assert at >= (FITTED if stage == "temperature" else ROWS)
        frame = pl.read_parquet(done.run.folder / "predictions" / f"{stage}.parquet")
        assert frame.group_by("dataset").len().sort("dataset").rows() == [("id", 32), ("near_ood", 32), ("noise", 32)]


def test_results_of_other_images_are_not_mistaken_for_these(small_fit: Fit, tmp_path: Path, encoded: list[int]) -> None:
    small_fit("fp32", tmp_path)
    encoded.clear()
    done = listened(small_fit, "fp32", tmp_path, "suite.seed=1")
    assert sum(encoded) == (3 + 1) * 32
    of_id = [row for row in done.rows if (row["stage"], row["dataset"], row["score"]) == ("fp32", "id", "zero_shot")]
    assert len(of_id) == 2
    first, again = (listened(small_fit, "fp32", tmp_path, *options).said for options in ([], ["suite.seed=1"]))
    table, other = (said.split("rows  ")[0] for said in (first, again))
    assert table != other  # each shows its own images' numbers, whichever were stored last


# -- progress, and a stop after the last step ------------------------------------------------------------------------


def test_the_time_left_is_told_of_passes_and_training_alone(small_fit: Fit, tmp_path: Path, cold: None) -> None:
    """The probes inside training, of two batches each, are no steps."""
    lines = listened(small_fit, "light_qat_lsq_pc", tmp_path, "fit.steps=4").said.splitlines()
    told = [line.split(",")[0].strip() for line in lines if line.endswith("s left")]
    assert told == ["3/3 batches", "3/3 batches", "3/4 steps", "3/3 batches"]


def test_a_learned_logit_scale_outlives_a_stop_after_the_last_step(small_fit: Fit, tmp_path: Path) -> None:
    options = ["fit.checkpoint_every=2", "callbacks.temperature=null", "fit.eval_every=0", "fit.lr=0.1"]
    run = small_fit("pretrain_tiny", tmp_path, *options)
    learned = json.loads((run.folder / "scales.json").read_text())
    for name in ("scales.json", "model.safetensors"):
        (run.folder / name).unlink()
    small_fit("pretrain_tiny", tmp_path, *options)
    assert json.loads((run.folder / "scales.json").read_text()) == learned


# -- evaluate --------------------------------------------------------------------------------------------------------


def test_an_unquantized_model_scores_as_it_does_in_a_fit(
    runs: Callable[[str], Done], small: Options, tmp_path: Path
) -> None:
    done = listened(evaluate, small("fp32", f"output={tmp_path}"), "evaluate")
    assert {row["stage"] for row in done.rows} == {"fp32", "temperature"}
    for row in runs("ptq").rows:
        if row["stage"] == "fp32":
            assert done.of("fp32", row["dataset"], row["score"])["metrics"] == row["metrics"]
    assert not (done.run.folder / "layers.csv").exists()


def test_quantization_and_training_options_do_not_reach_an_unquantized_model(small: Options, tmp_path: Path) -> None:
    [with_options], [without], [from_scratch] = (
        evaluate(small(recipe, f"output={tmp_path}", "suite.images=4", "~suite.sets.noise"), "evaluate")
        for recipe in ("light_qat", "fp32", "pretrain_tiny")
    )
    assert with_options.folder == without.folder
    assert from_scratch.rows()[0]["pretrained"] == "tiny"


@pytest.fixture(scope="module")
def without_noise(small_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_fit("light_qat_lsq", tmp_path_factory.mktemp("finished"), "~suite.sets.noise")


@pytest.fixture
def finished(small: Options, without_noise: Run, tmp_path: Path) -> Run:
    """A run of its own that a test may add rows to: a copy of one that was done once."""
    run = Run(small("light_qat_lsq", f"output={tmp_path / 'finished'}", "~suite.sets.noise"), "light_qat_lsq")
    shutil.copytree(without_noise.folder, run.folder)
    return run


def checkpoint(small: Options, run: Run, *overrides: str) -> Config:
    return small("fp32", f"checkpoint={run.folder}", f"output={run.folder.parent}", *overrides)


def test_a_finished_run_is_scored_on_more(
    small: Options, finished: Run, runs: Callable[[str], Done], encoded: list[int]
) -> None:
    before = finished.rows()
    encoded.clear()
    done = listened(evaluate, checkpoint(small, finished), "evaluate")
    assert done.run.folder == finished.folder
    assert done.rows[: len(before)] == before
    added = done.rows[len(before) :]
    assert {(row["stage"], row["dataset"]) for row in added} == {
        (stage, "noise") for stage in ("fp32", "adapted", "temperature")
    }
    assert sum(encoded) == 2 * 2 * 32  # two sets, in full precision too
    for row in added:
        expected = runs("light_qat_lsq").of(row["stage"], "noise", row["score"])
        assert {**row, "config": None} == {**expected, "config": None}
    encoded.clear()
    again = listened(evaluate, checkpoint(small, finished), "evaluate")
    assert encoded == []
    assert again.rows == done.rows


def test_a_finished_run_is_scored_on_another_suite(small: Options, finished: Run, tmp_path: Path) -> None:
    for i in range(16):
        (tmp_path / "shapes" / CLASS_NAMES[i]).mkdir(parents=True)
        Image.fromarray(EmbeddedSet("id", 16)[i][0].permute(1, 2, 0).numpy()).save(
            tmp_path / "shapes" / CLASS_NAMES[i] / "0.png"
        )
    sets = "{shapes: {path: shapes, role: id}, fit: {path: shapes, role: calibration}}"
    config = checkpoint(small, finished, "suite.class_names=null")
    config.suite = compose(
        "recipe=fp32",
        "suite=folders",
        f"suite.root={tmp_path}",
        f"+suite.sets={sets}",
        f"suite.class_names=[{','.join(CLASS_NAMES)}]",
    ).suite
    done = listened(evaluate, config, "evaluate")
    assert done.of("adapted", "shapes")["n"] == 16
    # the very images of another set of the same run
    known = pl.read_parquet(done.run.folder / "predictions" / "adapted.parquet")
    one, other = (known.filter(dataset=name).filter(pl.col("index") < 16).sort("label") for name in ("id", "shapes"))
    np.testing.assert_allclose(one["confidence"], other["confidence"], atol=1e-5)
    assert "reliability.png" in done.said


def test_rows_added_at_another_precision_belong_to_the_run(small: Options, finished: Run) -> None:
    (run,) = evaluate(checkpoint(small, finished, "trainer.precision=bf16-mixed"), "evaluate")
    assert {row["run_id"] for row in run.rows()} == {finished.id}
    added = [row for row in run.rows() if "precision" in row and row["config"]["trainer.precision"] == "bf16-mixed"]
    assert {row["precision"] for row in added} == {"bf16-mixed"}
    assert "32-true" in {row.get("precision") for row in run.rows()}


def test_a_checkpoint_that_is_no_run_is_refused(small: Options, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.yaml is not there: checkpoint= wants the folder of a run"):
        evaluate(small("fp32", f"checkpoint={tmp_path}"), "evaluate")


def test_without_an_evaluation_its_sets_are_left_out_and_the_run_ends(small: Options, tmp_path: Path) -> None:
    config = small("ptq", f"output={tmp_path}", "callbacks.ood=null", "callbacks.temperature=null")
    first = listened(fit, config, "ptq")
    assert {row["dataset"] for row in first.rows} == {"id", "noise"}
    assert "finished before" in listened(fit, config, "ptq").said


def test_another_calibration_set_gives_other_rows_after_the_refit(small: Options, tmp_path: Path) -> None:
    """The refitted scale belongs to the images that it was fitted on."""
    rows: list[Any] = []
    for path in ("embedded:calibration", "embedded:unusual"):
        options = f"output={tmp_path}", "callbacks.ood=null", f"suite.sets.calibration.path='{path}'"
        done = listened(fit, small("ptq", *options), "ptq")
        rows = [row for row in done.rows if row["stage"] == "temperature" and row["dataset"] == "id"]
    assert len(rows) == 2
    assert rows[0]["logit_scale"] != rows[1]["logit_scale"]


def test_an_unfinished_run_is_not_finished_by_scoring_it(small: Options, finished: Run, tmp_path: Path) -> None:
    for name in ("config.yaml", "quantized.safetensors"):
        (tmp_path / name).write_bytes((finished.folder / name).read_bytes())
    with pytest.raises(UserError, match=r"has no model\.safetensors: the run is not finished"):
        evaluate(small("fp32", f"checkpoint={tmp_path}"), "evaluate")


# -- data ------------------------------------------------------------------------------------------------------------


def cc3m(small: Options, recipe: str, output: Path, shards: Any, *overrides: str) -> Config:
    config = small(recipe, f"output={output}", *overrides)
    config.data = compose(f"recipe={recipe}", "data=cc3m", "data.name=mine", f"data.shards='{shards}'").data
    return config


@pytest.mark.parametrize("recipe", ["ptq", "light_qat"])
def test_a_missing_shard_ends_the_run_before_anything_is_scored(
    small: Options, tmp_path: Path, encoded: list[int], recipe: str
) -> None:
    write_caption_shards(tmp_path / "shards", 20, per_shard=10)
    config = cc3m(small, recipe, tmp_path / "runs", f"{tmp_path}/shards/{{00000..00002}}.tar")
    with pytest.raises(UserError, match=r"00002\.tar does not exist \(1 of 3 local shards are missing\)"):
        fit(config, recipe)
    assert encoded == []
    assert not list(tmp_path.rglob("results.jsonl"))


def test_a_corrupt_image_is_replaced_and_counted(small: Options, tmp_path: Path) -> None:
    (shard,) = write_caption_shards(tmp_path / "shards", 40)
    with tarfile.open(shard, "r") as clean, tarfile.open(tmp_path / "damaged.tar", "w") as damaged:
        for member in clean.getmembers():
            content = clean.extractfile(member).read()  # type: ignore[union-attr]
            if member.name == "000003.jpg":
                content = content[:60]
            member.size = len(content)
            damaged.addfile(member, io.BytesIO(content))
    config = cc3m(small, "light_qat", tmp_path / "runs", tmp_path / "damaged.tar", "fit.unique_samples=20")
    done = listened(fit, config, "light_qat")
    assert "corrupt image" in done.said
    assert "samples skipped and replaced: " in done.said
    assert {row["data"] for row in done.rows if row["stage"] == "adapted"} == {"mine"}


def test_an_image_tower_learns_from_a_bank_of_texts(
    small: Options, runs: Callable[[str], Done], tmp_path: Path
) -> None:
    """No text tower anywhere: class embeddings for the suite, other texts for the objective and the refit."""
    clip = clips.load(ModelConfig())
    save_file(clip.visual.state_dict(), tmp_path / "image.safetensors")
    texts = ["a small circle", "a star in the sky", "a red square"]
    tables = {
        "classes": TextTable(class_features(clip, CLASS_NAMES, ["a photo of a {}"]).features, CLASS_NAMES, ""),
        "bank": TextTable(encode_text(clip, texts), texts, ""),
    }
    save_text_table(tmp_path / "texts.safetensors", tables)
    write_caption_shards(tmp_path / "shards", 40)
    config = cc3m(small, "light_qat_distill", tmp_path / "runs", tmp_path / "shards", "objective.contrastive=0")
    config.model.checkpoint = str(tmp_path / "image.safetensors")
    config.model.text_features = f"{tmp_path}/texts.safetensors:classes"
    config.data["text_bank"] = f"{tmp_path}/texts.safetensors:bank"
    config.callbacks["temperature"]["source"] = "proxy"
    done = listened(fit, config, "light_qat_distill")
    for score in ("max_logit", "mcm"):  # the ones that do not depend on the logit scale, which nothing tells here
        with_both = runs("light_qat_distill").of("fp32", "near_ood", score)["metrics"]["auroc"]
        assert done.of("fp32", "near_ood", score)["metrics"]["auroc"] == pytest.approx(with_both, abs=2.1 / 1024)
    assert done.of("adapted")["objective"] == "0.5 kl"
    assert done.of("adapted")["prompts"] == "texts.safetensors:classes"
    assert done.of("fp32")["logit_scale"] == 100
    assert done.of("temperature_proxy", "proxy", "logit_scale_fit")["n"] == 16
    config.objective.contrastive = 0.5
    with pytest.raises(UserError, match=r"objective\.contrastive needs a text tower"):
        fit(config, "light_qat_distill")


# -- what cannot be run is told before anything is scored -------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("light_qat", ["suite.probe_sets=[id,near]"], r"suite\.probe_sets names 'near'.*did you mean 'near_ood'"),
        ("fp32", ["checkpoint=runs/mine"], r"checkpoint=runs/mine names a run to score, with qatlab\.evaluate"),
        ("light_qat", ["~suite.sets.calibration"], r"callbacks\.temperature needs a set with role: calibration"),
        ("light_qat", ["fit.schedule=cosin"], r"fit\.schedule=cosin is unknown"),
        ("ptq", ["fit.steps=2"], r"no objective: .* or leave fit\.steps out where nothing is to be trained"),
        ("light_qat", ["quant.kernels=compield"], r"quant\.kernels=compield is unknown .did you mean 'compiled'"),
        ("light_qat", ["quant.matmul=int9"], r"quant\.matmul=int9 is unknown .did you mean 'int8'"),
        (
            "light_qat",
            ["quant.matmul=int8", "~quant/act"],
            r"quant\.matmul=int8 multiplies integer codes, and no layer",
        ),
        (
            "light_qat",
            ["fit.unique_samples=100000"],
            r"fit\.unique_samples=100000: data=embedded holds 64 image–caption pairs",
        ),
        ("mixed_precision", ["quant.plan.average_bits=2"], r"quant\.plan allows 2 bits for each weight"),
        ("mixed_precision", ["quant.plan.average_bits=8.0", "quant.plan.candidates=[4]"], r"no layer gets more than 4"),
        ("light_qat", ["objective.contrastive=0"], r"no objective: give one of objective\.contrastive"),
        ("pretrain_tiny", ["quant/weight=minmax"], r"fit\.from_scratch=true trains both towers in full precision"),
        ("pretrain_tiny", ["data=embedded"], r"objective\.class_cross_entropy needs labelled training images"),
        ("ptq", ["+quant.rules={block.*: null}"], r"quant\.rules has the pattern 'block\.\*', which matches no layer"),
    ],
)
def test_a_mistake_ends_the_run_before_anything_is_scored(
    small_fit: Fit, tmp_path: Path, recipe: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        small_fit(recipe, tmp_path, *overrides)
    assert not list(tmp_path.rglob("results.jsonl"))


# -- options that reach the quantizers -------------------------------------------------------------------------------


def test_rules_patch_convolution_and_projection_reach_the_model(
    small_fit: Fit, tmp_path: Path, encoded: list[int]
) -> None:
    overrides = [
        "+quant.rules={transformer.resblocks.0.*: null, *.c_proj: {weight: {bits: 4}, act: null}}",
        "quant.patch_conv=true",
        "quant.final_proj=true",
    ]
    done = listened(small_fit, "light_qat_lsq", tmp_path, *overrides)
    layers = pl.read_csv(done.run.folder / "layers.csv")
    assert len(layers) == 12 + 2
    assert {"conv1", "proj"} <= set(layers["layer"])
    assert not any(name.startswith("transformer.resblocks.0.") for name in layers["layer"])
    bits = {row["layer"]: (row["weight_bits"], row["act_bits"]) for row in layers.iter_rows(named=True)}
    assert bits["transformer.resblocks.1.mlp.c_proj"] == (4, None)
    assert bits["transformer.resblocks.1.mlp.c_fc"] == bits["conv1"] == bits["proj"] == (8, 8)
    # rows say what the layers have, on average over the weights, and what made it so
    sizes = {row["layer"]: row["in_features"] * row["out_features"] for row in layers.iter_rows(named=True)}
    average = sum(bits[name][0] * size for name, size in sizes.items()) / sum(sizes.values())
    for stage in ("quantized", "adapted", "temperature"):
        row = done.of(stage)
        assert row["weight_bits"] == pytest.approx(average)
        assert 4 < row["weight_bits"] < 8
        assert row["act_bits"] == 8
        assert row["method"].endswith(
            " patch_conv final_proj rules(transformer.resblocks.0.*=null, *.c_proj.weight.bits=4, *.c_proj.act=null)"
        )
    assert done.of("fp32")["weight_bits"] is None
    encoded.clear()
    again = listened(small_fit, "light_qat_lsq", tmp_path, *overrides)
    assert encoded == []
    assert again.rows == done.rows


# -- curves ----------------------------------------------------------------------------------------------------------


def test_curves_go_to_an_offline_wandb_run_that_is_named(
    small_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.delenv("WANDB_MODE")
    try:
        done = listened(small_fit, "light_qat", tmp_path, "wandb.mode=offline")
    finally:
        wandb.finish()
    (offline,) = (done.run.folder / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))
    said = done.said.replace("\n", " ")
    assert str(offline) in said
    assert f"wandb sync {offline}" in said
