"""SigLIP: its weights in open_clip's and in transformers' format, and its tokenizer, which nothing but a text asks for."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import siglip
import torch
from safetensors.torch import save_file
from torch import nn

from qatlab.config import ModelConfig, QuantConfig, compose
from qatlab.core.errors import UserError
from qatlab.data import TextTable, save_text_table
from qatlab.models import clip as clips
from qatlab.models import tokenizers
from qatlab.models.quantized import fitted_copy, load_quantized, save_quantized
from qatlab.models.tokenizer_files import tokenizer_files, told_by_tokenizer
from qatlab.results.identity import identity

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory: pytest.TempPathFactory) -> None:
    siglip.register(tmp_path_factory.mktemp("architectures"))


@pytest.fixture(scope="module")
def original() -> Any:
    return siglip.made()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks the network or makes a tokenizer fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(tokenizers, "HFTokenizer", refuse)


@pytest.fixture
def table(tmp_path: Path) -> str:
    names = ["cat", "dog", "fish"]
    save_text_table(tmp_path / "text.safetensors", {"pets": TextTable(torch.randn(3, siglip.WIDTH), names, "test")})
    return f"{tmp_path}/text.safetensors:pets"


def options(checkpoint: Path, **more: Any) -> ModelConfig:
    return ModelConfig(siglip.NAME, checkpoint=str(checkpoint), **{"quick_gelu": False, "preprocess": "openai", **more})


def require_equal(found: Any, expected: nn.Module) -> None:
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


# -- what is asked for -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("offline")
def test_models_d2_no_tokenizer_and_no_hub_where_a_table_stands_for_texts(
    original: Any, table: str, tmp_path: Path
) -> None:
    save_file(original.state_dict(), tmp_path / "both.safetensors")
    save_file(original.visual.state_dict(), tmp_path / "image.safetensors")
    for file in ("both", "image"):
        found = clips.load(options(tmp_path / f"{file}.safetensors", text_features=table))
        require_equal(found.visual, original.visual)
        assert found.text_table is not None
        assert found.text_table.names == ["cat", "dog", "fish"]
    assert found.tokenizer is None  # of the image tower alone


@pytest.mark.usefixtures("offline")
def test_models_d2_a_run_is_read_back_without_tokenizer(original: Any, tmp_path: Path) -> None:
    save_file(original.visual.state_dict(), tmp_path / "image.safetensors")
    model = options(tmp_path / "image.safetensors")
    visual, images = clips.load(model).visual, torch.randn(2, 3, 32, 32)
    eight = {"_target_": "qatlab.quant.MinMax", "bits": 8}
    twin, quant = fitted_copy(visual, QuantConfig(weight=eight, act=eight), lambda: [images])
    save_quantized(twin, tmp_path / "quantized.safetensors", model, quant)
    with torch.no_grad():
        found = load_quantized(tmp_path / "quantized.safetensors")(images)
        torch.testing.assert_close(found, twin.eval()(images), rtol=0, atol=0)


def test_models_d2_a_text_tower_without_transformers_is_told(
    original: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "find_spec", lambda name: None)
    save_file(original.state_dict(), tmp_path / "both.safetensors")
    with pytest.raises(UserError, match=r"its tokenizer needs transformers.*pip install 'qatlab\[hf\]'") as raised:
        clips.load(options(tmp_path / "both.safetensors"))
    assert str(raised.value).count(". ") == 0


def test_models_d2_a_text_tower_of_transformers_stays_out_of_an_image_tower(
    original: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "find_spec", lambda name: None)
    name = siglip.register(tmp_path, "ViT-roberta-test", hf_model_name="roberta-base", hf_pooler_type="mean_pooler")
    save_file(original.visual.state_dict(), tmp_path / "image.safetensors")
    found = clips.load(replace(options(tmp_path / "image.safetensors"), name=name))
    require_equal(found.visual, original.visual)
    save_file({**original.state_dict()}, tmp_path / "both.safetensors")
    with pytest.raises(UserError, match=r"its text tower needs transformers.*qatlab\[hf\]"):
        clips.load(replace(options(tmp_path / "both.safetensors"), name=name))


def test_a_tokenizer_is_read_from_beside_the_weights(
    original: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "find_spec", lambda name: True)
    asked: list[Any] = []

    def make(source: str, **given: Any) -> Any:
        asked.append((source, given))
        return lambda texts: torch.ones(len(texts), 8, dtype=torch.long)

    monkeypatch.setattr(tokenizers, "HFTokenizer", make)
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    given = {"context_length": 8, "tokenizer_mode": None, "clean": "canonicalize"}
    for checkpoint in (tmp_path, tmp_path / "model.safetensors"):
        assert tokenizer_files(options(checkpoint)) == []
        clips.load(options(checkpoint))
    (tmp_path / "tokenizer.json").write_text("{}")
    for checkpoint in (tmp_path, tmp_path / "model.safetensors"):
        assert clips.load(options(checkpoint)).tokenizer(["a", "b"]).shape == (2, 8)  # type: ignore[misc]
    assert asked == [*2 * [("timm/ViT-siglip-test", given)], *2 * [(str(tmp_path), given)]]
    # Its content is a part of what a run is.
    ids = [told_by_tokenizer(options(tmp_path))]
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    ids.append(told_by_tokenizer(options(tmp_path)))
    assert ids[0] != ids[1]
    config = compose("recipe=ptq", "suite=folders", "data=images", "data.path=/nowhere")
    config.model = options(tmp_path)
    assert identity(config)["model.tokenizer by its file"] == ids[1]["tokenizer"]
    config.model = ModelConfig("ViT-B-32", checkpoint=str(tmp_path), quick_gelu=False, preprocess="openai")
    assert "model.tokenizer by its file" not in identity(config)


def test_a_tokenizer_that_cannot_be_read_is_told(
    original: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no such thing")

    monkeypatch.setattr(tokenizers, "find_spec", lambda name: True)
    monkeypatch.setattr(tokenizers, "HFTokenizer", broken)
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"could not be read from https://huggingface\.co/timm/ViT-siglip-test \(OSError\)"
    ):
        clips.load(options(tmp_path))


# -- the format of transformers ------------------------------------------------------------------------------------------


def transformers_folder(original: Any, folder: Path, **changes: Any) -> Path:
    """Write what save_pretrained of transformers leaves of a SiglipModel."""
    save_file(siglip.transformers_state(original), folder / "model.safetensors")
    vision = {**SIZES, "image_size": 32, "patch_size": 16, **changes}
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 8, **changes}
    config = {"model_type": "siglip", "vision_config": vision, "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    look = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(look))
    return folder


def test_models_d12_a_siglip_model_of_transformers_is_read(original: Any, table: str, tmp_path: Path) -> None:
    folder = transformers_folder(original, tmp_path)
    model = ModelConfig(siglip.NAME, checkpoint=str(folder), text_features=table)
    found = clips.load(model)
    require_equal(found.model, original)
    assert found.facts["activation"] == found.facts["text_activation"] == "gelu_tanh"
    assert found.facts["preprocessing"] == "32 px, bicubic, squash, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
    exact = clips.load(replace(model, pretrained=None, checkpoint=str(folder / "model.safetensors"), gelu_tanh=False))
    assert exact.facts["activation"] == "gelu_tanh"  # the file beside it tells the same of the file itself
    transformers_folder(original, tmp_path, hidden_act="gelu")
    assert clips.load(model).facts["activation"] == "gelu"


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_models_d12_an_image_tower_of_transformers_is_read(original: Any, tmp_path: Path, prefix: str) -> None:
    state = siglip.transformers_state(original)
    image = {name.replace("vision_model.", prefix, 1): value for name, value in state.items() if "vision" in name}
    save_file(image, tmp_path / "image.safetensors")
    found = clips.load(options(tmp_path / "image.safetensors"))
    require_equal(found.visual, original.visual)
    assert found.model is None


def test_models_d12_what_a_file_tells_of_the_activation_is_restated(original: Any, tmp_path: Path) -> None:
    """An encoder is read back from its own file, where the file beside the weights is not there."""
    from qatlab.models.preprocessing import known, told_by_files

    model = ModelConfig(siglip.NAME, checkpoint=str(transformers_folder(original, tmp_path)))
    assert told_by_files(model)["gelu_tanh"] is True
    eight, images = {"_target_": "qatlab.quant.MinMax", "bits": 8}, torch.randn(2, 3, 32, 32)
    visual = clips.load(replace(known(model), text_features=None, checkpoint=str(_image(original, tmp_path)))).visual
    twin, quant = fitted_copy(visual, QuantConfig(weight=eight, act=eight), lambda: [images])
    save_quantized(twin, tmp_path / "quantized.safetensors", known(model), quant)
    found = load_quantized(tmp_path / "quantized.safetensors")
    acts = [module for module in found.modules() if isinstance(module, nn.GELU)]
    assert {module.approximate for module in acts} == {"tanh"}
    with torch.no_grad():
        torch.testing.assert_close(found(images), twin.eval()(images), rtol=0, atol=0)


def _image(original: Any, folder: Path) -> Path:
    save_file(original.visual.state_dict(), folder / "image.safetensors")
    return folder / "image.safetensors"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_act": "relu"}, r"config\.json says hidden_act: relu; it takes gelu_pytorch_tanh or gelu"),
        ({"layer_norm_eps": 1e-5}, r"layer_norm_eps: 1e-05; open_clip's SigLIP has 1e-06"),
        ({"num_attention_heads": 4}, r"another architecture than model\.name=.*text heads 4 there and 2 here"),
    ],
)
def test_models_d12_what_open_clip_computes_otherwise_is_refused(
    original: Any, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        clips.load(ModelConfig(siglip.NAME, checkpoint=str(transformers_folder(original, tmp_path, **changes))))


def test_the_tanh_approximation_wants_a_gelu(tmp_path: Path) -> None:
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "quick-test.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "quick-test.json")
    with pytest.raises(UserError, match=r"model\.gelu_tanh=true, but quick-test has no GELU"):
        clips.load(ModelConfig("quick-test", quick_gelu=True, gelu_tanh=True), from_scratch=True)
