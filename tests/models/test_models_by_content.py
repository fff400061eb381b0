"""A model is known by what is in it: its towers' own activations, its preprocessing, its embeddings, its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import interpolate

from qatlab.config import Config, ModelConfig, compose
from qatlab.core.errors import UserError
from qatlab.core.signals import StopSignals
from qatlab.models import clip as clips
from qatlab.models.preprocessing import known
from qatlab.models.quantized import fitted_copy, load_quantized, read_quantized, save_quantized, stored_options
from qatlab.models.zeroshot import class_features, encode_text
from qatlab.results.identity import run_id
from qatlab.results.run import Run
from qatlab.stages.opening import open_experiment
from qatlab.stages.outline import outline
from qatlab.stages.trainer import build_trainer

RESNET, TIMM, VIT = "ResNet-content-test", "timm-content-test", "ViT-content-test"
LARGER, SHORTER = "ViT-larger-test", "ViT-shorter-test"  # VIT of another resolution, and of another context length
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TOWERS: dict[str, dict[str, Any]] = {
    RESNET: {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None, "head_width": 64},
    TIMM: {"image_size": 32, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
    VIT: {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
}
TOWERS |= {LARGER: {**TOWERS[VIT], "image_size": 64}, SHORTER: TOWERS[VIT]}
NAMES = ["cat", "dog"]
LOOK = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Small models of three families that open_clip knows by name."""
    folder = tmp_path_factory.mktemp("architectures")
    for name, vision in TOWERS.items():
        text = {**TEXT, "context_length": 40} if name == SHORTER else TEXT
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
        open_clip.add_model_config(folder / f"{name}.json")


def random_weights(name: str, path: Path) -> Any:
    """A random model of the architecture, its weights of both towers written to ``path``."""
    torch.manual_seed(0)
    model: Any = open_clip.create_model(name)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return model


@pytest.mark.parametrize("name", [RESNET, TIMM])
def test_models_d4_text_features_are_those_of_the_text_towers_own_activation(
    name: str, cold: Path, tmp_path: Path
) -> None:
    random_weights(name, tmp_path / "both.safetensors")
    found = {}
    for quick in (True, False):
        clip = clips.load(ModelConfig(name, None, str(tmp_path / "both.safetensors"), quick, preprocess=LOOK))
        assert clip.facts["text_activation"] == ("quick_gelu" if quick else "gelu")
        assert (
            clip.facts["activation"] == {RESNET: "relu", TIMM: "gelu_tanh"}[name]
        )  # the image tower has one of its own
        features = class_features(clip, NAMES, ["a photo of a {}"]).features
        torch.testing.assert_close(features, encode_text(clip, [f"a photo of a {name}" for name in NAMES]))
        found[quick] = features
    assert (found[True] - found[False]).abs().max() > 1e-6


def test_models_d4_the_activation_is_that_of_the_modules() -> None:
    """The names of torch's, open_clip's and timm's classes, one of each kind."""
    tower = nn.Sequential(nn.Linear(2, 2), nn.GELU(approximate="tanh"))
    assert clips.activation(tower) == "gelu_tanh"
    assert clips.activation(nn.Sequential(tower, nn.SiLU())) == "gelu_tanh, silu"
    assert clips.activation(nn.Sequential(tower, nn.SiLU()), without=tower) == "silu"
    assert clips.activation(nn.Linear(2, 2)) == "unknown"


# -- preprocessing ---------------------------------------------------------------------------------------------------

OPENAI = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
HALVES = {"mean": [0.5] * 3, "std": [0.5] * 3}


def checkpoint(folder: Path, name: str = VIT, **beside: Any) -> str:
    """A checkpoint of the image tower, with open_clip_config.json beside it where something is said in that."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    save_file(open_clip.create_model(name).visual.state_dict(), folder / "image.safetensors")
    if beside:
        (folder / "open_clip_config.json").write_text(json.dumps(beside))
    return str(folder / "image.safetensors")


def look(config: ModelConfig) -> dict[str, Any]:
    return known(config).preprocess


def test_models_d5_preprocessing_that_nobody_tells_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"does not tell its preprocessing, and ViT-content-test has no tags.*std:\[0\.26"
    ):
        clips.load(ModelConfig(VIT, None, checkpoint(tmp_path), quick_gelu=False))
    # Its tags differ: each way is a choice, named by one tag that has it.
    with pytest.raises(
        UserError, match=r"tags of ViT-L-14 differ.*openai \(.*0\.4815.*laion2b_s32b_b82k \(.*mean 0\.5"
    ):
        known(ModelConfig("ViT-L-14", None, "any.pt", quick_gelu=False))
    with pytest.raises(UserError, match=r"dfn5b \(bicubic, squash"):
        known(ModelConfig("ViT-H-14-quickgelu", None, "any.pt"))


def test_models_d5_where_all_tags_agree_they_tell_it() -> None:
    """Those of PE-Core are open_clip's own figures, those of ViT-B-16 OpenAI's."""
    for name in ("PE-Core-B-16", "ViT-B-16-SigLIP"):
        found = look(ModelConfig(name, None, "any.pt", quick_gelu=False))
        assert (found["mean"], found["std"], found["resize_mode"]) == ([0.5] * 3, [0.5] * 3, "squash")
    assert look(ModelConfig("ViT-B-16", None, "any.pt", quick_gelu=True)) == OPENAI
    assert known(ModelConfig("PE-Core-B-16"), from_scratch=True).preprocess == OPENAI  # random weights: as it was
    assert look(ModelConfig("ViT-L-14", "laion2b_s32b_b82k", "any.pt")) == {**OPENAI, **HALVES}


@pytest.mark.parametrize("given", [LOOK, "openai"])
def test_models_d5_the_option_is_what_images_go_through(tmp_path: Path, given: Any) -> None:
    expected = LOOK if given == LOOK else OPENAI
    clip = clips.load(ModelConfig(VIT, None, checkpoint(tmp_path), quick_gelu=False, preprocess=given))
    found = clip.preprocess
    assert {key: getattr(found, key) for key in ("interpolation", "resize_mode")}.items() <= expected.items()
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(expected[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(found.normalize(pixels), (pixels / 255 - mean) / std)
    assert clip.facts["preprocessing"].startswith(
        f"32 px, {expected['interpolation']}, {expected['resize_mode']}, mean 0."
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("datacomp1b", r"=datacomp1b is no tag of ViT-content-test \(ViT-L-14-CLIPA: bilinear, .*; ViTamin-S: bicubic"),
        ("opnai", r"=opnai is no tag of ViT-content-test"),
        (HALVES, r"takes a tag, or .*all four"),
        ({**LOOK, "mean": [0.5, 0.5]}, r"mean is \[0\.5, 0\.5\]; it takes three numbers"),
        ({**LOOK, "std": [0.5, 0.5, 0]}, r"std is .*three numbers"),
        ({**LOOK, "interpolation": "nearest"}, r"interpolation is 'nearest'; it takes one of bicubic, bilinear"),
        ({**LOOK, "resize_mode": "crop"}, r"resize_mode is 'crop'"),
    ],
)
def test_models_d5_a_look_that_is_none_is_refused(given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        known(ModelConfig(VIT, None, "any.pt", quick_gelu=False, preprocess=given))


def test_models_d5_the_embedded_model_has_its_own() -> None:
    with pytest.raises(UserError, match=r"model\.preprocess is given, but tiny has its own"):
        clips.load(ModelConfig(preprocess="openai"))


def test_models_d5_the_file_beside_a_checkpoint_is_heeded(tmp_path: Path) -> None:
    """Its preprocessing, with open_clip's defaults for what it leaves out, and its activation."""
    model = {"quick_gelu": True, "embed_dim": 16, "vision_cfg": TOWERS[VIT]}
    path = checkpoint(tmp_path, model_cfg=model, preprocess_cfg=HALVES)
    clip = clips.load(ModelConfig(VIT, None, path))
    assert clip.preprocess.mean == clip.preprocess.std == (0.5, 0.5, 0.5)
    assert (clip.preprocess.interpolation, clip.preprocess.resize_mode) == ("bicubic", "shortest")
    assert clip.facts["activation"] == "quick_gelu"


@pytest.mark.parametrize(
    "another", [{"embed_dim": 512}, {"vision_cfg": {"layers": 12}}, {"vision_cfg": {"image_size": 64}}]
)
def test_models_d5_the_file_of_another_architecture_is_not(tmp_path: Path, another: dict[str, Any]) -> None:
    path = checkpoint(tmp_path, model_cfg=another, preprocess_cfg=HALVES)
    with pytest.raises(UserError, match="does not tell its preprocessing"):
        clips.load(ModelConfig(VIT, None, path, quick_gelu=False))


def test_models_d5_a_file_that_contradicts_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, model_cfg={"quick_gelu": True}, preprocess_cfg=HALVES)
    with pytest.raises(UserError, match=r"trained with QuickGELU, which model\.quick_gelu=false contradicts"):
        known(ModelConfig(VIT, None, path, quick_gelu=False))
    with pytest.raises(
        UserError, match=r"open_clip_config\.json says .*mean 0\.5.*model\.pretrained=openai .*mean 0\.48"
    ):
        known(ModelConfig("ViT-B-16", "openai", path))
    assert look(ModelConfig("ViT-B-16", "openai", path, preprocess="openai")) == OPENAI  # and this settles it
    for content in ("{", "[1]", '{"model_cfg": 3}'):
        (tmp_path / "open_clip_config.json").write_text(content)
        with pytest.raises(UserError, match=r"open_clip_config\.json is n"):
            known(ModelConfig(VIT, None, path, quick_gelu=True))


def test_models_d5_the_run_is_known_by_what_the_file_told(tmp_path: Path) -> None:
    """By the option where one is given, and as before where what is told is what was taken for granted."""

    def id_of(path: str, **options: Any) -> str:
        config = compose("recipe=ptq")
        config.model = ModelConfig("ViT-B-16", None, path, **{"quick_gelu": True, **options})
        return run_id(config)

    path = checkpoint(tmp_path)
    plain = id_of(path)
    checkpoint(tmp_path, preprocess_cfg=OPENAI)
    assert id_of(path) == plain
    checkpoint(tmp_path, preprocess_cfg=HALVES)
    told = id_of(path)
    assert len({plain, told, id_of(path, preprocess="openai"), id_of(path, preprocess=LOOK)}) == 4
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    assert id_of(path) == plain
    assert id_of(path, quick_gelu=None) != plain


def test_models_d5_a_quantized_file_needs_no_neighbour(tmp_path: Path) -> None:
    """What a file beside the checkpoint told is in the quantized model's own file, which is read where that is not."""
    path = checkpoint(tmp_path / "weights", model_cfg={"quick_gelu": True}, preprocess_cfg=HALVES)
    config, quant = ModelConfig(VIT, None, path), compose("recipe=ptq").quant
    visual = clips.load(config).visual
    module, _ = fitted_copy(visual, quant, lambda: [torch.randn(4, 3, 32, 32)])
    save_quantized(module, tmp_path / "quantized.safetensors", known(config), quant)
    shutil.rmtree(tmp_path / "weights")
    read, images = load_quantized(tmp_path / "quantized.safetensors"), torch.randn(2, 3, 32, 32)
    assert torch.equal(read(images), module(images))
    assert read.preprocess_cfg["mean"] == [0.5] * 3
    assert clips.activation(read) == "quick_gelu"


def test_models_d5_the_option_is_read_from_a_command_line() -> None:
    written = "model.preprocess={mean:[0.1,0.2,0.3],std:[0.4,0.5,0.6],interpolation:bilinear,resize_mode:squash}"
    assert compose("recipe=ptq", written).model.preprocess == LOOK
    assert compose("recipe=ptq", "model.preprocess=openai").model.preprocess == "openai"
    assert compose("recipe=ptq").model.preprocess is None


# -- embeddings of another size --------------------------------------------------------------------------------------


def loaded(path: Path, name: str = VIT) -> clips.Clip:
    return clips.load(ModelConfig(name, None, str(path), False, preprocess=LOOK))


@pytest.mark.parametrize("towers", ["both", "image"])
def test_training_f3_embeddings_of_another_resolution_are_told_and_resized_alike(tmp_path: Path, towers: str) -> None:
    path = tmp_path / "larger.safetensors"
    model = random_weights(LARGER, path)
    if towers == "image":
        save_file(model.visual.state_dict(), path)
    clip = loaded(path)
    assert clip.facts["resized"] == "visual.positional_embedding (17, 32) -> (5, 32)"
    stored = model.visual.positional_embedding.detach()
    grid = stored[1:].T.reshape(1, 32, 4, 4)
    resized = interpolate(grid, size=(2, 2), mode="bicubic", antialias=True).reshape(32, 4).T
    visual: Any = clip.visual
    torch.testing.assert_close(visual.positional_embedding.detach(), torch.cat([stored[:1], resized]))
    torch.testing.assert_close(visual.conv1.weight, model.visual.conv1.weight, rtol=0, atol=0)


def test_training_f3_so_is_a_text_tower_of_another_context(tmp_path: Path) -> None:
    random_weights(VIT, tmp_path / "long.safetensors")
    assert loaded(tmp_path / "long.safetensors").facts["resized"] is None
    clip = loaded(tmp_path / "long.safetensors", SHORTER)
    assert clip.facts["resized"] == "positional_embedding (77, 32) -> (40, 32)"


def test_training_f3_the_run_says_it(
    tmp_path: Path, small: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    """In its first lines, and in every row; the embeddings of the width of a text tower are what does not fit at all."""
    state = clips.load(ModelConfig()).model.state_dict()  # type: ignore[union-attr]
    state["positional_embedding"] = state["positional_embedding"][:12].clone()
    save_file(state, tmp_path / "short.safetensors")
    config = small("fp32", f"output={tmp_path}", f"model.checkpoint={tmp_path}/short.safetensors")
    with Run(config, "fp32") as run, StopSignals() as stop:
        experiment = open_experiment(config, run, "fp32", stop)
        assert "embeddings of the weights interpolated: positional_embedding (12, 96) -> (16, 96)" in outline(
            experiment
        )
        facts = experiment.facts("fp32")
    assert facts["resized"] == "positional_embedding (12, 96) -> (16, 96)"
    assert (facts["precision"], facts["device"], facts["final_projection"]) == ("32-true", "cpu", None)
    state["positional_embedding"] = state["positional_embedding"][:, :50].clone()
    save_file(state, tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match=r"does not fit .*positional_embedding is \(12, 50\) there and \(16, 96\) here"):
        clips.load(ModelConfig(checkpoint=str(tmp_path / "narrow.safetensors")))


# -- weights that are no numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("towers", ["both", "image"])
def test_training_f8_weights_that_are_no_numbers_are_named(tmp_path: Path, towers: str, value: float) -> None:
    state = random_weights(VIT, tmp_path / "broken.safetensors").state_dict()
    for name in ("visual.proj", "visual.ln_post.bias"):
        state[name].view(-1)[:3] = value
    kept = {key: tensor for key, tensor in state.items() if towers == "both" or key.startswith("visual.")}
    save_file(kept, tmp_path / "broken.safetensors")
    with pytest.raises(
        UserError, match=r"broken\.safetensors holds NaN or infinite weights in 2 of .*: 3 in (visual\.)?proj"
    ):
        loaded(tmp_path / "broken.safetensors")


def test_training_f8_so_are_those_of_a_quantized_model(tmp_path: Path) -> None:
    quant = compose("recipe=ptq").quant
    module, _ = fitted_copy(clips.load(ModelConfig()).visual, quant, lambda: [torch.randn(4, 3, 64, 64)])
    with torch.no_grad():
        module.get_parameter("ln_post.weight")[7] = float("inf")
    save_quantized(module, tmp_path / "quantized.safetensors", ModelConfig(), quant)
    with pytest.raises(UserError, match=r"quantized\.safetensors holds NaN .* in 1 of .*: 1 in ln_post\.weight"):
        load_quantized(tmp_path / "quantized.safetensors")


# -- the precision that is computed in -------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["16-mixed", "16"])
def test_training_f4_a_precision_that_lightning_would_replace_is_refused(
    tmp_path: Path, small: Callable[..., Config], asked: str
) -> None:
    assert L.Trainer(accelerator="cpu", precision=asked, logger=False).precision == "bf16-mixed"  # type: ignore[arg-type]
    config = small("fp32", f"output={tmp_path}", f"trainer.precision='{asked}'")
    with pytest.raises(UserError, match=rf"precision={asked} is not what a CPU computes in.*precision=bf16-mixed"):
        build_trainer(config, Run(config, "fp32"), "fp32", [], {})


@pytest.mark.parametrize(("asked", "taken"), [("bf16", "bf16-mixed"), ("bf16-mixed", "bf16-mixed"), ("32", "32-true")])
def test_training_f4_another_name_of_a_precision_is_none(
    tmp_path: Path, small: Callable[..., Config], asked: str, taken: str
) -> None:
    config = small("fp32", f"output={tmp_path}", f"trainer.precision='{asked}'")
    assert build_trainer(config, Run(config, "fp32"), "fp32", [], {}).precision == taken


# -- the final projection --------------------------------------------------------------------------------------------


def test_models_d8_what_was_rounded_in_spite_of_the_option_is_another_run() -> None:
    def id_of(name: str, *options: str) -> str:
        config = compose("recipe=ptq", *options)
        config.model = ModelConfig(name, "openai")
        return run_id(config)

    def plainly(name: str, *options: str) -> str:
        """The id without the entry: what earlier releases gave."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qatlab.results.identity.has_linear_head", lambda _: False)
            return id_of(name, *options)

    assert id_of("convnext_base") != plainly("convnext_base")
    assert id_of("convnext_base", "quant.final_proj=true") == plainly("convnext_base", "quant.final_proj=true")
    assert id_of("convnext_base", "quant.tower=text") == plainly("convnext_base", "quant.tower=text")
    for name in ("ViT-B-16", "ViT-B-16-SigLIP"):  # neither has a linear layer there
        assert id_of(name) == plainly(name)


def test_models_d8_a_file_of_an_earlier_release_is_read_as_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, quant = ModelConfig(TIMM, None, None, False, preprocess=LOOK), compose("recipe=ptq").quant
    visual = clips.load(config, from_scratch=True).visual
    monkeypatch.setattr(
        "qatlab.quant.layers.convert.final_projections", lambda _: {}
    )  # as they were: no layer is left out
    module, _ = fitted_copy(visual, quant, lambda: [torch.randn(2, 3, 32, 32)])
    monkeypatch.undo()
    save_quantized(module, tmp_path / "quantized.safetensors", config, quant)
    tensors, about = read_quantized(tmp_path / "quantized.safetensors")
    assert about["quant"]["final_proj"] is False
    assert stored_options(about, visual, tensors).last
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_quantized(tmp_path / "quantized.safetensors")(images), module(images))
