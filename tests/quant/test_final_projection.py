"""quant.last holds for every family of towers: what is left in full precision, and what is rounded where it is asked."""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from qatlab.core.errors import UserError
from qatlab.models.text_tower import TextTower
from qatlab.quant import MinMax, calibrate, quant_layers, quantize, verify
from qatlab.towers.registry import final_projections

WEIGHT, ACT = partial(MinMax, 4, per_channel=True), partial(MinMax, 4)
VIT, CONVNEXT = "test_vit", "test_convnext"  # timm's own small ones
# The vision_cfg of each family, the size of its images, and the names of its final projection.
FAMILIES: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "open_clip": ({"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}, 32, ["proj"]),
    "timm linear": ({"timm_model_name": CONVNEXT, "timm_pool": "", "timm_proj": "linear"}, 32, ["head.proj"]),
    "timm mlp": (
        {"timm_model_name": CONVNEXT, "timm_pool": "", "timm_proj": "mlp"},
        32,
        ["head.mlp.fc1", "head.mlp.fc2"],
    ),
    "timm classifier": ({"timm_model_name": VIT, "timm_pool": "token", "timm_proj": None}, 160, ["trunk.head"]),
    "timm classifier of a head": (
        {"timm_model_name": CONVNEXT, "timm_pool": "avg", "timm_proj": None},
        32,
        ["trunk.head.fc"],
    ),
    "timm none": ({"timm_model_name": VIT, "timm_pool": "token", "timm_proj": "none"}, 160, []),
    "resnet": ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}, 32, ["attnpool.c_proj"]),
}


def tower(family: str) -> nn.Module:
    torch.manual_seed(0)
    vision, size, _ = FAMILIES[family]
    embedding = 64 if family == "timm none" else 16
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CustomTextCLIP(embedding, {"image_size": size, **vision}, text).visual.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_models_d8_the_final_projection_is_named(family: str) -> None:
    visual = tower(family)
    named = FAMILIES[family][2]
    assert list(final_projections(visual)) == named
    assert list(final_projections(nn.ModuleDict({"tower": visual}))) == [f"tower.{name}" for name in named]
    assert not {*named} & set(quant_layers(quantize(visual, WEIGHT, ACT)))


@pytest.mark.parametrize("family", [name for name, (_, _, named) in FAMILIES.items() if named and name != "resnet"])
def test_models_d8_it_is_rounded_where_it_is_asked_for_and_only_there(family: str) -> None:
    _, size, named = FAMILIES[family]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    built = {asked: quantize(tower(family), WEIGHT, ACT, final_proj=asked) for asked in (False, True)}
    for model in built.values():
        calibrate(model, [images])
        verify(model, images)
    assert set(quant_layers(built[True])) - set(quant_layers(built[False])) == {*named}
    original = tower(family).get_parameter(named[-1] if family == "open_clip" else f"{named[-1]}.weight")
    kept = built[False].get_parameter(named[-1] if family == "open_clip" else f"{named[-1]}.weight")
    assert torch.equal(kept, original)
    assert not torch.equal(built[False](images), built[True](images))


def test_models_d8_a_tower_without_one_is_told() -> None:
    with pytest.raises(UserError, match=r"quant\.last is true, but the model has no final projection"):
        quantize(tower("timm none"), WEIGHT, ACT, final_proj=True)


def test_models_d8_a_linear_text_projection_is_left_alone_too() -> None:
    """As the Parameter that other text towers have in its place; open_clip asks by isinstance which of them it is."""
    torch.manual_seed(0)
    vision = FAMILIES["open_clip"][0]
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1, "proj_bias": True}
    model = TextTower(open_clip.CustomTextCLIP(16, vision, text).eval())
    assert isinstance(model.text.text.text_projection, nn.Linear)
    quantize(model, WEIGHT, ACT)
    tokens = torch.randint(1, 49, (2, 8), generator=torch.Generator().manual_seed(1))
    calibrate(model, [tokens])
    verify(model, tokens)
    assert type(model.text.text.text_projection) is nn.Linear
