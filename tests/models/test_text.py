"""The text tower quantized: which layers, what becomes of the classes, and what a caption still cannot see."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from qatlab.config import ModelConfig, QuantConfig, compose
from qatlab.core.errors import UserError
from qatlab.data.embedded.sets import CLASS_NAMES, EmbeddedSet
from qatlab.data.embedded.vocabulary import END
from qatlab.models import clip as clips
from qatlab.models.clip import Clip
from qatlab.models.quantized import fitted_text, load_quantized, quantized_copy, quantized_text
from qatlab.models.text_tower import TextTower
from qatlab.quant import calibrate, quant_layers, verify
from qatlab.quant.layers.convert import layer_names
from qatlab.results.run import Run
from qatlab.stages import quantize as quantizing
from qatlab.stages import summary

Fit = Callable[..., Run]
BRIEF = ["suite.images=16", "callbacks.ood=null", "callbacks.temperature=null"]
TEMPLATES = ["a photo of a {}", "there is a {}"]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return clips.load(ModelConfig())


@pytest.fixture(scope="module")
def captions(clip: Clip) -> Tensor:
    assert clip.tokenizer is not None
    return clip.tokenizer(["a photo of a circle", "a small red star in the sky", "a square"])


@pytest.fixture(
    scope="module",
    params=[["quant.tower=both"], ["quant.tower=text"], ["quant.tower=both", "quant/rewrite=smoothquant"]],
    ids=["both", "text", "both smoothed"],
)
def options(request: pytest.FixtureRequest) -> list[str]:
    return [*request.param, "quant.weight.bits=3", f"suite.templates={TEMPLATES}", *BRIEF]


@pytest.fixture(scope="module")
def run(options: list[str], small_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_fit("ptq", tmp_path_factory.mktemp("text"), *options)


def rounded(clip: Clip, tower: str, rules: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weight bits by layer, None for a layer that is skipped, of the image and of the text tower."""
    config = compose("recipe=ptq", f"quant.tower={tower}").quant
    config.rules = rules
    assert clip.model is not None
    towers = TextTower(clip.model), quantized_text(clip.model, config)
    layers = quant_layers(quantized_copy(clip.visual, config)), quant_layers(towers[1])
    names = layer_names(clip.visual), layer_names(towers[0])
    bits: Any = [
        {name: of[name].weight_quantizer.bits if name in of else None for name in all_of}
        for of, all_of in zip(layers, names, strict=True)
    ]
    return bits[0], bits[1]


# -- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["minmax", "lsq_pc", "raana", "lr_qat", "mse", "gptq"])
def test_every_layer_of_the_text_tower_is_rounded_in_a_real_forward(clip: Clip, captions: Tensor, weight: str) -> None:
    config = compose("recipe=ptq", f"quant/weight={weight}", "quant.tower=text").quant
    assert clip.model is not None
    tower = quantized_text(clip.model, config).eval()
    calibrate(tower, [captions])
    rows = verify(tower, captions)
    names = layer_names(TextTower(clip.model))
    assert {(row["layer"], row["tensor"]) for row in rows} == {(n, t) for n in names for t in ("weight", "act")}
    assert all(name.startswith("text.transformer.resblocks.") for name in names)
    assert len(names) == 4 * len(clip.model.transformer.resblocks)  # type: ignore[arg-type, union-attr]
    with torch.no_grad():
        exact = clip.model.encode_text(captions)  # type: ignore[operator]
        cosine = torch.cosine_similarity(tower(captions), exact)
        assert torch.equal(TextTower(clip.model)(captions), exact)
    assert float(cosine.min()) > 0.9
    assert not torch.equal(tower(captions), exact)


def test_the_text_tower_holds_nothing_of_the_image_tower_and_changes_nothing(clip: Clip) -> None:
    assert clip.model is not None
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    tower = quantized_text(clip.model, compose("recipe=ptq", "quant.tower=text").quant)
    assert not any("visual" in name for name in tower.state_dict())
    assert not quant_layers(clip.model)
    for parameter in tower.parameters():
        parameter.data.zero_()
    assert all(torch.equal(before[name], value) for name, value in clip.model.state_dict().items())


def test_a_caption_still_reads_from_left_to_right(clip: Clip, captions: Tensor) -> None:
    """What stands behind the end of a text, and what another text says there, is nothing to it."""
    assert clip.model is not None
    tower = quantized_text(clip.model, compose("recipe=ptq", "quant.tower=text").quant).eval()
    calibrate(tower, [captions])
    changed = captions.clone()
    for row in changed:
        row[int((row == END).nonzero()[0]) + 1 :] = 7
    assert not torch.equal(changed, captions)
    earlier = captions.clone()
    earlier[:, 1] = 7
    with torch.no_grad():
        found = tower(captions)
        assert torch.equal(tower(changed), found)
        assert not torch.isclose(tower(earlier), found).all(dim=1).any()


# -- rules -----------------------------------------------------------------------------------------------------------


def test_rules_reach_the_tower_that_they_name(clip: Clip) -> None:
    four = {"weight": {"bits": 4}}
    image, text = rounded(clip, "both", {"text.*.c_fc": four, "text.*.0.attn.*": None})
    assert set(image.values()) == {8}
    assert {name for name, bits in text.items() if bits == 4} == {name for name in text if name.endswith("c_fc")}
    skipped = {name for name, bits in text.items() if bits is None}
    assert skipped == {f"text.transformer.resblocks.0.attn.{part}_proj" for part in ("in", "out")}

    image, text = rounded(clip, "both", {"*.c_fc": four})
    for bits in (image, text):
        assert {name for name, b in bits.items() if b == 4} == {name for name in bits if name.endswith("c_fc")}

    image, text = rounded(clip, "both", {"transformer.resblocks.0.*": None})
    assert sum(bits is None for bits in image.values()) == 4
    assert set(text.values()) == {8}


def test_the_first_rule_that_matches_decides_in_both_towers(clip: Clip) -> None:
    rules = {"text.*.c_fc": {"weight": {"bits": 2}}, "*.c_fc": {"weight": {"bits": 4}}, "*": {"weight": {"bits": 6}}}
    image, text = rounded(clip, "both", rules)
    assert {name.endswith("c_fc"): bits for name, bits in image.items()} == {True: 4, False: 6}
    assert {name.endswith("c_fc"): bits for name, bits in text.items()} == {True: 2, False: 6}


@pytest.mark.parametrize(
    ("tower", "pattern", "message"),
    [
        ("visual", "text.*", r"'text\.\*', and quant\.tower=visual leaves the text tower as it is.*quant\.tower=both"),
        ("both", "text.nothing", r"'text\.nothing', which matches no layer.*text\.transformer\.resblocks\.0"),
        ("both", "nothing*", r"'nothing\*', which matches no layer"),
        ("both", "text.transformer.resblocks.9.*", r"matches no layer"),
        ("text", "nothing", r"'nothing', which matches no layer.*text\.transformer"),
        ("text", "transformer.*", r"'transformer\.\*', which matches no layer.*text\.transformer"),
    ],
)
def test_a_rule_that_no_quantized_tower_heeds_is_a_mistake(clip: Clip, tower: str, pattern: str, message: str) -> None:
    config = compose("recipe=ptq", f"quant.tower={tower}").quant
    config.rules = {pattern: None}
    assert clip.model is not None

    def build() -> None:
        if tower != "text":
            quantized_copy(clip.visual, config)
        if tower != "visual":
            quantized_text(clip.model, config)

    with pytest.raises(UserError, match=message):
        build()


def test_rules_of_the_text_tower_go_through_a_run_with_a_plan(small_fit: Fit, tmp_path: Path) -> None:
    rules = "+quant.rules={text.*.c_fc: {weight: {bits: 2}}, transformer.resblocks.0.*: {weight: {bits: 8}}}"
    done = small_fit("mixed_precision", tmp_path, "quant.tower=both", rules, *BRIEF)
    bits = {row["layer"]: row["weight_bits"] for row in pl.read_csv(done.folder / "layers.csv").iter_rows(named=True)}
    text = {name: b for name, b in bits.items() if name.startswith("text.")}
    assert {b for name, b in text.items() if name.endswith("c_fc")} == {2}
    assert {b for name, b in bits.items() if name.startswith("transformer.resblocks.0.")} == {8}
    layers_csv = pl.read_csv(done.folder / "layers.csv")
    sizes = (layers_csv["in_features"] * layers_csv["out_features"]).to_numpy()
    # each tower has the budget of its planned layers for itself
    planned = {
        "image": [not name.startswith(("text.", "transformer.resblocks.0.")) for name in layers_csv["layer"]],
        "text": [name.startswith("text.") and not name.endswith("c_fc") for name in layers_csv["layer"]],
    }
    for of_tower in planned.values():
        weights, chosen = sizes[of_tower], layers_csv["weight_bits"].to_numpy()[of_tower]
        assert len(set(chosen)) > 1
        budget = done.config.quant.plan["average_bits"]
        assert budget - 1 < float((weights * chosen).sum() / weights.sum()) <= budget
    average = float((sizes * layers_csv["weight_bits"].to_numpy()).sum() / sizes.sum())
    row = next(row for row in done.rows() if row["stage"] == "quantized")
    assert row["weight_bits"] == pytest.approx(average)  # of both towers
    assert " tower=both rules(text.*.c_fc.weight.bits=2, " in row["method"]
    for name in ("quantized", "text"):
        layers = quant_layers(load_quantized(done.folder / f"{name}.safetensors"))
        assert all(layer.weight_quantizer.bits == bits[layer_name] for layer_name, layer in layers.items())


# -- what it does to the classes -------------------------------------------------------------------------------------


@torch.no_grad()
def heads(clip: Clip, run: Run) -> tuple[Tensor, Tensor]:
    """The classes of the full-precision and of the stored text tower, (C, D) float64 unit vectors, prompt by prompt."""
    assert clip.tokenizer is not None
    assert clip.model is not None
    towers: list[Any] = [clip.model.encode_text, load_quantized(run.folder / "text.safetensors")]
    found = []
    for tower in towers:
        rows = []
        for name in CLASS_NAMES:
            features = tower(clip.tokenizer([template.format(name) for template in TEMPLATES])).double()
            mean = (features / features.norm(dim=1, keepdim=True)).mean(0)
            rows.append(mean / mean.norm())
        found.append(torch.stack(rows))
    return found[0], found[1]


def test_the_drift_of_every_class_is_written(clip: Clip, run: Run) -> None:
    before, after = heads(clip, run)
    drift = pl.read_csv(run.folder / "class_drift.csv")
    assert drift["class"].to_list() == CLASS_NAMES
    assert set(drift["reference"]) == {"id"}
    cosines = (before * after).sum(1)
    torch.testing.assert_close(torch.tensor(drift["cosine"].to_list()).double(), cosines, rtol=0, atol=1e-6)
    assert float(cosines.max()) < 0.999  # three bits: it moved
    rows = [row for row in run.rows() if row["stage"] == "quantized"]
    assert rows
    for row in rows:
        assert row["class_cosine_mean"] == pytest.approx(float(cosines.mean()), abs=1e-6)
        assert row["class_cosine_min"] == pytest.approx(float(cosines.min()), abs=1e-6)
        assert row["tower"] == run.config.quant.tower
    assert not any("class_cosine_mean" in row for row in run.rows() if row["stage"] == "fp32")


@torch.no_grad()
def test_the_quantized_stage_is_scored_against_the_quantized_classes(clip: Clip, run: Run) -> None:
    images, labels = zip(*[EmbeddedSet("id", 16)[i] for i in range(16)], strict=True)
    pixels = clip.preprocess.normalize(torch.stack(images))
    for stage, head in zip(("fp32", "quantized"), heads(clip, run), strict=True):
        moved = stage == "quantized" and run.config.quant.tower == "both"
        visual = load_quantized(run.folder / "quantized.safetensors") if moved else clip.visual
        features = visual(pixels).double()
        logits = clip.logit_scale * (features / features.norm(dim=1, keepdim=True)) @ head.T
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
        (row,) = [r for r in run.rows() if (r["stage"], r["dataset"], r["score"]) == (stage, "id", "zero_shot")]
        assert row["metrics"]["nll"] == pytest.approx(float(nll), rel=1e-4)


def test_models_d1_the_rounded_products_of_all_the_towers_that_are_named_are_in_every_row(run: Run) -> None:
    # 17 tokens of 192, 4 blocks, a patch convolution and a projection; 16 tokens of 96, 2 blocks and a projection
    image, text = (4 * 12 * 192**2 * 17, 16 * 3 * 16**2 * 192 + 192 * 64), (2 * 12 * 96**2 * 16, 96 * 64)
    towers = [text] if run.config.quant.tower == "text" else [image, text]
    rounded, left = (sum(of) for of in zip(*towers, strict=True))
    rows = [row for row in run.rows() if row["stage"] == "quantized"]
    assert rows
    for row in rows:
        assert row["weight_share"] == row["act_share"] == row["product_share"] == rounded / (rounded + left)
        assert row["skipped_share"] == 0
    assert {row["weight_share"] for row in run.rows() if row["stage"] == "fp32"} == {None}


def test_a_rewrite_smooths_both_towers(run: Run) -> None:
    for name in ("quantized", "text"):
        if (path := run.folder / f"{name}.safetensors").exists():
            added = [key for key in load_quantized(path).state_dict() if key.endswith("mlp.smooth.factor")]
            assert len(added) == ((4 if name == "quantized" else 2) if run.config.quant.rewrite else 0)


def test_a_text_tower_alone_takes_a_rewrite_a_plan_and_its_last_layer(
    clip: Clip, captions: Tensor, small_fit: Fit, tmp_path: Path
) -> None:
    slots = ["quant.tower=text", "quant.last=true", "quant/rewrite=smoothquant"]
    done = small_fit("mixed_precision", tmp_path, *slots, *BRIEF)
    layers = quant_layers(load_quantized(done.folder / "text.safetensors"))
    bits = {row["layer"]: row["weight_bits"] for row in pl.read_csv(done.folder / "layers.csv").iter_rows(named=True)}
    assert set(layers) == set(bits) == {*layer_names(TextTower(clip.model), final_proj=True)}
    assert "text.text_projection" in bits
    assert {name: layer.weight_quantizer.bits for name, layer in layers.items()} == bits  # type: ignore[union-attr]
    assert len(set(bits.values())) > 1
    row = next(row for row in done.rows() if row["stage"] == "quantized")
    assert row["product_share"] == 1
    assert row["weight_bits"] < 8
    assert "rewrite=SmoothQuant" in row["method"]
    # the options of the run name no layer, and those that its file tells name each
    assert not done.config.quant.rules


def test_layers_of_both_towers_are_reported(run: Run) -> None:
    rows = list(pl.read_csv(run.folder / "layers.csv").iter_rows(named=True))
    text = [row for row in rows if row["layer"].startswith("text.")]
    assert len(text) == 4 * len({row["layer"].split(".")[3] for row in text})
    assert (len(text) < len(rows)) == (run.config.quant.tower == "both")
    assert all(math.isfinite(row["output_sqnr_db"]) for row in rows)


def test_a_second_start_reads_the_text_tower_back(
    clip: Clip, run: Run, options: list[str], small_fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {name: (run.folder / name).read_bytes() for name in ("text.safetensors", "class_drift.csv")}
    seen: dict[str, Any] = {}
    conclude = summary.conclude

    def watched(experiments: Any) -> None:
        (experiment,) = experiments
        seen.update(classes=experiment.towers.student.heads["id"].classes.features, facts=experiment.facts("quantized"))
        conclude(experiments)

    def refuse(*_: Any) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(summary, "conclude", watched)
    monkeypatch.setattr(quantizing, "fitted_text", refuse)
    monkeypatch.setattr(quantizing, "fitted_copy", refuse)
    rows = run.rows()
    again = small_fit("ptq", run.folder.parent, *options)
    assert again.rows() == rows
    _, after = heads(clip, run)
    torch.testing.assert_close(seen["classes"].double(), after, rtol=0, atol=1e-6)
    row = next(row for row in rows if (row["stage"], row["dataset"]) == ("quantized", "id"))
    assert seen["facts"]["class_cosine_mean"] == row["class_cosine_mean"]
    for name, content in stored.items():
        assert (run.folder / name).read_bytes() == content


@pytest.mark.parametrize(("option", "value"), [("adapter", {"_target_": "somewhere.Class"}), ("first", True)])
def test_options_of_the_image_tower_are_refused_where_it_stays_as_it_is(clip: Clip, option: str, value: Any) -> None:
    one = {"_target_": "qatlab.quant.MinMax", "bits": 8}
    config = QuantConfig(weight=one, tower="text", **{option: value})
    for build in (quantized_text, lambda model, config: fitted_text(model, config, lambda: [])):
        with pytest.raises(UserError, match=rf"quant\.{option} is for the image tower, which quant\.tower=text leaves"):
            build(clip.model, config)  # type: ignore[arg-type]
