"""Loading a CLIP: the activation its weights were trained with, every form of checkpoint, and every way to get it wrong."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from omegaconf import OmegaConf
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torch.nn.functional import normalize

from qatlab.config import ModelConfig, recipe_files
from qatlab.core.errors import UserError
from qatlab.data import TextTable, save_text_table
from qatlab.data.images.folders import Folders, class_index_for
from qatlab.data.images.imageset import ImageSet
from qatlab.models import clip as clips
from qatlab.models.zeroshot import class_features

SMALL = "ViT-small-test"
WIDE = "ViT-wide-test"
TRAINED_WITH = {
    "vit_b32_openai": "quick_gelu",
    "vit_b16_openai": "quick_gelu",
    "vit_l14_openai": "quick_gelu",
    "vit_b32_laion400m": "quick_gelu",
    "vit_b16_laion400m": "gelu",
    "vit_l14_laion400m": "gelu",
    "vit_b16_metaclip400m": "quick_gelu",
    "vit_b16_dfn2b": "quick_gelu",
    "rn50_openai": "quick_gelu",
    "siglip_b16_webli": "gelu",
    "siglip2_b16_webli": "gelu",
    "coca_b32_laion2b": "gelu",
    "convnext_b_laion2b": "gelu",
    "mobileclip_s1_datacompdr": "gelu",
    "mobileclip2_s0_dfndr2b": "gelu",
    "eva02_b16_merged2b": "gelu",
    "pe_core_b16_meta": "gelu",
    "tiny": "gelu",
}


def architecture(width: int) -> dict[str, Any]:
    return {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": width, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }


@pytest.fixture(scope="module", autouse=True)
def small_architectures(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two small models that open_clip knows by name, of different widths."""
    folder = tmp_path_factory.mktemp("architectures")
    for name, width in ((SMALL, 32), (WIDE, 48)):
        (folder / f"{name}.json").write_text(json.dumps(architecture(width)))
        open_clip.add_model_config(folder / f"{name}.json")


@pytest.fixture(scope="module")
def original() -> Any:
    """A full CLIP with QuickGELU and a logit scale of its own."""
    torch.manual_seed(0)
    model = open_clip.create_model(SMALL, force_quick_gelu=True).eval()
    model.logit_scale.data.fill_(3.5)
    return model


def small(checkpoint: Path | None = None, **options: Any) -> ModelConfig:
    return ModelConfig(
        name=SMALL,
        checkpoint=checkpoint and str(checkpoint),
        **{"quick_gelu": True, "pretrained": None, "preprocess": "openai", **options},
    )


def preset(name: str) -> ModelConfig:
    return ModelConfig(**OmegaConf.to_container(OmegaConf.load(recipe_files("model")[name])))  # type: ignore[arg-type]


@pytest.fixture
def shrunken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let open_clip build the small model in place of the one asked for, with all other options, and give it its tokenizer."""
    build = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda name, **options: build(SMALL, **options))
    monkeypatch.setattr(clips, "tokenizer_of", lambda config: open_clip.get_tokenizer(SMALL))


# -- activation ------------------------------------------------------------------------------------------------------


def test_every_model_preset_is_judged_here() -> None:
    assert set(recipe_files("model")) == set(TRAINED_WITH)


@pytest.mark.parametrize("name", TRAINED_WITH)
@pytest.mark.usefixtures("shrunken")
def test_a_preset_has_the_activation_its_weights_were_trained_with(name: str) -> None:
    loaded = clips.load(preset(name), from_scratch=True)
    assert loaded.facts["activation"] == TRAINED_WITH[name]
    towers = [module for module in loaded.model.modules() if isinstance(module, (QuickGELU, torch.nn.GELU))]
    assert towers
    assert all(isinstance(module, QuickGELU) == (TRAINED_WITH[name] == "quick_gelu") for module in towers)


@pytest.mark.usefixtures("shrunken")
def test_weights_change_nothing_about_it(original: Any, tmp_path: Path) -> None:
    save_file(original.state_dict(), tmp_path / "both.safetensors")
    loaded = clips.load(ModelConfig("ViT-B-16", "laion400m_e32", str(tmp_path / "both.safetensors")))
    assert loaded.facts["activation"] == "gelu"
    assert loaded.facts["pretrained"] == "laion400m_e32"


@pytest.mark.parametrize(
    ("name", "pretrained", "option"), [("ViT-B-16", "openai", False), ("ViT-B-16", "laion400m_e32", True)]
)
def test_an_option_that_contradicts_the_tag_is_refused(name: str, pretrained: str, option: bool) -> None:
    with pytest.raises(UserError, match=rf"model\.quick_gelu={str(option).lower()} contradicts .*{pretrained}"):
        clips.load(ModelConfig(name, pretrained, quick_gelu=option))


def test_an_option_that_contradicts_the_name_is_refused(original: Any, tmp_path: Path) -> None:
    save_file(original.state_dict(), tmp_path / "both.safetensors")
    with pytest.raises(UserError, match=r"model\.quick_gelu=false contradicts model\.name=ViT-B-16-quickgelu"):
        clips.load(ModelConfig("ViT-B-16-quickgelu", None, str(tmp_path / "both.safetensors"), quick_gelu=False))


@pytest.mark.usefixtures("shrunken")
@pytest.mark.parametrize(
    ("name", "option", "found"),
    [("ViT-B-16-quickgelu", None, "quick_gelu"), ("ViT-B-16", True, "quick_gelu"), ("ViT-B-16", False, "gelu")],
)
def test_a_checkpoint_takes_it_from_the_name_or_the_option(
    original: Any, tmp_path: Path, name: str, option: bool | None, found: str
) -> None:
    save_file(original.state_dict(), tmp_path / "both.safetensors")
    loaded = clips.load(ModelConfig(name, None, str(tmp_path / "both.safetensors"), quick_gelu=option))
    assert loaded.facts["activation"] == found


def test_a_checkpoint_that_nobody_tells_it_of_is_refused(original: Any, tmp_path: Path) -> None:
    save_file(original.state_dict(), tmp_path / "both.safetensors")
    with pytest.raises(UserError, match=r"both\.safetensors does not tell its activation.*model\.quick_gelu=true"):
        clips.load(small(tmp_path / "both.safetensors", quick_gelu=None))


# -- names -----------------------------------------------------------------------------------------------------------


def test_an_unknown_architecture_or_tag_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"model\.name=ViT-B-17 is unknown.*ViT-B-1"):
        clips.load(ModelConfig("ViT-B-17", "openai"))
    with pytest.raises(UserError, match=r"model\.pretrained=opnai.*did you mean 'openai'"):
        clips.load(ModelConfig("ViT-B-16", "opnai"))
    with pytest.raises(UserError, match=r"model\.name=.* has no weights.*model\.checkpoint"):
        clips.load(ModelConfig(SMALL))


# -- checkpoints -----------------------------------------------------------------------------------------------------


def equal(found: torch.nn.Module, expected: torch.nn.Module) -> bool:
    one, other = found.state_dict(), expected.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def write(state: dict[str, torch.Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    return path


@pytest.mark.parametrize("file", ["both.safetensors", "both.pt"])
def test_a_full_clip_comes_back_equal(original: Any, tmp_path: Path, file: str) -> None:
    loaded = clips.load(small(write(original.state_dict(), tmp_path / file)))
    assert equal(loaded.model, original)
    assert loaded.visual is loaded.model.visual
    assert loaded.logit_scale == pytest.approx(float(original.logit_scale.detach().exp()))
    assert loaded.facts == {
        "model": SMALL,
        "pretrained": None,
        "weights": str(tmp_path / file),
        "activation": "quick_gelu",
        "text_activation": "quick_gelu",
        "preprocessing": "32 px, bicubic, shortest, mean 0.4815 0.4578 0.4082, std 0.2686 0.2613 0.2758",
        "resized": None,
    }
    tokens = loaded.tokenizer(["a photo of a cat"])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.encode_text(tokens), original.encode_text(tokens), rtol=0, atol=0)
        torch.testing.assert_close(loaded.visual(images), original.visual(images), rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["", "visual."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_an_image_tower_alone_comes_back_equal(original: Any, tmp_path: Path, prefix: str, suffix: str) -> None:
    state = {prefix + key: value for key, value in original.visual.state_dict().items()}
    loaded = clips.load(small(write(state, tmp_path / f"image{suffix}")))
    assert equal(loaded.visual, original.visual)
    assert loaded.model is None
    assert loaded.logit_scale == 100


def test_half_precision_becomes_single(original: Any, tmp_path: Path) -> None:
    state = {key: value.half() for key, value in original.visual.state_dict().items()}
    loaded = clips.load(small(write(state, tmp_path / "image.safetensors")))
    assert all(value.dtype == torch.float32 for value in loaded.visual.state_dict().values())
    assert torch.equal(loaded.visual.proj, original.visual.proj.half().float())


def test_a_checkpoint_of_another_width_is_refused(original: Any, tmp_path: Path) -> None:
    image = write(original.visual.state_dict(), tmp_path / "image.safetensors")
    with pytest.raises(
        UserError,
        match=r"image\.safetensors is no image tower.*first class_embedding \(found \(32,\), expected \(48,\)\)",
    ):
        clips.load(ModelConfig(WIDE, checkpoint=str(image), quick_gelu=True, preprocess="openai"))
    both = write(original.state_dict(), tmp_path / "both.safetensors")
    with pytest.raises(UserError, match=r"both\.safetensors does not fit the architecture.*visual"):
        clips.load(ModelConfig(WIDE, checkpoint=str(both), quick_gelu=True, preprocess="openai"))


@pytest.mark.parametrize("damage", ["lost", "foreign"])
def test_a_lost_or_foreign_tensor_is_named(original: Any, tmp_path: Path, damage: str) -> None:
    state = dict(original.visual.state_dict())
    if damage == "lost":
        del state["conv1.weight"]
    else:
        state["adapter.weight"] = torch.zeros(2)
    with pytest.raises(UserError, match=r"first conv1\.weight \(found nothing" if damage == "lost" else "adapter"):
        clips.load(small(write(state, tmp_path / "image.safetensors")))


@pytest.mark.parametrize("file", ["both.safetensors", "both.pt"])
def test_a_file_cut_short_is_refused(original: Any, tmp_path: Path, file: str) -> None:
    path = write(original.state_dict(), tmp_path / file)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UserError, match=rf"{file} cannot be read .*cut short"):
        clips.load(small(path))


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap(), protocol=2))
    for file in ("trap.pt", "plain.pt"):
        with pytest.raises(UserError, match=rf"{file} holds more than tensors"):
            clips.load(small(tmp_path / file))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [[1, 2], {"model": {"conv1.weight": 3}}, {}, torch.zeros(3)])
def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"odd\.pt .*state dict"):
        clips.load(small(tmp_path / "odd.pt"))


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.checkpoint=.*nowhere\.safetensors does not exist"):
        clips.load(small(tmp_path / "nowhere.safetensors"))


@pytest.mark.parametrize("name", ["vit_b32_laion400m", "vit_b16_openai"])
@pytest.mark.usefixtures("shrunken")
def test_a_download_that_fails_names_the_file_and_the_ways(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise FileNotFoundError("Failed to download file")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(UserError) as raised:
        clips.load(preset(name))
    sentence, config = str(raised.value), preset(name)
    hub = open_clip.get_pretrained_cfg(config.name, config.pretrained)["hf_hub"].rstrip("/")
    for part in (config.name, config.pretrained, hub, "open_clip_model.safetensors", "model.checkpoint=", "HF_HOME"):
        assert part in sentence
    assert sentence.count(". ") <= 1


@pytest.mark.usefixtures("shrunken")
def test_downloaded_weights_are_used(original: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(original.state_dict(), tmp_path / "open_clip_model.safetensors")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: str(path))
    assert equal(clips.load(preset("vit_b32_openai")).model, original)


# -- text features in place of the text tower --------------------------------------------------------------------------


def test_a_table_stands_in_for_the_text_tower(original: Any, tmp_path: Path) -> None:
    image = write(original.visual.state_dict(), tmp_path / "image.safetensors")
    rows = torch.randn(3, 16)
    save_text_table(tmp_path / "text.safetensors", {"pets": TextTable(rows, ["cat", "dog", "fish"], "test")})
    loaded = clips.load(small(image, text_features=f"{tmp_path}/text.safetensors:pets"))
    head = class_features(loaded, None, ["a photo of a {}"])
    assert head.names == ["cat", "dog", "fish"]
    torch.testing.assert_close(head.features, normalize(rows, dim=-1))
    with pytest.raises(UserError, match=r"no text tower.*model\.text_features"):
        class_features(clips.load(small(image)), ["cat"], ["a photo of a {}"])


def test_a_table_of_another_width_is_refused(tmp_path: Path) -> None:
    save_text_table(tmp_path / "t.safetensors", {"birds": TextTable(torch.eye(3, 512), ["a", "b", "c"], "")})
    with pytest.raises(UserError, match=r"t\.safetensors:birds have 512 dimensions, the images 64"):
        clips.load(ModelConfig(text_features=f"{tmp_path}/t.safetensors:birds"))


def test_the_embedded_clip_loads_with_its_own_preprocessing() -> None:
    loaded = clips.load(ModelConfig())
    assert loaded.facts == {
        "model": "tiny",
        "pretrained": "tiny",
        "weights": None,
        "activation": "gelu",
        "text_activation": "gelu",
        "preprocessing": "64 px, bicubic, shortest, mean 0.5 0.5 0.5, std 0.25 0.25 0.25",
        "resized": None,
    }
    assert loaded.preprocess.size == 64
    features = loaded.visual(loaded.preprocess.normalize(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)))
    assert features.shape == (2, 64)
    assert not loaded.visual.training
    assert 1 < loaded.logit_scale <= 100


def test_a_random_start_is_recorded() -> None:
    torch.manual_seed(0)
    one = clips.load(ModelConfig(), from_scratch=True)
    assert one.facts["pretrained"] == "random"
    assert not equal(one.model, clips.load(ModelConfig()).model)


@pytest.mark.vit_b16
def test_the_real_vit_b16(shared_data: Path, vit_b16_weights: Path) -> None:
    """An image tower and text features made elsewhere: at least two of four photographs are recognised."""
    table = f"{shared_data / 'clip_vitb16'}/text_features_fp16.safetensors:imagenet1k.a_photo_of_a"
    loaded = clips.load(ModelConfig("ViT-B-16", "openai", str(vit_b16_weights), text_features=table))
    assert loaded.facts["activation"] == "quick_gelu"
    head = class_features(loaded, None, ["{}"])
    root = shared_data / "imagenet1k"
    index = class_index_for(root, head.names, root / "classes.json")
    photographs = ImageSet(Folders(root), loaded.preprocess, index, "0:800:200")
    images, labels = zip(*[photographs[i] for i in range(4)], strict=True)
    with torch.no_grad():
        features = normalize(loaded.visual(loaded.preprocess.normalize(torch.stack(images))), dim=-1)
    assert torch.isfinite(features).all()
    assert ((features @ head.features.T).argmax(1) == torch.tensor(labels)).sum() >= 2
