"""Features of transformers' SigLIP, read from what its save_pretrained leaves, against transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import siglip
import torch

from qatlab.config import ModelConfig
from qatlab.models import clip as clips

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed: the extra 'peers'")


@pytest.fixture
def tokenizer(transformers: Any) -> Any:
    """A tokenizer of a few words, as transformers saves one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "a", "photo", "of", "cat", "dog"])}
    made = Tokenizer(models.WordLevel(words, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu"])
def test_models_d12_features_are_those_of_transformers(
    transformers: Any, tokenizer: Any, tmp_path: Path, act: str
) -> None:
    siglip.register(tmp_path)
    towers = {
        "vision_config": {**SIZES, "image_size": 32, "patch_size": 16, "hidden_act": act},
        "text_config": {**SIZES, "vocab_size": 50, "max_position_embeddings": 8, "hidden_act": act},
    }
    torch.manual_seed(0)
    source = transformers.SiglipModel(transformers.SiglipConfig(**towers)).eval()
    for parameter in source.parameters():
        parameter.data.normal_(std=0.3)
    source.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    found = clips.load(ModelConfig(siglip.NAME, checkpoint=str(tmp_path / "saved"), preprocess="openai"))
    assert found.facts["activation"] == ("gelu" if act == "gelu" else "gelu_tanh")
    images, tokens = torch.randn(4, 3, 32, 32), found.tokenizer(["a cat", "a photo of a dog"])  # type: ignore[misc]
    assert tokens.tolist() == [[2, 5, *6 * [1]], [2, 3, 4, 2, 6, 1, 1, 1]]
    with torch.no_grad():
        theirs = source(input_ids=tokens, pixel_values=images)
        ours = torch.nn.functional.normalize(found.visual(images), dim=-1)
        texts = found.model.encode_text(tokens, normalize=True)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(ours, theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, theirs.text_embeds, atol=1e-5, rtol=0)
    assert found.logit_scale == pytest.approx(float(source.logit_scale.exp()))
