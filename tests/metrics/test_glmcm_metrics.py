"""GL-MCM against loops over images, patches and classes; patch features against the authors' forward, written out."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.core.errors import UserError
from qatlab.metrics.glmcm import gl_mcm, local_mcm
from qatlab.metrics.ood import mcm
from qatlab.models.patches import with_patches
from qatlab.quant import MinMax, QuantAttention, calibrate, quant_layers, quantize
from qatlab.quant.rewrites.rotation import Rotation


def tower(**vision: Any) -> Any:
    torch.manual_seed(0)
    vision_cfg = {"image_size": 16, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16, **vision}
    text_cfg = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    visual: Any = open_clip.CLIP(embed_dim=24, vision_cfg=vision_cfg, text_cfg=text_cfg).visual.eval()
    with torch.no_grad():
        for parameter in visual.parameters():
            if parameter.ndim == 1:  # biases and norms that are not those of a fresh layer
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return visual.requires_grad_(False)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def written_out(visual: Any, images: Tensor) -> Tensor:
    """The value path of AtsuMiyai/GL-MCM, clip/model.py, token by token: blocks, then v of the last one."""
    x = visual.ln_pre(
        torch.cat([visual.class_embedding.expand(len(images), 1, -1), visual.conv1(images).flatten(2).mT], dim=1)
        + visual.positional_embedding
    )
    *first, last = visual.transformer.resblocks
    for block in first:
        x = block(x)
    rows = []
    for token in x.flatten(0, 1):
        values = (last.attn.in_proj_weight @ last.ln_1(token) + last.attn.in_proj_bias).chunk(3)[2]
        token = token + last.ls_1(last.attn.out_proj.weight @ values + last.attn.out_proj.bias)
        token = token + last.ls_2(last.mlp(last.ln_2(token)))
        rows.append(visual.ln_post(token) @ visual.proj)
    tokens = torch.stack(rows).unflatten(0, (len(images), -1))[:, 1:]
    return tokens / tokens.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_patches_are_those_of_the_authors_forward(images: Tensor, layer_scale: float | None) -> None:
    visual = tower(ls_init_value=layer_scale)
    features, patches = with_patches(visual, images)
    assert patches.shape == (5, 4, 24)
    assert torch.equal(features, visual(images))
    torch.testing.assert_close(patches, written_out(visual, images), rtol=0, atol=1e-5)


def test_one_forward_gives_both_and_leaves_no_hook(images: Tensor) -> None:
    visual, calls = tower(), []
    visual.conv1.register_forward_hook(lambda *_: calls.append(1))
    with_patches(visual, images)
    assert len(calls) == 1
    assert not visual.transformer.resblocks[-1]._forward_pre_hooks


def test_patches_of_a_replaced_attention_are_the_same(images: Tensor) -> None:
    visual = tower()
    swapped = copy.deepcopy(visual)
    last = swapped.transformer.resblocks[-1]
    last.attn = QuantAttention(last.attn, "attn", lambda name, layer: layer)
    torch.testing.assert_close(with_patches(swapped, images)[1], with_patches(visual, images)[1], rtol=0, atol=1e-5)


def test_patches_of_a_rotated_tower_are_the_same(images: Tensor) -> None:
    visual = tower()
    rotated = Rotation(seed=3)(copy.deepcopy(visual), [images])
    torch.testing.assert_close(with_patches(rotated, images)[1], with_patches(visual, images)[1], rtol=0, atol=1e-4)


def test_quantized_layers_are_called_for_the_patches_too(images: Tensor) -> None:
    visual = tower()
    model = quantize(copy.deepcopy(visual), partial(MinMax, 4, per_channel=True), partial(MinMax, 8), final_proj=True)
    calibrate(model, [images])
    model.eval()
    calls: dict[str, int] = {}
    for name, layer in quant_layers(model).items():
        layer.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    _, patches = with_patches(model, images)
    assert {name: count for name, count in calls.items() if count == 2} == dict.fromkeys(
        [f"transformer.resblocks.1.{part}" for part in ("attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")]
        + ["proj"],
        2,
    )
    exact = with_patches(visual, images)[1]
    assert 0.8 < float((patches * exact).sum(-1).mean()) < 0.99999


@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_scores_match_a_loop(temperature: float, weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(19, 24, generator=generator), dim=-1)
    patches = F.normalize(torch.randn(19, 5, 24, generator=generator), dim=-1)
    classes = F.normalize(torch.randn(7, 24, generator=generator), dim=-1)

    def peak(vector: Tensor) -> float:
        cosines = (classes.double() @ vector.double()).tolist()
        return 1 / math.fsum(math.exp((c - max(cosines)) / temperature) for c in cosines)

    local = [max(peak(patch) for patch in of_image) for of_image in patches]
    expected = [peak(image) + weight * found for image, found in zip(images, local, strict=True)]
    found = local_mcm(patches, classes, temperature)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(local, dtype=torch.float64), rtol=2e-5, atol=0)
    scores = gl_mcm(images @ classes.T, found, temperature, weight)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=0)
    assert torch.equal(gl_mcm(images @ classes.T, found, temperature, 0.0), mcm(images @ classes.T, temperature))


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e6])
def test_extreme_cosines_are_finite(temperature: float) -> None:
    patches = torch.stack([torch.eye(4), -torch.eye(4)])
    assert torch.isfinite(local_mcm(patches, torch.eye(4), temperature)).all()


def test_towers_without_patches_are_told(images: Tensor) -> None:
    with pytest.raises(UserError, match=r"gl_mcm needs patch features.*it is a Sequential"):
        with_patches(nn.Sequential(), images)
    with pytest.raises(UserError, match="it pools by attention"):
        with_patches(tower(attentional_pool=True, attn_pooler_heads=2), images)
    with pytest.raises(UserError, match="its blocks are CustomResidualAttentionBlocks"):
        with_patches(tower(block_type="custom"), images)
