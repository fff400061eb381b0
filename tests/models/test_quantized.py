"""The file that a run leaves: read back by itself, it gives the run's outputs to the last bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from hydra.errors import HydraException
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qatlab.config import ModelConfig, QuantConfig, compose, default_callbacks, is_quantized, recipe_files
from qatlab.config.blocks import check_blocks
from qatlab.config.explain import explain
from qatlab.core.errors import UserError
from qatlab.data.embedded.sets import EmbeddedSet
from qatlab.models import clip as clips
from qatlab.models.quantized import left_alone, load_quantized, method, quantized_copy, save_quantized, unadapted
from qatlab.models.text_tower import TextTower
from qatlab.quant import quant_layers
from qatlab.quant.layers.walk import evaluating
from qatlab.results.run import Run
from qatlab.stages import quantize as quantizing
from qatlab.stages import train as training

Fit = Callable[..., Run]
WEIGHTS = Path(str(files("qatlab") / "assets" / "tiny.safetensors"))
QUANTIZING = [name for name in recipe_files() if is_quantized(compose(f"recipe={name}").quant)]
# Nothing but calibration and two steps: without an evaluation nothing is scored.
BRIEF = [
    *("fit.eval_every=0", "fit.steps=2", "fit.batch_size=4", "fit.unique_samples=8"),
    *(f"callbacks.{name}=null" for name in default_callbacks()),
]


def looked_at() -> tuple[Tensor, Tensor]:
    """Four normalised images and three tokenized captions."""
    clip = clips.load(ModelConfig())
    assert clip.tokenizer is not None
    images = torch.stack([EmbeddedSet("unusual", 4)[i][0] for i in range(4)])
    return clip.preprocess.normalize(images), clip.tokenizer(["a photo of a circle", "a red star", "a small square"])


@dataclass
class Left:
    """A run's folder without config.yaml and starting weights, and what its own modules gave when they were stored."""

    folder: Path
    outputs: dict[str, Tensor]


@pytest.fixture(scope="module")
def left(small_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Left]]:
    """``left(recipe, *overrides)``: what such a run left, computed once."""
    images, tokens = looked_at()
    found: dict[tuple[str, ...], Left] = {}
    recorded: dict[str, Tensor] = {}

    def saving(module: nn.Module, path: Path, *rest: Any) -> None:
        with evaluating(module):
            recorded[path.name.split(".")[1]] = module(tokens if isinstance(module, TextTower) else images)
        save_quantized(module, path, *rest)

    def get(recipe: str, *overrides: str) -> Left:
        key = (recipe, *overrides)
        if key not in found:
            folder = tmp_path_factory.mktemp(recipe)
            start = shutil.copy(WEIGHTS, folder / "start.safetensors")
            objective = [] if any(vars(compose(f"recipe={recipe}").objective).values()) else ["objective.feature_mse=1"]
            recorded.clear()
            run = small_fit(recipe, folder, f"model.checkpoint={start}", *objective, *BRIEF, *overrides)
            start.rename(folder / "elsewhere")
            (run.folder / "config.yaml").unlink()
            found[key] = Left(run.folder, dict(recorded))
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizing, "save_quantized", saving)
        patch.setattr(training, "save_quantized", saving)
        yield get


@torch.no_grad()
def outputs(path: Path, of: Tensor) -> Tensor:
    module = load_quantized(path)
    assert not module.training
    return module(of)


# -- bit for bit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", QUANTIZING)
def test_what_a_run_leaves_gives_its_outputs_bit_for_bit(left: Callable[..., Left], recipe: str) -> None:
    images, _ = looked_at()
    run = left(recipe)
    assert set(run.outputs) == {"quantized", "model"}
    unquantized = clips.load(ModelConfig()).visual(images)
    for name, expected in run.outputs.items():
        assert torch.equal(outputs(run.folder / f"{name}.safetensors", images), expected)
        assert not torch.equal(unquantized, expected)
    assert torch.equal(outputs(run.folder, images), run.outputs["model"])


@pytest.mark.parametrize("name", [name for name in recipe_files("quant/act") if name in recipe_files("quant/weight")])
def test_every_quantizer_of_weights_and_activations_comes_back(left: Callable[..., Left], name: str) -> None:
    images, _ = looked_at()
    run = left("ptq", f"quant/weight={name}", f"quant/act={name}", "fit.steps=0")
    assert set(run.outputs) == {"quantized"}
    assert torch.equal(outputs(run.folder, images), run.outputs["quantized"])


def test_the_planned_bits_come_back(left: Callable[..., Left]) -> None:
    folder = left("mixed_precision").folder
    rows = pl.read_csv(folder / "layers.csv").iter_rows(named=True)
    planned = {row["layer"]: (row["weight_bits"], row["act_bits"]) for row in rows}
    for name in ("quantized.safetensors", "model.safetensors"):
        layers = quant_layers(load_quantized(folder / name))
        found = {name: (layer.weight_quantizer.bits, layer.act_quantizer.bits) for name, layer in layers.items()}
        assert found == planned
    assert len({bits for bits, _ in planned.values()}) > 1
    assert {bits for _, bits in planned.values()} == {8}


def test_the_text_tower_comes_back_too(left: Callable[..., Left]) -> None:
    images, tokens = looked_at()
    run = left("ptq", "quant.tower=both", "fit.steps=0", "+quant.rules={text.*.c_fc: {weight: {bits: 4}}}")
    assert set(run.outputs) == {"quantized", "text"}
    assert torch.equal(outputs(run.folder / "text.safetensors", tokens), run.outputs["text"])
    assert torch.equal(outputs(run.folder, images), run.outputs["quantized"])
    (run.folder / "quantized.safetensors").unlink()
    assert torch.equal(outputs(run.folder, tokens), run.outputs["text"])


# -- what is no such file --------------------------------------------------------------------------------------------


def test_what_cannot_be_loaded_is_told_in_a_sentence(left: Callable[..., Left], tmp_path: Path) -> None:
    whole = left("ptq").folder / "model.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-1000])
    (tmp_path / "empty.safetensors").touch()
    save_file(load_file(whole), tmp_path / "bare.safetensors")
    clip = clips.load(ModelConfig())
    assert clip.model is not None
    save_quantized(clip.model, tmp_path / "trained.safetensors", ModelConfig(), QuantConfig())
    for name, message in {
        "none.safetensors": r"none\.safetensors is not there: give the folder of a finished run",
        "": r"quantized\.safetensors is not there: give the folder of a finished run",
        "nowhere/at/all": r"all is not there",
        "cut.safetensors": r"cut\.safetensors cannot be read .*: it is damaged, or",
        "empty.safetensors": r"empty\.safetensors cannot be read .*: it is damaged, or",
        "bare.safetensors": r"does not say how it was quantized",
        "trained.safetensors": r"trained\.safetensors does not say how it was quantized",
    }.items():
        with pytest.raises(UserError, match=message) as told:
            load_quantized(tmp_path / name)
        assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="does not say how it was quantized"):
        load_quantized(WEIGHTS)


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("fp32", [], ""),
        ("ptq", [], "weight=MinMax(per_channel) act=MinMax"),
        ("ptq", ["quant/act=percentile"], "weight=MinMax(per_channel) act=MinMax(observer=percentile)"),
        ("ptq", ["quant/act=minmax_asym"], "weight=MinMax(per_channel) act=MinMax(symmetric=False)"),
        ("ptq", ["quant/act=per_token", "quant.act.bits=6"], "weight=MinMax(per_channel) act=DynamicMinMax"),
        ("ptq", ["quant/weight=gptq", "quant.weight.alpha=0.25"], "weight=GPTQ(alpha=0.25) act=MinMax"),
        ("ptq", ["quant/weight=fp8_e4m3", "quant/act=nvfp4"], "weight=FP8(format=e4m3) act=NVFP4"),
        ("ptq", ["quant/weight=mxfp6_e2m3", "~quant/act"], "weight=MX(format=e2m3)"),
        (
            "ptq",
            ["quant/act=mxfp4", "quant.act.scaling=rceil"],
            "weight=MinMax(per_channel) act=MX(format=e2m1, scaling=rceil)",
        ),
        ("ptq", ["quant/compensate=ridge"], "weight=MinMax(per_channel) act=MinMax compensate=Ridge"),
        ("weight_only", [], "weight=MinMax(per_channel, observer=mse)"),
        ("light_qat_lsq", [], "weight=LSQ act=LSQ"),
        ("lsq_plus", [], "weight=LSQ(per_channel) act=LSQPlus"),
        ("raana", [], "weight=RaanA act=MinMax"),
        ("raana", ["quant.weight.kept=0", "seed=3"], "weight=RaanA(kept=0) act=MinMax"),
        ("smoothquant", [], "weight=MinMax(per_channel) act=MinMax rewrite=SmoothQuant(alpha=search)"),
        ("rotation", [], "weight=LSQ(per_channel) act=LSQ(init=mse) rewrite=Rotation"),
        ("qat_lora", [], "weight=MinMax(per_channel) act=MinMax adapter=LoRA"),
        ("lr_qat", [], "weight=LRQAT act=LSQ"),
        (
            "ptq",
            ["quant/attention=log_sqrt2", "quant.attention.per_head=true"],
            "weight=MinMax(per_channel) act=MinMax attention=AttentionProducts(softmax=log_sqrt2, per_head)",
        ),
    ],
)
def test_a_method_is_named_by_what_is_no_default(recipe: str, overrides: list[str], expected: str) -> None:
    assert method(compose(f"recipe={recipe}", *overrides).quant) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["quant.tower=both", "quant.patch_conv=true"], "tower=both patch_conv"),
        (["quant.final_proj=true"], "final_proj"),
        (["quant.tower=text"], "tower=text"),
        (["quant.weight.bits=4"], ""),  # a row says it beside the method
        (
            ["+quant.rules={*.c_proj: {act: null, weight: {bits: 5}}, conv1: null}"],
            "rules(*.c_proj.act=null, *.c_proj.weight.bits=5, conv1=null)",
        ),
    ],
)
def test_using_a10_a_method_names_towers_layers_and_rules(overrides: list[str], expected: str) -> None:
    found = method(compose("recipe=ptq", *overrides).quant)
    assert found == " ".join(filter(None, ["weight=MinMax(per_channel) act=MinMax", expected]))


def test_using_a10_where_nothing_is_rounded_there_is_no_method() -> None:
    assert method(QuantConfig(tower="both", first=True, rules={"conv1": None})) == ""


def test_a_planned_method_shows_its_budget() -> None:
    found = method(compose("recipe=mixed_precision").quant)
    assert found.startswith("weight=MinMax(per_channel, observer=mse) act=MinMax plan=MixedPrecision(average_bits=6, ")


def test_which_tower_is_quantized() -> None:
    one = {"_target_": "qatlab.quant.MinMax", "bits": 8}
    for tower, visual, text in (("visual", True, False), ("text", False, True), ("both", True, True)):
        config = QuantConfig(act=one, tower=tower)
        assert (is_quantized(config, "visual"), is_quantized(config, "text"), is_quantized(config)) == (
            visual,
            text,
            True,
        )
        assert not is_quantized(QuantConfig(tower=tower))
    with pytest.raises(
        UserError, match=r"quant\.tower=txt is unknown \(did you mean 'text'\?\); there are visual, text"
    ):
        is_quantized(QuantConfig(tower="txt"))


# -- options that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("ptq", ["quant.weight.bits=9"], r"quant\.weight(\.| of .*: )bits=9: it takes a whole number from 2 to 8"),
        ("ptq", ["quant.act.bits=1"], r"quant\.act(\.| of .*: )bits=1"),
        ("raana", ["quant.weight.bits=0"], r"quant\.weight(\.| of .*: )bits=0: it takes a whole number from 1 to 8"),
        ("ptq", ["quant.tower=txt"], r"quant\.tower=txt is unknown"),
        ("ptq", ["quant.calibration_images=0"], r"quant\.calibration_images=0: it takes a whole number from 1 on"),
        ("light_qat", ["quant.tower=text"], r"quant\.tower=text leaves nothing to train: set fit\.steps=0"),
        ("ptq", ["quant.tower=text", "quant.first=true"], r"quant\.first is for the image tower.*leave it out"),
        ("ptq", ["quant.tower=text", "quant/rewrite=registers"], r"quant\.registers is for the image tower"),
        ("qat_lora", ["quant.tower=text", "fit.steps=0"], r"quant\.adapter is for the image tower"),
        ("ptq", ["+quant.rules={text.*: null}"], r"pattern 'text\.\*'.*quant\.tower=visual leaves the text tower"),
        ("ptq", ["+quant.rules={nothing: null}", "quant.tower=both"], r"'nothing', which matches no layer"),
        ("ptq", ["+quant.rules={transformer*: null}", "quant.tower=text"], r"matches no layer.*text\.transformer"),
        ("ptq", ["quant/adapter=lora", "quant.adapter.rank=1000"], r"quant\.adapter of .*: rank=1000"),
        ("mixed_precision", ["quant.plan.average_bits=3"], r"quant\.plan allows 3 bits .* candidates is 4"),
    ],
)
def test_options_that_do_not_fit_are_told_in_a_sentence(
    small_fit: Fit, tmp_path: Path, recipe: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as told:
        small_fit(recipe, tmp_path, "callbacks.temperature=null", *overrides)
    assert "\n" not in str(told.value)
    assert not list(tmp_path.rglob("quantized.safetensors"))


def test_both_towers_of_an_image_tower_alone(small_fit: Fit, tmp_path: Path) -> None:
    clip = clips.load(ModelConfig())
    save_file(clip.visual.state_dict(), tmp_path / "image.safetensors")
    with pytest.raises(UserError, match=r"quant\.tower=both needs a text tower.*set quant\.tower=visual"):
        small_fit("ptq", tmp_path, f"model.checkpoint={tmp_path}/image.safetensors", "quant.tower=both")


@pytest.mark.parametrize(
    ("option", "meant"), [("quant/rewrite=rotatoin", "rotation"), ("+quant/plan=mixed", "mixed_precision")]
)
def test_an_unknown_choice_of_a_group(option: str, meant: str) -> None:
    with pytest.raises(HydraException) as caught:
        compose("recipe=ptq", option)
    sentence = explain(caught.value)
    assert sentence is not None
    assert meant in sentence
    assert "\n" not in sentence


def test_an_option_that_the_method_does_not_take() -> None:
    with pytest.raises(
        UserError, match=r"quant\.plan\.averge_bits is not an option \(did you mean 'quant\.plan\.average_"
    ):
        check_blocks(compose("recipe=mixed_precision", "+quant.plan.averge_bits=3"))


def test_a_run_says_which_layers_its_rewrite_leaves_alone() -> None:
    visual = clips.load(ModelConfig()).visual
    names = list(quant_layers(quantized_copy(visual, compose("recipe=ptq").quant)))
    assert left_alone(visual, names, compose("recipe=ptq").quant) == []
    assert left_alone(visual, names, compose("recipe=rotation").quant) == [
        f"Rotation rewrites the inputs of {len(names)} of {len(names)} layers"
    ]
    line = left_alone(visual, names, compose("recipe=rotation", "quant.rewrite.mlp=false").quant)[0]
    blocks = sum(name.endswith("c_proj") for name in names)
    assert line.startswith(
        f"Rotation rewrites the inputs of {len(names) - blocks} of {len(names)} layers; it leaves alone "
    )
    assert "transformer.resblocks.0.mlp.c_proj" in line


def test_a_run_says_which_layers_have_no_adapter() -> None:
    visual = clips.load(ModelConfig()).visual
    layers = quant_layers(quantized_copy(visual, compose("recipe=qat_lora").quant))
    assert unadapted(layers) == []
    assert unadapted(quant_layers(quantized_copy(visual, compose("recipe=ptq").quant))) == []
    layers = quant_layers(quantized_copy(visual, compose("recipe=qat_lora", "quant.first=true").quant))
    assert unadapted(layers) == [
        f"{len(layers) - 1} of {len(layers)} quantized layers have an adapter; the weights of the others stay as they are: conv1"
    ]
