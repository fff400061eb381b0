"""The zero-shot head against its plain formula, and its cache: made once, never taken for another one's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor
from torch.nn.functional import normalize

from qatlab.config import ModelConfig
from qatlab.core.errors import UserError
from qatlab.data import TextTable
from qatlab.models import clip as clips
from qatlab.models.clip import Clip
from qatlab.models.prompts import prompts
from qatlab.models.zeroshot import class_features, cut_batches, encode_text, text_features

NAMES = ["circle", "star", "square"]
TEMPLATES = ["a photo of a {}", "there is a {}"]


pytestmark = pytest.mark.usefixtures("cold")


@pytest.fixture
def clip() -> Clip:
    return clips.load(ModelConfig())


def table_clip(rows: torch.Tensor, names: list[str]) -> Clip:
    made = clips.load(ModelConfig())
    made.model, made.text_table = None, TextTable(rows, names, "test.safetensors:pets")
    return made


@torch.no_grad()
def test_a_class_is_the_unit_mean_of_its_unit_prompts(clip: Clip) -> None:
    head = class_features(clip, NAMES, TEMPLATES)
    assert head.names == NAMES
    assert head.prompts == "2 templates"
    assert head.features.dtype == torch.float32
    model: Any = clip.model
    for name, found in zip(NAMES, head.features.double(), strict=True):
        mean = torch.zeros(64, dtype=torch.float64)
        for template in TEMPLATES:
            raw = model.encode_text(clip.tokenizer([template.format(name)]))[0].double()  # type: ignore[misc]
            mean += raw / raw.square().sum().sqrt() / len(TEMPLATES)
        torch.testing.assert_close(found, mean / mean.square().sum().sqrt(), rtol=0, atol=1e-6)


def test_one_template_is_named_in_the_results(clip: Clip) -> None:
    assert class_features(clip, NAMES, ["a photo of a {}"]).prompts == "a photo of a {}"


def test_the_second_time_the_text_tower_is_not_asked(clip: Clip, calls: list[int]) -> None:
    first = class_features(clip, NAMES, TEMPLATES)
    assert sum(calls) == len(NAMES) * len(TEMPLATES)
    calls.clear()
    again = class_features(clip, NAMES, TEMPLATES)
    assert calls == []
    assert torch.equal(first.features, again.features)


def test_a_training_text_tower_is_always_asked(clip: Clip, calls: list[int], cold: Path) -> None:
    for _ in range(2):
        class_features(clip, NAMES, TEMPLATES, cache=False)
    assert sum(calls) == 2 * len(NAMES) * len(TEMPLATES)
    assert not list(cold.rglob("*.safetensors"))


def _text_weight(clip: Clip) -> None:
    model: Any = clip.model
    model.transformer.resblocks[0].mlp.c_fc.weight.data[0, 0] += 1e-3


def _image_weight(clip: Clip) -> None:
    model: Any = clip.model
    model.visual.proj.data[0, 0] += 1e-3


def _text_activation(clip: Clip) -> None:
    model: Any = clip.model
    model.transformer.resblocks[0].mlp.gelu = QuickGELU()


def _image_activation(clip: Clip) -> None:
    model: Any = clip.model
    model.visual.transformer.resblocks[0].mlp.gelu = QuickGELU()


def _heads(clip: Clip) -> None:
    model: Any = clip.model
    for block in model.transformer.resblocks:
        block.attn.num_heads, block.attn.head_dim = 2 * block.attn.num_heads, block.attn.head_dim // 2


def _pooling(clip: Clip) -> None:
    model: Any = clip.model
    model.text_pool_type = "last"


def _tokenizer(clip: Clip) -> None:
    tokenizer: Any = clip.tokenizer
    clip.tokenizer = lambda texts: tokenizer([f"a {text}" for text in texts])


def _logit_scale(clip: Clip) -> None:
    model: Any = clip.model
    model.logit_scale.data += 1


@pytest.mark.parametrize(
    ("names", "templates", "change", "anew"),
    [
        (NAMES, TEMPLATES, None, False),
        (NAMES[::-1], TEMPLATES, None, True),
        (NAMES, TEMPLATES[::-1], None, True),
        (NAMES, TEMPLATES[:1], None, True),
        (NAMES, TEMPLATES, _text_weight, True),
        (NAMES, TEMPLATES, _image_weight, False),
        (NAMES, TEMPLATES, _image_activation, False),
        (NAMES, TEMPLATES, _logit_scale, False),
        *((NAMES, TEMPLATES, change, True) for change in (_text_activation, _heads, _pooling, _tokenizer)),
    ],
)
def test_the_cache_goes_by_what_decides_the_features(
    clip: Clip, calls: list[int], names: list[str], templates: list[str], change: Any, anew: bool
) -> None:
    class_features(clip, NAMES, TEMPLATES)
    calls.clear()
    if change is not None:
        change(clip)
    class_features(clip, names, templates)
    assert bool(calls) == anew


def test_a_cached_head_is_the_one_of_these_weights(clip: Clip) -> None:
    first = class_features(clip, NAMES, TEMPLATES).features
    _text_weight(clip)
    model: Any = clip.model
    model.text_projection.data.mul_(-1)
    second = class_features(clip, NAMES, TEMPLATES).features
    assert not torch.equal(first, second)


def test_encoded_texts_are_unit_vectors_in_any_chunking(clip: Clip) -> None:
    texts = [f"a photo of a {name}" for name in NAMES]
    whole, pieces = encode_text(clip, texts), encode_text(clip, texts, batch_size=2)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(whole, pieces)
    assert not whole.requires_grad


TEXT = {"context_length": 12, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
TOWERS = {
    "argmax": (open_clip.CLIP, {}),
    "eos": (open_clip.CLIP, {"pool_type": "eos", "eos_id": 39}),
    "argmax, a module of its own": (open_clip.CustomTextCLIP, {}),
    "not causal": (open_clip.CLIP, {"no_causal_mask": True}),
    "class token": (open_clip.CustomTextCLIP, {"embed_cls": True}),
    "last": (open_clip.CLIP, {"pool_type": "last"}),
}
CUT = ["argmax", "eos", "argmax, a module of its own"]


def made(tower: str) -> Any:
    torch.manual_seed(0)
    kind, options = TOWERS[tower]
    model = kind(embed_dim=24, vision_cfg=VISION, text_cfg={**TEXT, **options}).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def some_tokens(texts: list[str]) -> Tensor:
    """A text is a number of words; its end has the highest id, and its first word the padding's."""
    rows = [[38, *range(int(text)), 39] for text in texts]
    return torch.tensor([row + [0] * (12 - len(row)) for row in rows])


@pytest.mark.parametrize("tower", TOWERS)
def test_features_are_those_of_the_whole_context(tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = made(tower), [str(words) for words in (3, 1, 10, 2, 1, 5, 4, 1, 7)]
    clip = clips.load(ModelConfig())
    clip.model, clip.tokenizer = model, some_tokens
    expected = normalize(model.encode_text(some_tokens(texts)), dim=-1)
    lengths, encode = [], model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda tokens: (lengths.append(tokens.shape[1]), encode(tokens))[1])
    found = encode_text(clip, texts, batch_size=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert lengths == ([3, 4, 6, 9, 12] if tower in CUT else [12] * 5)
    assert model.state_dict().keys() == made(tower).state_dict().keys()
    assert torch.equal(encode(some_tokens(texts)), model.encode_text(some_tokens(texts)))


@torch.no_grad()
def test_the_tiny_models_features_are_those_of_the_whole_context(clip: Clip) -> None:
    texts = ["a circle", "a photo of a small red star in the sky", "there is a square", "a"]
    model: Any = clip.model
    whole = normalize(model.encode_text(clip.tokenizer(texts)), dim=-1)  # type: ignore[misc]
    torch.testing.assert_close(encode_text(clip, texts), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(encode_text(clip, texts, batch_size=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("templates", ["imagenet80", "imagenet7", "mcm"])
def test_a_fraction_of_the_tokens_of_imagenets_prompts_is_encoded(templates: str) -> None:
    texts = [text for of_class in prompts(templates).of(open_clip.IMAGENET_CLASSNAMES[::8]) for text in of_class]
    tokens = open_clip.get_tokenizer("ViT-B-32")(texts)
    model = open_clip.CLIP(embed_dim=8, vision_cfg=VISION, text_cfg={"width": 16, "heads": 1, "layers": 1})
    batches = list(cut_batches(model, tokens, 256))
    assert sorted(torch.cat([rows for rows, _ in batches]).tolist()) == list(range(len(texts)))
    for rows, length in batches:
        assert not tokens[rows, length:].any()
    assert sum(len(rows) * length for rows, length in batches) <= 0.2 * tokens.numel()


def test_a_packaged_set_is_named_in_the_results(clip: Clip, calls: list[int]) -> None:
    head = class_features(clip, NAMES, "mcm")
    assert head.prompts == "mcm"
    calls.clear()
    same = class_features(clip, NAMES, ["a photo of a {}"])
    assert same.prompts == "a photo of a {}"
    assert torch.equal(head.features, same.features)
    assert calls == []


def test_texts_of_no_class_are_encoded_once(clip: Clip, calls: list[int]) -> None:
    texts = ["a photo", "a picture of the sky"]
    first = text_features(clip, texts)
    assert calls == [2]
    assert torch.equal(text_features(clip, texts), first)
    assert calls == [2]
    text_features(clip, texts[::-1])
    text_features(clip, texts, cache=False)
    assert calls == [2, 2, 2]
    torch.testing.assert_close(first, encode_text(clip, texts))


def test_a_table_gives_its_rows_in_the_order_asked_for() -> None:
    clip = table_clip(torch.eye(3), ["cat", "dog", "fish"])
    assert torch.equal(class_features(clip, None, TEMPLATES).features, torch.eye(3))
    head = class_features(clip, ["fish", "cat"], TEMPLATES)
    assert torch.equal(head.features, torch.eye(3)[[2, 0]])
    assert (head.names, head.prompts) == (["fish", "cat"], "test.safetensors:pets")


def test_mistakes_are_told_in_a_sentence(clip: Clip) -> None:
    with pytest.raises(UserError, match=r"has 0 rows for suite.class_names' 'cow'"):
        class_features(table_clip(torch.eye(2), ["cat", "dog"]), ["cow", "hen", "cat"], TEMPLATES)
    with pytest.raises(UserError, match=r"suite\.templates=.*needs a \{\}"):
        class_features(clip, NAMES, ["a photo of a {}", "a photo"])
    with pytest.raises(UserError, match=r"names no classes"):
        class_features(clip, None, TEMPLATES)
    clip.model = None
    with pytest.raises(UserError, match=r"no text tower.*model\.text_features"):
        class_features(clip, NAMES, TEMPLATES)
