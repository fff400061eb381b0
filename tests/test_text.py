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

from qatlab import clip as clips
from qatlab import quantizing, report
from qatlab.clip import Clip
from qatlab.config import ModelConfig, QuantConfig, compose
from qatlab.data.embedded import CLASS_NAMES, EmbeddedSet
from qatlab.data.vocabulary import END
from qatlab.errors import UserError
from qatlab.quant import calibrate, quant_layers, verify
from qatlab.quant.convert import layer_names
from qatlab.quantized import load_quantized, quantized_copy, quantized_text
from qatlab.results import Run
from qatlab.text import TextTower

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


@pytest.fixture(scope="module", params=["both", "text"])
def run(request: pytest.FixtureRequest, small_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Run:
    templates = f"suite.templates={TEMPLATES}"
    options = [f"quant.tower={request.param}", "quant.weight.bits=3", templates, *BRIEF]
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


@pytest.mark.parametrize("weight", ["minmax", "lsq_pc", "raana", "lr_qat", "mse"])
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
    assert {name.endswith("c_fc"): b for name, b in text.items()} == {True: 2, False: 8}
    assert {b for name, b in bits.items() if name.startswith("transformer.resblocks.0.")} == {8}
    assert len(set(bits.values()) - {2, 8}) > 0
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


def test_layers_of_both_towers_are_reported(run: Run) -> None:
    rows = list(pl.read_csv(run.folder / "layers.csv").iter_rows(named=True))
    text = [row for row in rows if row["layer"].startswith("text.")]
    assert len(text) == 4 * len({row["layer"].split(".")[3] for row in text})
    assert (len(text) < len(rows)) == (run.config.quant.tower == "both")
    assert all(math.isfinite(row["output_sqnr_db"]) for row in rows)


def test_a_second_start_reads_the_text_tower_back(
    clip: Clip, run: Run, small_fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {name: (run.folder / name).read_bytes() for name in ("text.safetensors", "class_drift.csv")}
    seen: dict[str, Any] = {}
    conclude = report.conclude

    def watched(studies: Any) -> None:
        (study,) = studies
        seen.update(classes=study.module.heads["id"].classes.features, facts=study.facts("quantized"))
        conclude(studies)

    def refuse(*_: Any) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(report, "conclude", watched)
    monkeypatch.setattr(quantizing, "calibrate", refuse)
    monkeypatch.setattr(quantizing, "fitted_copy", refuse)
    rows = run.rows()
    config = run.config.quant
    options = [f"quant.tower={config.tower}", "quant.weight.bits=3", f"suite.templates={TEMPLATES}", *BRIEF]
    again = small_fit("ptq", run.folder.parent, *options)
    assert again.rows() == rows
    _, after = heads(clip, run)
    torch.testing.assert_close(seen["classes"].double(), after, rtol=0, atol=1e-6)
    row = next(row for row in rows if (row["stage"], row["dataset"]) == ("quantized", "id"))
    assert seen["facts"]["class_cosine_mean"] == row["class_cosine_mean"]
    for name, content in stored.items():
        assert (run.folder / name).read_bytes() == content


@pytest.mark.parametrize("slot", ["rewrite", "adapter", "plan"])
def test_options_of_the_image_tower_are_refused_where_it_stays_as_it_is(clip: Clip, slot: str) -> None:
    one = {"_target_": "qatlab.quant.MinMax", "bits": 8}
    config = QuantConfig(weight=one, tower="text", **{slot: {"_target_": "somewhere.Class"}})
    with pytest.raises(UserError, match=rf"quant\.{slot} is for the image tower, which quant\.tower=text leaves"):
        quantized_text(clip.model, config)  # type: ignore[arg-type]
