"""Checkpoints as people have them: each is loaded with the features of its source, or named for what it is."""

from __future__ import annotations

import copy
import json
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from foreign import image_state, transformers_state
from safetensors.torch import save_file
from torch import Tensor, nn

from qatlab.config import ModelConfig
from qatlab.config.named_files import of_model
from qatlab.core.errors import UserError
from qatlab.models import architecture as architectures
from qatlab.models import clip as clips
from qatlab.models.checkpoint import read_state
from qatlab.models.clip import Clip
from qatlab.models.preprocessing import tag_record
from qatlab.models.torchscript import archive_state
from qatlab.quant import MinMax, quantize

NAME = "ViT-checkpoint-test"
VISION = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
ARCHITECTURE = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
State = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def small_architecture(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("architectures") / f"{NAME}.json"
    file.write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(file)


@pytest.fixture(scope="module")
def original() -> Any:
    torch.manual_seed(0)
    model = open_clip.create_model(NAME, force_quick_gelu=True).eval()
    # Every tensor random: a bias or a norm that stands in another's place would not show while all of them are 0 or 1.
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    model.logit_scale.data.fill_(3.5)
    return model


def loaded(path: Path, **options: Any) -> Clip:
    return clips.load(
        ModelConfig(NAME, checkpoint=str(path), **{"quick_gelu": True, "preprocess": "openai", **options})
    )


def require_equal(found: nn.Module, expected: nn.Module) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture
def hub_folder(original: Any, tmp_path: Path) -> Path:
    """A folder as transformers leaves it, in a snapshot of the hub."""
    folder = tmp_path / "models--me--clip" / "snapshots" / "0a1b"
    folder.mkdir(parents=True)
    save_file(transformers_state(original), folder / "model.safetensors")
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "clip", "projection_dim": 16, "vision_config": vision, "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    means = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps({**means, **sizes}))
    return folder


# -- what is loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
        lambda state: {name.replace("visual.", "visual._orig_mod."): tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}},
        lambda state: {"model_state_dict": state, "loss": 0.5},
        lambda state: {
            **state,
            **{name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")},
        },
    ],
    ids=["parallel", "compiled", "both", "tower compiled", "lightning", "training", "script", "openai"],
)
@pytest.mark.parametrize("tower", ["both", "visual"])
def test_faults_f10_what_programs_wrap_around_weights_is_taken_off(
    original: Any, tmp_path: Path, wrapped: Callable[[State], Any], tower: str
) -> None:
    state = original.state_dict()
    if tower == "visual":
        state = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    torch.save(wrapped(state), tmp_path / "x.pt")
    found = loaded(tmp_path / "x.pt")
    require_equal(found.visual, original.visual)
    assert (found.model is None) == (tower == "visual")


def test_training_f5_a_bias_of_a_sigmoid_training_changes_nothing(original: Any, tmp_path: Path) -> None:
    save_file({**original.state_dict(), "logit_bias": torch.tensor([-10.0])}, tmp_path / "x.safetensors")
    require_equal(loaded(tmp_path / "x.safetensors").model, original)


def test_faults_f10_safetensors_are_known_by_their_content(original: Any, tmp_path: Path) -> None:
    save_file(original.state_dict(), tmp_path / "pytorch_model.bin")
    require_equal(loaded(tmp_path / "pytorch_model.bin").model, original)


@pytest.fixture(scope="module")
def archive(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript archive of both towers in half precision, as OpenAI's are."""
    file = tmp_path_factory.mktemp("archive") / "ViT-B-32.pt"
    example = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.long))
    torch.jit.trace(copy.deepcopy(original), example, check_trace=False).half().save(str(file))
    return file


@pytest.mark.filterwarnings("ignore")
def test_faults_f10_an_archive_of_openai_is_read_and_not_run(original: Any, archive: Path) -> None:
    expected = torch.jit.load(str(archive)).state_dict()
    found = archive_state(archive)
    assert found.keys() >= expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    clip = loaded(archive)
    images, tokens = torch.randn(2, 3, 32, 32), clip.tokenizer(["a cat", "a photo of a dog"])
    halved = open_clip.create_model(NAME, force_quick_gelu=True).eval()
    halved.load_state_dict({name: tensor.half().float() for name, tensor in original.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(clip.visual(images), halved.visual(images), atol=1e-6, rtol=0)
        torch.testing.assert_close(clip.model.encode_text(tokens), halved.encode_text(tokens), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_faults_f10_an_archive_with_code_in_its_data_is_refused(archive: Path, tmp_path: Path) -> None:
    """The pickle of the archive calls a function: it is named, not called."""
    sprung = tmp_path / "sprung"
    code = f"cposix\nsystem\n(S'touch {sprung}'\ntR.".encode()
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "trap.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, code if name.endswith("/data.pkl") else old.read(name))
    with pytest.raises(UserError, match=r"trap\.pt holds more than tensors"):
        loaded(tmp_path / "trap.pt")
    assert not sprung.exists()


def test_models_d12_transformers_tensors_are_loaded(original: Any, tmp_path: Path) -> None:
    state = transformers_state(original)
    torch.save(state, tmp_path / "pytorch_model.bin")
    require_equal(loaded(tmp_path / "pytorch_model.bin").model, original)
    # CLIPVisionModelWithProjection: the image tower alone.
    image = {name: tensor for name, tensor in state.items() if name.startswith("vis")}
    save_file(image, tmp_path / "image.safetensors")
    found = loaded(tmp_path / "image.safetensors")
    require_equal(found.visual, original.visual)
    assert found.model is None


def test_models_d12_a_transformers_folder_tells_its_activation_and_preprocessing(
    original: Any, hub_folder: Path
) -> None:
    for folder in (hub_folder, hub_folder.parents[1]):  # the snapshot, and the hub's cache of the repository
        found = loaded(folder, quick_gelu=None, preprocess=None)
        require_equal(found.model, original)
        assert found.facts["activation"] == "quick_gelu"  # transformers' default, which its file leaves out
        assert found.preprocess.mean == (0.5, 0.4, 0.3)
        assert (found.preprocess.size, found.preprocess.interpolation) == (32, "bilinear")
    config = json.loads((hub_folder / "config.json").read_text())
    for tower in ("vision_config", "text_config"):
        config[tower]["hidden_act"] = "gelu"
    (hub_folder / "config.json").write_text(json.dumps(config))
    assert loaded(hub_folder, quick_gelu=None).facts["activation"] == "gelu"


def test_models_d12_shards_are_read_together(original: Any, hub_folder: Path) -> None:
    state = transformers_state(original)
    names, half = sorted(state), len(state) // 2
    parts = {"model-1-of-2.safetensors": names[:half], "model-2-of-2.safetensors": names[half:]}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, hub_folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (hub_folder / "model.safetensors").unlink()
    (hub_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    require_equal(loaded(hub_folder).model, original)
    (hub_folder / "model-2-of-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"lists 2 files of weights, and model-2-of-2\.safetensors is not beside it"):
        loaded(hub_folder)


def test_models_d12_a_folder_is_known_by_the_content_of_its_weights(hub_folder: Path) -> None:
    from qatlab.config import compose

    config = compose("recipe=fp32", f"model.checkpoint={hub_folder}")
    before = of_model(config)
    assert list(before) == [str(hub_folder / "model.safetensors")]
    save_file({"logit_scale": torch.zeros(1)}, hub_folder / "model.safetensors")
    assert of_model(config) != before


@pytest.fixture
def local(original: Any, tmp_path: Path) -> Path:
    """A folder as open_clip leaves it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    save_file(original.state_dict(), folder / "open_clip_model.safetensors")
    look = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "size": 32}
    told = {"model_cfg": {**ARCHITECTURE, "quick_gelu": True}, "preprocess_cfg": look}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    return folder


def test_models_d12_a_local_dir_brings_architecture_weights_and_preprocessing(
    original: Any, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(local.parent))
    for name in (f"local-dir:{local}", "local-dir:~/mine"):
        found = clips.load(ModelConfig(name))
        require_equal(found.model, original)
        assert found.facts["activation"] == "quick_gelu"
        assert found.preprocess.mean == (0.1, 0.2, 0.3)
        assert found.tokenizer is not None
    # The folder beside an architecture's name is the same checkpoint.
    require_equal(loaded(local, quick_gelu=None, preprocess=None).model, original)


def test_weights_under_transformers_names_take_the_sizes_of_the_file_beside_them(original: Any, local: Path) -> None:
    """TinyCLIP is such a model: transformers' CLIP, of sizes that no architecture of open_clip has."""
    (local / "open_clip_model.safetensors").unlink()
    save_file(transformers_state(original), local / "model.safetensors")
    require_equal(clips.load(ModelConfig(f"local-dir:{local}")).model, original)


def test_models_d12_a_repository_of_the_hub_is_a_local_dir_that_is_fetched(
    original: Any, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(model_id: str, filename: str | None = None, **_: Any) -> str:
        assert model_id == "me/clip"
        return str(local / (filename or "open_clip_model.safetensors"))

    architectures._hub_file.cache_clear()
    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", fetch)
    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", fetch)
    found = clips.load(ModelConfig("hf-hub:me/clip"))
    architectures._hub_file.cache_clear()
    require_equal(found.model, original)
    assert found.preprocess.mean == (0.1, 0.2, 0.3)


# -- what is named ---------------------------------------------------------------------------------------------------


def npz(file: Path) -> None:
    with file.open("wb") as opened:
        np.savez(opened, params=np.zeros(3))


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), r"pointer of Git LFS"),
        (lambda f: f.write_text("\n<!DOCTYPE html><html>"), r"a web page"),
        (lambda f: f.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64)), r"an HDF5 file"),
        (lambda f: f.write_bytes(b"GGUF" + bytes(64)), r"a GGUF file"),
        (npz, r"an archive of numpy"),
        (lambda f: torch.save({"blocks.0.attn.qkv.weight": torch.zeros(2)}, f), r"a tower of timm"),
        (
            lambda f: torch.save({"vision_model.head.probe": torch.zeros(2)}, f),
            r"no image tower of this architecture: .*first class_embedding",
        ),
        (
            lambda f: torch.save({"vision_model.post_layernorm.weight": torch.zeros(2)}, f),
            r"a model without a projection to the space of texts in the format of transformers",
        ),
        (
            lambda f: torch.save({"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": {"a": torch.zeros(1)}}, f),
            r"holds several models \(state_dict, state_dict_ema\)",
        ),
        (
            lambda f: torch.save({"student.visual.proj": torch.zeros(1), "teacher.visual.proj": torch.zeros(1)}, f),
            r"holds a CLIP as student and as teacher, among other parts",
        ),
    ],
)
def test_faults_f10_what_is_no_clip_is_named(tmp_path: Path, write: Callable[[Path], Any], told: str) -> None:
    write(tmp_path / "x.pt")
    with pytest.raises(UserError, match=rf"x\.pt .*{told}"):
        loaded(tmp_path / "x.pt")


def test_faults_f10_a_runs_own_model_is_named(original: Any, tmp_path: Path) -> None:
    quantized = quantize(copy.deepcopy(original.visual), partial(MinMax, bits=8), None, {})
    save_file(quantized.state_dict(), tmp_path / "quantized.safetensors")
    with pytest.raises(UserError, match=r"is the quantized model of a run .*checkpoint=<the folder of the run>"):
        read_state(tmp_path / "quantized.safetensors")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ([], r"holds no file of weights \(nothing\)"),
        (["readme.md"], r"holds no file of weights \(readme\.md\)"),
        (["a.pt", "b.safetensors"], r"holds several files of weights \(a\.pt, b\.safetensors\)"),
        (["snapshots/1/a.pt", "snapshots/2/a.pt"], r"holds 2 snapshots: name one of them"),
    ],
)
def test_faults_f10_a_folder_of_no_single_model_is_named(tmp_path: Path, files: list[str], told: str) -> None:
    (tmp_path / "x").mkdir()
    for file in files:
        (tmp_path / "x" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / file).touch()
    with pytest.raises(UserError, match=told):
        loaded(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"vision_config": {"num_attention_heads": 4}},
            r"another architecture .*vision head_width 8 there and 16 here",
        ),
        ({"text_config": {"num_attention_heads": 4}}, r"text heads 4 there and 2 here"),
        ({"vision_config": {"layer_norm_eps": 1e-6}}, r"layer_norm_eps: 1e-06"),
        ({"text_config": {"hidden_act": "gelu"}}, r"hidden_act: gelu, quick_gelu"),
    ],
)
def test_models_d12_what_open_clip_would_compute_otherwise_is_refused(
    hub_folder: Path, change: dict[str, dict[str, Any]], told: str
) -> None:
    config = json.loads((hub_folder / "config.json").read_text())
    for tower, options in change.items():
        config[tower] |= options
    (hub_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=told):
        loaded(hub_folder)


def test_models_d12_other_preprocessing_than_open_clips_is_asked_for(hub_folder: Path) -> None:
    file = hub_folder / "preprocessor_config.json"
    file.write_text(json.dumps({"size": {"shortest_edge": 40}, "crop_size": 32}))
    with pytest.raises(UserError, match=r"resizes or crops as open_clip does not .*model\.preprocess="):
        loaded(hub_folder, preprocess=None)


def test_models_d12_names_of_folders_and_repositories_that_are_not_there(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"model\.name=local-dir:/nowhere: there is no folder"):
        clips.load(ModelConfig("local-dir:/nowhere"))
    (local / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="tells no architecture of open_clip"):
        clips.load(ModelConfig(f"local-dir:{local}"))
    (local / "open_clip_config.json").unlink()
    with pytest.raises(
        UserError, match=r"has no open_clip_config\.json.*model\.name=<architecture>.*model\.checkpoint="
    ):
        clips.load(ModelConfig(f"local-dir:{local}"))

    def offline(*_: Any, **__: Any) -> str:
        raise FileNotFoundError("Failed to download file")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", offline)
    with pytest.raises(UserError, match=r"hf-hub:me/other: .* could not be fetched .*local-dir:<folder>"):
        clips.load(ModelConfig("hf-hub:me/other"))


@pytest.mark.parametrize("name", ["weights.pt", "hf-hub"])
def test_models_d12_weights_in_place_of_a_tag_are_told(local: Path, name: str) -> None:
    file = shutil.copy(local / "open_clip_model.safetensors", local / "weights.pt")
    config = ModelConfig(NAME, str(file)) if name == "weights.pt" else ModelConfig(f"local-dir:{local}", "openai")
    with pytest.raises(UserError, match=r"it takes a tag of open_clip.*model\.checkpoint=<file or folder>"):
        clips.load(config)


def test_models_d12_a_folder_called_like_a_tag_hides_no_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openai").mkdir()
    monkeypatch.chdir(tmp_path)
    assert tag_record(ModelConfig("ViT-B-16", "openai"))["quick_gelu"]


# -- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.vit_b16
@pytest.mark.filterwarnings("ignore")
def test_faults_f10_the_real_vit_b16_in_an_archive_and_under_transformers_names(
    vit_b16_weights: Path, tmp_path: Path
) -> None:
    def load(path: Path) -> Any:
        return clips.load(ModelConfig("ViT-B-16", "openai", str(path))).visual

    expected, images = load(vit_b16_weights), torch.randn(2, 3, 224, 224)
    torch.jit.trace(copy.deepcopy(expected), images, check_trace=False).save(str(tmp_path / "archive.pt"))
    save_file(image_state(expected), tmp_path / "model.safetensors")
    for file in ("archive.pt", "model.safetensors"):
        with torch.no_grad():
            torch.testing.assert_close(load(tmp_path / file)(images), expected(images), atol=1e-5, rtol=0)
