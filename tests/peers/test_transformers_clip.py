"""Features of transformers' CLIP, read from what its save_pretrained leaves, against transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from foreign import image_state
from torch.nn.functional import normalize

from qatlab.config import ModelConfig
from qatlab.models import clip as clips

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
NAME = "ViT-transformers-test"


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed: the extra 'peers'")


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_models_d12_features_are_those_of_transformers(transformers: Any, tmp_path: Path, act: str) -> None:
    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / f"{NAME}.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / f"{NAME}.json")
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "hidden_act": act}
    towers = {
        "vision_config": {**sizes, "num_hidden_layers": 2, "image_size": 32, "patch_size": 16},
        "text_config": {**sizes, "num_hidden_layers": 1},
    }
    torch.manual_seed(0)
    source = transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=16)).eval()
    for parameter in source.parameters():
        parameter.data.normal_(std=0.1)
    source.save_pretrained(tmp_path / "saved")
    found = clips.load(ModelConfig(NAME, checkpoint=str(tmp_path / "saved"), preprocess="openai"))
    assert found.facts["activation"] == act
    images, tokens = torch.randn(4, 3, 32, 32), found.tokenizer(["a cat", "a photo of a dog, at night"])
    with torch.no_grad():
        theirs = source(input_ids=tokens, pixel_values=images)
        texts = found.model.encode_text(tokens)
        torch.testing.assert_close(normalize(found.visual(images), dim=-1), theirs.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(normalize(texts, dim=-1), theirs.text_embeds, atol=1e-5, rtol=0)
    assert found.logit_scale == pytest.approx(float(source.logit_scale.exp()))


def test_models_d12_the_real_vit_b16_is_computed_as_transformers_does(
    transformers: Any, vit_b16_weights: Path, tmp_path: Path
) -> None:
    ours = clips.load(ModelConfig("ViT-B-16", "openai", str(vit_b16_weights))).visual
    config = transformers.CLIPVisionConfig(patch_size=16, projection_dim=512, hidden_act="quick_gelu")
    source = transformers.CLIPVisionModelWithProjection(config).eval()
    source.load_state_dict(image_state(ours), strict=False)
    source.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 224, 224)
    # The folder tells the activation; the preprocessing is that of all tags of the architecture.
    found = clips.load(ModelConfig("ViT-B-16", checkpoint=str(tmp_path), preprocess="openai")).visual
    with torch.no_grad():
        theirs = source(pixel_values=images).image_embeds
        torch.testing.assert_close(normalize(found(images), dim=-1), normalize(theirs, dim=-1), atol=1e-5, rtol=0)
