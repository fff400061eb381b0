"""CoCa's image tower gives its features alone, as every other one, and they are what open_clip's own model encodes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from qatlab.config import ModelConfig, QuantConfig
from qatlab.models import clip as clips
from qatlab.models.quantized import fitted_copy, load_quantized, save_quantized
from qatlab.models.zeroshot import class_features
from qatlab.quant import MinMax, quant_layers, quantize

NAME = "coca-test"
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {
        **{"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
        **{"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5, "output_tokens": True},
    },
    "text_cfg": {
        **{"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        **{"embed_cls": True, "output_tokens": True},
    },
    "multimodal_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    "custom_text": True,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("architectures")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(NAME).eval()
    # open_clip leaves this one as the memory was before, which may hold NaN.
    model.text_decoder.text_projection.data.normal_()
    return model


@pytest.fixture(params=["both", "image"])
def model(request: pytest.FixtureRequest, original: Any, tmp_path: Path) -> ModelConfig:
    part = original if request.param == "both" else original.visual
    save_file(part.state_dict(), tmp_path / "coca.safetensors")
    return ModelConfig(NAME, checkpoint=str(tmp_path / "coca.safetensors"), quick_gelu=False, preprocess="openai")


def test_models_d3_features_are_what_open_clip_encodes(original: Any, model: ModelConfig) -> None:
    found, images = clips.load(model), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        features, expected = found.visual(images), original.encode_image(images, normalize=False)
    torch.testing.assert_close(features, expected, rtol=0, atol=0)


def test_models_d3_class_prompts_are_what_open_clip_encodes(original: Any, tmp_path: Path) -> None:
    save_file(original.state_dict(), tmp_path / "coca.safetensors")
    found = clips.load(ModelConfig(NAME, None, str(tmp_path / "coca.safetensors"), False, preprocess="openai"))
    tokens = open_clip.get_tokenizer(NAME)(["a photo of a cat", "a photo of a dog"])
    with torch.no_grad():
        expected = original.encode_text(tokens, normalize=True)
    heads = class_features(found, ["cat", "dog"], "a photo of a {}", cache=False)
    torch.testing.assert_close(heads.features, expected, rtol=0, atol=1e-5)


def test_models_d3_a_run_of_one_is_read_back(model: ModelConfig, tmp_path: Path) -> None:
    eight, images = {"_target_": "qatlab.quant.MinMax", "bits": 8}, torch.randn(3, 3, 32, 32)
    visual = clips.load(model).visual
    twin, quant = fitted_copy(visual, QuantConfig(weight=eight, act=eight, first=True, last=True), lambda: [images])
    save_quantized(twin, tmp_path / "quantized.safetensors", model, quant)
    with torch.no_grad():
        rounded = twin.eval()(images)
        torch.testing.assert_close(load_quantized(tmp_path / "quantized.safetensors")(images), rounded, rtol=0, atol=0)
        cosine = (normalize(rounded, dim=-1) * normalize(visual(images), dim=-1)).sum(1)
    assert cosine.min() > 0.99
    assert "attn_pool.attn.out_proj" in quant_layers(quantize(visual, partial(MinMax, 8), None))
