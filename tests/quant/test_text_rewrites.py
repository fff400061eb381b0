"""The rewrites of text towers: exact before rounding, calibrated on captions, and worth something after rounding."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from texts import FAMILIES, LAYERS, PROJECTED, apart, build, tokens
from torch import Tensor, nn

from qatlab.models.text_tower import TextTower
from qatlab.quant import MinMax, RandomHadamard, Rotation, SmoothQuant, calibrate, quant_layers, quantize, verify
from qatlab.quant.inspect.hooks import on_inputs
from qatlab.quant.layers.walk import full_precision
from qatlab.towers.edges import ChannelScale

WEIGHT, ACT = partial(MinMax, 8, per_channel=True), partial(MinMax, 8)
BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}
REWRITES: dict[str, Any] = {
    "smoothquant": SmoothQuant,
    "smoothquant, searched": partial(SmoothQuant, "search", WEIGHT, ACT),
    "rotation": Rotation,
    "rotation inside the blocks": partial(Rotation, residual=False),
}


def rewritten(model: nn.Module, rewrite: Any, texts: Tensor) -> TextTower:
    tower = rewrite()(TextTower(model), texts.split(3))
    assert isinstance(tower, TextTower)
    return tower


def quantized(tower: TextTower, texts: Tensor, family: str) -> TextTower:
    quantize(tower, WEIGHT, ACT, final_proj=family in PROJECTED)
    calibrate(tower, [texts])
    return tower.eval()


def spread(tower: TextTower, texts: Tensor) -> dict[str, float]:
    """absmax/std of what each quantized layer reads."""
    found: dict[str, float] = {}

    def look(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[name] = float(inputs[0].abs().max() / inputs[0].std())

    with torch.no_grad(), full_precision(tower), on_inputs(quant_layers(tower), look):
        tower(texts)
    return found


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_rewritten_text_tower_computes_what_it_did(family: str, rewrite: str, dtype: torch.dtype) -> None:
    model, texts = build(family).to(dtype), tokens(family)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    tower = rewritten(model, REWRITES[rewrite], texts)
    assert apart(tower(texts), model.encode_text(texts)) < BOUND[dtype]
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    after = tower.state_dict()
    read = [name for name in before if "resblocks" in name and name.endswith(("out_proj.weight", "c_proj.weight"))]
    of_text = [name for name in read if not name.startswith(("visual.", "text_decoder."))]
    assert len(of_text) == 2 * LAYERS
    assert not any(torch.equal(before[name], after[f"text.{name}"]) for name in of_text)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_smoothquant_of_captions_takes_the_outliers_out(family: str) -> None:
    model, texts = build(family), tokens(family, 16)
    plain = quantized(TextTower(model), texts, family)
    smooth = quantized(rewritten(model, SmoothQuant, texts), texts, family)
    before, after = spread(plain, texts), spread(smooth, texts)
    # the channels that are outliers come out of the norms that in_proj and c_fc read
    normed = [name for name in before if name.endswith(("in_proj", "c_fc"))]
    assert len(normed) == 2 * LAYERS
    assert all(before[name] > after[name] for name in normed)
    assert sum(before[name] > 5 for name in normed) > 0
    exact = model.encode_text(texts)
    errors = [float((tower(texts) - exact).norm(dim=1).median()) for tower in (smooth, plain)]
    assert errors[0] < errors[1]
    verify(smooth, texts)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_smoothquants_factors_are_those_of_its_paper(family: str) -> None:
    """Equation 4 on what each layer reads of all captions, written out with hooks of its own on a calling tower."""
    model, texts = build(family).double(), tokens(family)
    tower = TextTower(model)
    transformer: Any = tower.text.text.transformer if hasattr(tower.text, "text") else tower.text.transformer
    seen: list[Tensor] = []
    first = transformer.resblocks[0]
    first.ln_1.register_forward_hook(lambda *call: seen.append(call[2]))
    tower(texts)
    weight, gain = first.attn.in_proj_weight.clone(), first.ln_1.weight.clone()
    s = seen[0].flatten(0, 1).abs().amax(0) ** 0.5 / weight.abs().amax(0) ** 0.5
    smooth: Any = rewritten(model, SmoothQuant, texts).text
    block = (smooth.text if hasattr(smooth, "text") else smooth).transformer.resblocks[0]
    torch.testing.assert_close(block.attn.in_proj_weight, _values_scaled(weight * s, block, weight))
    torch.testing.assert_close(block.ln_1.weight, gain / s)


def _values_scaled(expected: Tensor, block: nn.Module, weight: Tensor) -> Tensor:
    """``expected`` with the rows of the values divided as the layer behind the heads took it: read off the rewritten bias."""
    found: Any = block.get_submodule("attn")
    width = weight.shape[1]
    rows = found.in_proj_weight[2 * width :] / expected[2 * width :]
    # one factor for each row, whatever the column
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))
    return torch.cat([expected[: 2 * width], expected[2 * width :] * rows[:, :1]])


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("family", ["CLIP", "SigLIP2", "CoCa"])
@torch.no_grad()
def test_a_rewritten_and_quantized_text_tower_is_read_back(family: str, rewrite: str) -> None:
    model, texts = build(family), tokens(family)
    stored = quantized(rewritten(model, REWRITES[rewrite], texts), texts, family)
    empty = quantize(REWRITES[rewrite]().prepare(TextTower(model)), WEIGHT, ACT, final_proj=True)
    empty.load_state_dict(stored.state_dict())
    assert torch.equal(empty.eval()(texts), stored(texts))


def test_what_a_rewrite_adds_is_a_multiplication_before_every_c_proj() -> None:
    added = rewritten(build("CLIP"), SmoothQuant, tokens("CLIP")).modules()
    assert sum(isinstance(module, ChannelScale) for module in added) == LAYERS


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_rotation_begins_in_the_tables_and_costs_no_transform_there(family: str) -> None:
    model, texts = build(family).double(), tokens(family)
    added = [module for module in rewritten(model, Rotation, texts).modules() if isinstance(module, RandomHadamard)]
    # one before each c_proj, and one before the last norm
    assert len(added) == LAYERS + 1
    rotated = rewritten(model, Rotation, texts).state_dict()
    ends = ("token_embedding.weight", "positional_embedding", "cls_emb")
    tables = [name for name in rotated if name.endswith(ends)]
    assert len(tables) == (3 if family == "CoCa" else 2)
    for name in tables:
        pair = (model.state_dict()[name.removeprefix("text.")], rotated[name])
        before, after = (torch.atleast_2d(table) for table in pair)
        centred = before - before.mean(-1, keepdim=True)
        # a rotation keeps the lengths of rows and the angles between them
        torch.testing.assert_close(after @ after.T, centred @ centred.T)
        assert not torch.allclose(after, centred)
