"""The text tower of every family: what it computes before rounding, which products are rounded, and that it can be trained."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from texts import CONTEXT, FAMILIES, FEATURES, LAYERS, PROJECTED, apart, build, tokens
from torch import nn

from qatlab.models.text_tower import TextTower
from qatlab.quant import LRQAT, LSQ, MinMax, MixedPrecision, calibrate, layer_report, quant_layers, quantize, verify
from qatlab.quant.inspect.coverage import coverage
from qatlab.quant.layers.convert import layer_names
from qatlab.quant.layers.merge import merge
from qatlab.quant.layers.walk import full_precision
from qatlab.towers.registry import final_projections, tower_of

WEIGHT, ACT = partial(MinMax, 8, per_channel=True), partial(MinMax, 8)
BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


def quantized(family: str, weight: object = WEIGHT, act: object = ACT, final_proj: bool = True) -> TextTower:
    tower = TextTower(build(family))
    quantize(tower, weight, act, final_proj=final_proj and family in PROJECTED)  # type: ignore[arg-type]
    return tower


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_models_d7_before_rounding_it_is_encode_text(family: str, dtype: torch.dtype) -> None:
    model, texts = build(family).to(dtype), tokens(family)
    exact = model.encode_text(texts)
    assert torch.equal(TextTower(model)(texts), exact)
    tower = quantized(family).to(dtype)
    with full_precision(tower):
        assert apart(tower(texts), exact) < BOUND[dtype]
    assert not torch.allclose(exact[0], exact[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_models_d7_all_products_are_rounded_but_the_last_by_default(family: str) -> None:
    width = FEATURES if family == "SigLIP i18n" else 32
    length = CONTEXT + 1 if family == "CoCa" else CONTEXT  # CoCa's class token comes behind the text
    ratio = 3.7362 if family == "SigLIP i18n" else 4
    in_blocks = LAYERS * length * (4 * width**2 + 2 * width * int(width * ratio))
    # Look-ups in the tables of tokens and positions multiply nothing.
    last = width * FEATURES if family in PROJECTED else 0
    for final_proj in (False, True):
        found = coverage(quantized(family, final_proj=final_proj), tokens(family)[:1], {})
        rounded = [of.macs for of in found.products if of.weight and of.act]
        assert sum(rounded) == in_blocks + (last if final_proj else 0)
        assert sum(of.macs for of in found.products) == in_blocks + last
        assert found.shares["product_share"] == (1 if final_proj or not last else in_blocks / (in_blocks + last))
        assert found.attention == LAYERS * 2 * length**2 * width


@pytest.mark.parametrize("family", FAMILIES)
def test_models_d7_every_layer_is_called_and_reported(family: str) -> None:
    tower, texts = quantized(family), tokens(family)
    calibrate(tower, [texts])
    names = layer_names(TextTower(build(family)), final_proj=family in PROJECTED)
    assert len(names) == 4 * LAYERS + (family in PROJECTED)
    assert {row["layer"] for row in verify(tower, texts)} == set(names)
    assert [row["layer"] for row in layer_report(tower, texts)] == names
    assert all(row["output_sqnr_db"] > 15 for row in layer_report(tower, texts))
    with torch.no_grad():
        assert 0 < apart(tower.eval()(texts), build(family).encode_text(texts)) < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_its_parts_are_described(family: str) -> None:
    model = build(family)
    text = getattr(model, "text", model)
    tower = tower_of(text, "text")
    assert tower is not None
    assert [block.module for block in tower.blocks] == list(text.transformer.resblocks)
    assert [place.name for place in tower.projections] == ["text.text_projection"] * (family in PROJECTED)
    within = TextTower(model)
    named = final_projections(within)
    held = {**dict(within.named_modules()), **dict(within.named_parameters())}
    assert all(held[name] is place.part for name, place in named.items())
    assert len(named) == (family in PROJECTED)


def test_models_d7_of_a_coca_the_decoder_of_captions_is_left_behind() -> None:
    model = build("CoCa")
    copied = TextTower(model).state_dict()
    assert set(copied) == {
        f"text.{name}" for name in model.state_dict() if not name.startswith(("visual.", "text_dec"))
    }
    assert any("text_decoder" in name for name in model.state_dict())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_reach_every_learned_thing(family: str, bits: int) -> None:
    texts, exact = tokens(family), build(family).encode_text(tokens(family)).detach()
    lsq = partial(LSQ, bits)
    tower = quantized(family, partial(lsq, per_channel=True), lsq)
    calibrate(tower, [texts])
    tower.train()
    # Scale and bias belong to the logits, which are no part of a tower.
    learned = {name: part for name, part in tower.named_parameters() if not name.startswith("text.logit_")}
    assert sum("quantizer" in name for name in learned) == 2 * len(quant_layers(tower))
    optimizer = torch.optim.Adam(learned.values(), lr=1e-3)
    for _ in range(2):
        before = {name: part.detach().clone() for name, part in learned.items()}
        optimizer.zero_grad()
        loss = (1 - torch.cosine_similarity(tower(texts), exact)).mean()
        loss.backward()
        for name, part in learned.items():
            assert part.grad is not None, name
            assert part.grad.isfinite().all(), name
            assert part.grad.any(), name
        optimizer.step()
        assert not any(torch.equal(part, before[name]) for name, part in learned.items())


@pytest.mark.parametrize("sensitivity", ["measured", "gradient"])
@pytest.mark.parametrize("family", ["CLIP", "SigLIP", "CoCa"])
def test_bits_are_planned_on_captions(family: str, sensitivity: str) -> None:
    model, texts = build(family), tokens(family)
    final_proj = family in PROJECTED

    def make(rules: dict[str, object], **_: object) -> nn.Module:
        tower = TextTower(model)
        quantize(tower, partial(MinMax, 8), None, rules, final_proj=final_proj)  # type: ignore[arg-type]
        return tower

    rules = MixedPrecision(4, sensitivity=sensitivity)(make, {}, lambda: iter([texts]))
    layers = quant_layers(make(rules))
    assert set(rules) == set(layers)
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    bits = {name: layer.weight_quantizer.bits for name, layer in layers.items()}  # type: ignore[union-attr]
    assert len(set(bits.values())) > 1
    assert sum(sizes[name] * bits[name] for name in sizes) <= 4 * sum(sizes.values())


@pytest.mark.parametrize("family", ["CLIP", "SigLIP", "CoCa"])
@torch.no_grad()
def test_a_trained_text_tower_is_merged(family: str) -> None:
    texts = tokens(family)
    tower = quantized(family, partial(LRQAT, 4, rank=2))
    calibrate(tower, [texts])
    tower.eval()
    untrained = tower(texts)
    for name, part in tower.named_parameters():
        if "weight_quantizer" in name:
            part.add_(0.1 * torch.randn(part.shape, generator=torch.Generator().manual_seed(2)))
    trained = tower(texts)
    assert not torch.allclose(trained, untrained)
    assert torch.equal(merge(tower)(texts), trained)
    assert not any(isinstance(layer.weight_quantizer, LRQAT) for layer in quant_layers(tower).values())
