from __future__ import annotations

import copy
from functools import partial

import open_clip.transformer
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qatlab.core.errors import UserError
from qatlab.quant import LSQ, QuantAttention, QuantOpenClipAttention, calibrate, quant_layers, quantize, verify

X = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
CAUSAL = torch.full((7, 7), float("-inf")).triu(1)
MASKS = {
    "none": None,
    "causal": CAUSAL,
    "bool": CAUSAL.isinf(),
    "per head": torch.randn(12, 7, 7, generator=torch.Generator().manual_seed(1)),
}


def unquantized(_: str, layer: nn.Linear) -> nn.Linear:
    return layer


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_is_reproduced(mask: str, batch_first: bool, bias: bool, training: bool) -> None:
    torch.manual_seed(2)
    source = nn.MultiheadAttention(32, 4, batch_first=batch_first, bias=bias).train(training)
    if bias:
        nn.init.normal_(source.in_proj_bias)
    attention = QuantAttention(source, "attn", unquantized)
    x = X if batch_first else X.transpose(0, 1).contiguous()
    expected, _ = source(x, x, x, need_weights=False, attn_mask=MASKS[mask])
    result, weights = attention(x, x, x, need_weights=False, attn_mask=MASKS[mask])
    assert weights is None
    assert attention.training is training
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert attention.in_proj.weight is source.in_proj_weight


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"scale_heads": True, "inner_norm": True}, {"qkv_bias": False}], ids=str
)
def test_open_clip_attention_is_reproduced(mask: str, options: dict[str, bool]) -> None:
    torch.manual_seed(3)
    source = open_clip.transformer.Attention(32, 4, **options).eval()
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.3)
    attention = QuantOpenClipAttention(source, "attn", unquantized)
    expected = source(X, MASKS[mask])
    torch.testing.assert_close(attention(X, attn_mask=MASKS[mask]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_scaled_cosine_attention(mask: str) -> None:
    """open_clip 3.3 cannot run this option itself: the witness is the formula, one image and head at a time."""
    torch.manual_seed(4)
    source = open_clip.transformer.Attention(32, 4, scaled_cosine=True).eval()
    nn.init.normal_(source.logit_scale)
    attention = QuantOpenClipAttention(source, "attn", unquantized)
    expected = torch.empty_like(X)
    for image in range(3):
        q, k, v = F.linear(X[image], source.in_proj_weight, source.in_proj_bias).chunk(3, dim=-1)
        heads = []
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            logits = F.cosine_similarity(q[:, None, part], k[None, :, part], dim=-1) * source.logit_scale[head].exp()
            chosen = MASKS[mask]
            if chosen is not None:
                chosen = chosen[4 * image + head] if chosen.ndim == 3 else chosen
                logits = logits.masked_fill(chosen, float("-inf")) if chosen.dtype == torch.bool else logits + chosen
            heads.append(logits.softmax(-1) @ v[:, part])
        expected[image] = source.out_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(X, MASKS[mask]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"kdim": 16, "vdim": 16}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_unknown_kinds_of_attention_are_refused(options: dict[str, int]) -> None:
    model = nn.ModuleDict({"pool": nn.MultiheadAttention(32, 4, **options)})
    with pytest.raises(UserError, match=r"'pool' cannot be quantized.*quant\.rules=\{pool\.\*: null\}"):
        quantize(model, partial(LSQ, 8), None)
    assert isinstance(model["pool"], nn.MultiheadAttention)
    skipped = {"pool.*": None}
    with_linear = nn.ModuleDict({"pool": model["pool"], "fc": nn.Linear(4, 4)})
    assert isinstance(quantize(with_linear, partial(LSQ, 8), None, skipped)["pool"], nn.MultiheadAttention)


def test_cross_attention_is_refused_in_the_forward() -> None:
    attention = QuantAttention(nn.MultiheadAttention(32, 4, batch_first=True), "block.attn", unquantized)
    with pytest.raises(UserError, match=r"'block\.attn'.*not its query"):
        attention(X, X.clone(), X)
    with pytest.raises(UserError, match="need_weights"):
        attention(X, X, X, need_weights=True)


def test_open_clips_own_block_is_quantized(build_visual, images: torch.Tensor) -> None:
    model = build_visual(block_type="custom", qk_norm=True, scale_attn_inner=True)
    original = copy.deepcopy(model)
    quantize(model, partial(LSQ, 8, per_channel=True), partial(LSQ, 8))
    calibrate(model, [images])
    assert len(quant_layers(model)) == 8
    assert len(verify(model, images)) == 16
    assert F.cosine_similarity(model(images), original(images)).min() > 0.99


def test_timm_attention(images: torch.Tensor) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(5)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **options).eval()
    original = copy.deepcopy(model)
    quantize(model, partial(LSQ, 8, per_channel=True), partial(LSQ, 8), patch_conv=True)
    calibrate(model, [images])
    kinds = [name.rsplit(".", 1)[-1] for name in quant_layers(model)]
    assert sorted(kinds) == sorted(["qkv", "proj", "fc1", "fc2"] * 2 + ["head", "proj"])
    assert len(verify(model, images)) == 2 * len(kinds)
    assert F.cosine_similarity(model(images), original(images)).min() > 0.99


def test_a_layer_whose_weight_is_read_without_a_call_is_found(images: torch.Tensor) -> None:
    """timm's EVA and BEiT attention compute F.linear(x, self.qkv.weight, ...): swapping qkv would do nothing."""
    timm = pytest.importorskip("timm")
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("beit_base_patch16_224", pretrained=False, **options).eval()
    quantize(model, partial(LSQ, 8), partial(LSQ, 8))
    with pytest.raises(UserError, match=r"never calls blocks\.0\.attn\.qkv.*quant\.rules"):
        calibrate(model, [images])
