"""The products of attention against formulas in float64, and what every quantizer owes: states, checks, bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.config import compose
from qatlab.core.errors import UserError
from qatlab.deploy.integer import integer_copy
from qatlab.models.quantized import products_left
from qatlab.models.text_tower import TextTower
from qatlab.quant import (
    AttentionProducts,
    MinMax,
    QuantAttention,
    calibrate,
    full_precision,
    layer_report,
    quantize,
    verify,
)
from qatlab.quant.inspect.coverage import coverage
from qatlab.quant.layers.walk import attention_products
from qatlab.quant.quantizers.logarithmic import PARTS, LogQuantizer

Build = Callable[..., nn.Module]
SOFTMAX = ("uniform", "log_sqrt2", "adalog")
HEADS, TOKENS, WIDTH = 3, 7, 4
W8, A8 = partial(MinMax, 8, per_channel=True), partial(MinMax, 8, symmetric=False)


def operands(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.randn(3, 2, HEADS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    query, key, value = drawn * torch.tensor([1.0, 2.0, 0.5]).view(HEADS, 1, 1)
    return query, key, value + 0.3


def fitted(softmax: str, per_head: bool = False, bits: int = 4, mask: Tensor | None = None) -> AttentionProducts:
    products = AttentionProducts(bits, heads=HEADS, softmax=softmax, per_head=per_head)
    products.observe(*operands(), mask, None)
    products.fit()
    return products


def attending(build_visual: Build, images: Tensor, softmax: str, per_head: bool = False, **options: Any) -> nn.Module:
    attention = partial(AttentionProducts, 8, softmax=softmax, per_head=per_head)
    model = quantize(build_visual(), W8, A8, attention=attention, **options)
    calibrate(model, [images])
    return model


# -- formulas --------------------------------------------------------------------------------------------------------


def even(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    """The grid of 2^bits values from ``low`` to ``high`` that has 0 on it, in float64."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / (2**bits - 1)
    zero = round(-low / step)
    return ((x / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step


def repq(x: Tensor, largest: float, bits: int) -> Tensor:
    """RepQ-ViT's logarithm to the base of the square root of 2, as its authors write it."""
    code = (-2 * (x / largest).log2()).round().clamp(0, 2**bits - 1)
    return largest * 2.0 ** -(code / 2).ceil() * (1 + (math.sqrt(2) - 1) * (code % 2))


def adalog(x: Tensor, largest: float, bits: int) -> Tensor:
    """The logarithm of least squared error among the bases 2^(p / 37)."""
    found = []
    for p in range(1, 2 * PARTS + 1):
        code = (-(x / largest).log2() * PARTS / p).round().clamp(0, 2**bits - 1)
        found.append(largest * 2.0 ** (-code * p / PARTS))
    return min(found, key=lambda rounded: float((rounded - x).square().sum()))


def rounded_softmax(softmax: str, weights: Tensor, bits: int) -> Tensor:
    largest = float(weights.max())
    if softmax == "uniform":
        return even(weights, 0.0, largest, bits)
    return repq(weights, largest, bits) if softmax == "log_sqrt2" else adalog(weights, largest, bits)


def formula(softmax: str, query: Tensor, key: Tensor, value: Tensor, bits: int) -> Tensor:
    """The output of operands (B, n, L, d) in float64; the heads in them share their grids."""
    exact = (query.double() @ key.double().mT / math.sqrt(WIDTH)).softmax(-1)
    q, k, v = (even(x.double(), float(x.min()), float(x.max()), bits) for x in (query, key, value))
    weights = (q @ k.mT / math.sqrt(WIDTH)).softmax(-1)
    # The grid is that of the weights seen in full precision.
    both = torch.stack([exact, weights])
    largest = float(exact.max())
    if softmax == "uniform":
        return even(weights, 0.0, largest, bits) @ v
    if softmax == "log_sqrt2":
        return repq(weights, largest, bits) @ v
    errors = []
    for p in range(1, 2 * PARTS + 1):
        code = (-(both / largest).log2() * PARTS / p).round().clamp(0, 2**bits - 1)
        rounded = largest * 2.0 ** (-code * p / PARTS)
        errors.append((float((rounded[0] - exact).square().sum()), p, rounded[1]))
    return min(errors, key=lambda found: found[0])[2] @ v


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("softmax", SOFTMAX)
def test_the_output_is_that_of_the_formula(softmax: str, bits: int) -> None:
    query, key, value = operands()
    found = fitted(softmax, bits=bits)(query, key, value, None, 0.0, None)
    torch.testing.assert_close(found.double(), formula(softmax, query, key, value, bits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softmax", SOFTMAX)
def test_a_head_of_its_own_grids_is_an_attention_of_one_head(softmax: str) -> None:
    query, key, value = operands()
    found = fitted(softmax, per_head=True)(query, key, value, None, 0.0, None)
    for head in range(HEADS):
        of_head = (x[:, head : head + 1] for x in (query, key, value))
        torch.testing.assert_close(
            found[:, head : head + 1].double(), formula(softmax, *of_head, 4), rtol=1e-5, atol=1e-5
        )
    assert not torch.equal(found, fitted(softmax)(query, key, value, None, 0.0, None))


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_a_logarithm_twice_changes_nothing(searched: bool, per_channel: bool, bits: int) -> None:
    x = torch.randn(5, 11, HEADS, generator=torch.Generator().manual_seed(1)).mul(3).softmax(1)
    quantizer = LogQuantizer(bits, channels=HEADS, per_channel=per_channel, searched=searched)
    quantizer.observe(x)
    quantizer.fit()
    rounded = quantizer(x)
    assert torch.equal(quantizer(rounded), rounded)
    assert all(len(row.unique()) <= 2**bits for row in quantizer.grid_rows(rounded))
    if not per_channel:
        expected = adalog(x.double(), float(x.max()), bits) if searched else repq(x.double(), float(x.max()), bits)
        torch.testing.assert_close(rounded.double(), expected, rtol=1e-5, atol=0)


def test_the_base_is_searched_over_all_batches() -> None:
    x = torch.rand(6, 50, generator=torch.Generator().manual_seed(2)).square()
    one, several = (LogQuantizer(3, channels=1, per_channel=False, searched=True) for _ in range(2))
    one.observe(x)
    for batch in x.split(2):
        several.observe(batch)
    one.fit()
    several.fit()
    assert int(one.numerator) == int(several.numerator)
    assert float(one.scale) == float(several.scale) == float(x.max())


@pytest.mark.parametrize("softmax", SOFTMAX)
def test_a_mask_hides_its_tokens_whatever_the_grid(softmax: str) -> None:
    query, key, value = operands()
    mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)
    products = fitted(softmax, mask=mask)
    found = products(query, key, value, mask, 0.0, None)
    changed = value.clone()
    changed[:, :, 4:] += 1
    again = products(query, key, changed, mask, 0.0, None)
    assert torch.equal(found[:, :, :4], again[:, :, :4])
    assert not torch.equal(found[:, :, 4:], again[:, :, 4:])
    # A mask of bool says the same.
    assert torch.equal(products(query, key, value, mask == 0, 0.0, None), found)


# -- in full precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softmax", SOFTMAX)
def test_without_rounding_the_model_is_that_of_full_precision(
    build_visual: Build, images: Tensor, softmax: str
) -> None:
    model = attending(build_visual, images, softmax)
    with torch.no_grad(), full_precision(model):
        torch.testing.assert_close(model(images), build_visual()(images), rtol=1e-5, atol=1e-5)
    assert all(products.rounds for products in attention_products(model).values())


TIMM: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm.create_model("test_vit", num_classes=8, img_size=32),
    "eva": lambda: timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=2, num_classes=8),
    "pool": lambda: timm.create_model("vit_base_patch16_siglip_224", img_size=32, depth=1, num_classes=8),
}


@pytest.mark.parametrize("name", TIMM)
def test_attentions_of_timm(name: str) -> None:
    torch.manual_seed(0)
    tower = TIMM[name]().eval()
    size = 28 if name == "eva" else 32
    images = torch.randn(2, 3, size, size)
    attention = partial(AttentionProducts, 8, softmax="adalog", per_head=True)
    model = quantize(copy.deepcopy(tower), W8, A8, attention=attention)
    calibrate(model, [images])
    with torch.no_grad(), full_precision(model):
        torch.testing.assert_close(model(images), tower(images), rtol=1e-4, atol=1e-5)
    assert coverage(model, images[:1], {}).attention == 0
    assert len([row for row in verify(model, images) if row["tensor"] == "softmax"]) == len(attention_products(model))
    assert products_left(model) == [
        "QK^T and PV are quantized in {0} of {0} attentions".format(len(attention_products(model)))
    ]
    assert torch.equal(copy.deepcopy(model)(images), model(images))


def test_a_text_tower_hides_later_tokens() -> None:
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    tower = TextTower(open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)).eval()
    tokens = torch.randint(1, 40, (4, 8))
    tokens[:, 4] = 49  # the end, at which the feature is read
    model = quantize(copy.deepcopy(tower), W8, A8, attention=partial(AttentionProducts, 4, softmax="log_sqrt2"))
    calibrate(model, [tokens])
    with torch.no_grad(), full_precision(model):
        torch.testing.assert_close(model(tokens), tower(tokens), rtol=1e-5, atol=1e-5)
    later = tokens.clone()
    later[:, 5:] = 7
    with torch.no_grad():
        assert torch.equal(model(later), model(tokens))
        assert not torch.equal(model(tokens), tower(tokens))


# -- what is said of it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("softmax", SOFTMAX)
def test_products_are_verified_counted_and_named(
    build_visual: Build, images: Tensor, softmax: str, per_head: bool
) -> None:
    model = attending(build_visual, images, softmax, per_head)
    rows = [row for row in verify(model, images) if row["layer"].endswith("attn.products")]
    assert [row["tensor"] for row in rows] == ["query", "key", "value", "softmax"] * 2
    assert all(row["calls"] == 1 and 1 < row["distinct"] <= 256 for row in rows)
    found, plain = coverage(model, images[:1], {}), coverage(quantize(build_visual(), W8, A8), images[:1], {})
    assert (found.attention, found.rounded_attention) == (0, plain.attention)
    assert found.products == plain.products
    assert found.shares == plain.shares | {"attention_share": 0}
    assert any(line.startswith("QK^T and PV with both operands rounded are ") for line in found.told())
    report = {row["layer"]: row for row in layer_report(model, images)}
    assert report["transformer.resblocks.0.attn.products.qk"]["in_features"] == 16
    assert report["transformer.resblocks.0.attn.products.pv"]["in_features"] == 5
    for name in ("qk", "pv"):
        assert report[f"transformer.resblocks.1.attn.products.{name}"]["output_sqnr_db"] > 15


def test_rules_leave_products_out(build_visual: Build, images: Tensor) -> None:
    rules = {"*.0.attn.products": None, "*.1.attn.products": {"attention": {"bits": 5}}}
    model = attending(build_visual, images, "uniform", rules=rules)
    assert {name: products.bits for name, products in attention_products(model).items()} == {
        "transformer.resblocks.1.attn.products": 5
    }
    assert products_left(model) == [
        "QK^T and PV are quantized in 1 of 2 attentions; in full precision stay those of transformer.resblocks.0.attn"
    ]
    assert coverage(model, images[:1], {}).attention == coverage(model, images[:1], {}).rounded_attention > 0


def test_an_export_refuses_and_names_the_attention(build_visual: Build, images: Tensor) -> None:
    model = attending(build_visual, images, "uniform")
    with pytest.raises(
        UserError, match=r"resblocks\.0\.attn\.products' has no exact integer form.*quant/attention=null"
    ):
        integer_copy(model)


# -- what every quantizer owes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("softmax", SOFTMAX)
def test_a_state_makes_an_equal_model(build_visual: Build, images: Tensor, softmax: str, per_head: bool) -> None:
    model = attending(build_visual, images, softmax, per_head)
    other = quantize(
        build_visual(), W8, A8, attention=partial(AttentionProducts, 8, softmax=softmax, per_head=per_head)
    )
    with pytest.raises(UserError, match="before it has a scale"):
        other(images)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))
    names = [name for name in model.state_dict() if ".products." in name]
    assert "transformer.resblocks.0.attn.products.query_quantizer.step" in names


@pytest.mark.parametrize("softmax", SOFTMAX)
def test_gradients_pass_straight_through(softmax: str) -> None:
    query, key, value = (x.requires_grad_() for x in operands())
    products = fitted(softmax, bits=8)
    found = torch.autograd.grad(products(query, key, value, None, 0.0, None).square().sum(), (query, key, value))
    products.rounds = False
    exact = torch.autograd.grad(products(query, key, value, None, 0.0, None).square().sum(), (query, key, value))
    for gradient, of_exact in zip(found, exact, strict=True):
        assert float(F.cosine_similarity(gradient.flatten(), of_exact.flatten(), 0)) > 0.95


def test_training_goes_on_with_rounded_products(build_visual: Build, images: Tensor, train_a_little: Any) -> None:
    model = attending(build_visual, images, "log_sqrt2").train()
    losses = train_a_little(model, images, 1e-3)
    assert losses[-1] < losses[0]


def test_bad_input_is_told(build_visual: Build, images: Tensor) -> None:
    with pytest.raises(UserError, match=r"quant\.attention\.observer=mse .* per_head=true it is absmax or ema"):
        AttentionProducts(8, heads=2, per_head=True, observer="mse")
    with pytest.raises(UserError, match="softmax"):
        AttentionProducts(8, heads=2, softmax="log2")
    with pytest.raises(UserError, match="nothing was observed"):
        LogQuantizer(8, channels=1, per_channel=False, searched=True).fit()
    with pytest.raises(UserError, match="NaN"):
        LogQuantizer(8, channels=1, per_channel=False, searched=False).observe(torch.tensor([float("nan")]))
    with pytest.raises(UserError, match="no attention gets it"):
        quantize(nn.Sequential(nn.Linear(4, 4)), W8, A8, attention=partial(AttentionProducts, 8))
    with pytest.raises(UserError, match="matches no layer"):
        quantize(build_visual(), W8, A8, {"*.product": None}, attention=partial(AttentionProducts, 8))
    assert isinstance(quantize(build_visual(), W8, A8).transformer.resblocks[0].attn, QuantAttention)


# -- the setting of the literature -----------------------------------------------------------------------------------


def test_the_literatures_setting_rounds_everything_and_its_bits_are_two_options() -> None:
    config = compose("recipe=vit_literature").quant
    assert (config.weight["bits"], config.act["bits"], config.attention["bits"]) == (6, 6, 6)
    assert (config.weight["per_channel"], config.act["symmetric"], config.first, config.last) == (
        True,
        False,
        True,
        True,
    )
    assert config.rules == {"conv1": {"act": {"bits": 8}}, "proj": {"act": {"bits": 8}}}
    config = compose("recipe=vit_literature", "quant.weight.bits=4", "quant.act.bits=8", "quant/attention=adalog").quant
    assert (config.weight["bits"], config.act["bits"], config.attention["bits"]) == (4, 8, 8)
    assert config.attention["softmax"] == "adalog"
