"""Counted products against formulas and torch's own counter of FLOPs, and what a run says of what it leaves out."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qatlab.core.errors import UserError
from qatlab.quant import LoRA, MinMax, quant_layers, quantize
from qatlab.quant.inspect.coverage import Coverage, coverage, covered_share, statement
from qatlab.quant.layers.walk import full_precision

EIGHT = partial(MinMax, 8)
# Of the tower in conftest.py: tokens, width, depth, and the products of its parts.
TOKENS, WIDTH, DEPTH = 5, 32, 2
CONV, PROJ = 4 * 3 * 8 * 8 * WIDTH, WIDTH * 24
ATTENTION_LAYERS, MLP_LAYERS = 4 * WIDTH**2 * TOKENS, 8 * WIDTH**2 * TOKENS
BLOCKS = DEPTH * (ATTENTION_LAYERS + MLP_LAYERS)
TOTAL = CONV + BLOCKS + PROJ
QK_AND_PV = DEPTH * 2 * TOKENS**2 * WIDTH


def sample(size: int = 16) -> Tensor:
    return torch.zeros(1, 3, size, size)


def of(model: nn.Module, rules: dict[str, Any] | None = None, judged: str = "weight", size: int = 16) -> Coverage:
    return coverage(model, sample(size), rules or {}, judged)


def macs(found: Coverage) -> dict[str, int]:
    return {product.layer: product.macs for product in found.products}


@pytest.mark.parametrize(("patch_conv", "final_proj"), [(False, False), (True, False), (False, True), (True, True)])
def test_models_d1_the_products_of_a_vit_are_those_of_the_formulas(
    build_visual: Callable[..., nn.Module], patch_conv: bool, final_proj: bool
) -> None:
    model = quantize(build_visual(), EIGHT, EIGHT, patch_conv=patch_conv, final_proj=final_proj)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found, full = of(model), of(build_visual())
    assert ([*macs(full).values()], full.attention) == ([*macs(found).values()], found.attention)
    assert full.shares["weight_share"] == 0
    rounded = BLOCKS + CONV * patch_conv + PROJ * final_proj
    assert sum(macs(found).values()) == TOTAL
    assert found.shares == {
        **dict.fromkeys(("weight_share", "act_share", "product_share"), rounded / TOTAL),
        "skipped_share": 0,
        "attention_share": QK_AND_PV / (TOTAL + QK_AND_PV),
    }
    left = {name for name, covered in (("conv1", patch_conv), ("proj", final_proj)) if not covered}
    assert {product.layer for product in found.uncovered} == left
    # counted, and nothing else: no hook, no scale, no mode is left changed
    assert all(
        not layer._forward_hooks and layer.weight_quantizer is not None for layer in quant_layers(model).values()
    )
    assert all(torch.equal(tensor, before[name]) or tensor.isnan().any() for name, tensor in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


def resnet() -> nn.Module:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).visual


# the size of the image, fewer pixels than the families are used with
FAMILIES = {
    "fastvit_mci0": 64,  # MobileCLIP
    "vitamin_small_224": 64,
    "convnext_tiny": 64,
    "eva02_tiny_patch14_224": 56,
    "eva_giant_patch14_224": 56,  # a packed projection whose biases stand apart
    "test_vit": 160,
    "resnet": 64,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_models_d1_all_products_of_other_families_are_rounded_but_those_of_the_first_and_last_layers(name: str) -> None:
    size = FAMILIES[name]
    options = {"img_size": size, "depth": 2} if "eva" in name else {"img_size": size} if "vitamin" in name else {}
    model = (resnet() if name == "resnet" else timm.create_model(name, num_classes=32, **options)).eval()
    quantize(model, EIGHT, EIGHT)
    # The witness, in full precision: torch's counter, and the convolutions that read the image.
    first = 0

    def count(layer: nn.Module, _: tuple[Tensor], output: Tensor) -> None:
        nonlocal first
        first += output.numel() * layer.weight[0].numel()

    reading = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels == 3]
    handles = [layer.register_forward_hook(count) for layer in reading]
    with full_precision(model), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as peer:
        model(sample(size))
    for handle in handles:
        handle.remove()
    found = coverage(model, sample(size), {})
    total, last = sum(macs(found).values()), macs(found).get("attnpool.c_proj", 0)
    assert 2 * (total + found.attention) == peer.get_total_flops()
    assert found.shares["product_share"] == pytest.approx(1 - (first + last) / total, abs=1e-9)
    assert first > 0
    every = quantize(resnet().eval(), EIGHT, EIGHT, patch_conv=True, final_proj=True) if name == "resnet" else None
    assert every is None or of(every, size=64).shares["product_share"] == 1


class Own(nn.Conv2d):
    """A convolution that could compute anything: it is left as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_models_d1_less_than_half_is_refused_unless_it_is_asked_for_and_less_than_nine_tenths_is_told() -> None:
    model = resnet().eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.__class__ = Own
    found = of(quantize(model, EIGHT, EIGHT), size=64)
    with pytest.raises(UserError) as error:
        found.require(partial=False)
    largest = max(found.uncovered, key=lambda product: product.macs)
    assert re.search(r"the weight in 1\d\.\d % of the products with a weight, less than 50 %", str(error.value))
    assert f"{largest.layer} ({100 * largest.macs / sum(macs(found).values()):.1f} %)" in str(error.value)
    assert "quant.partial=true" in str(error.value)
    found.require(partial=True)
    assert re.match(r"warning: 8\d\.\d % of the products with a weight stay in full precision: layer", found.told()[0])


@pytest.mark.parametrize(
    ("share", "warned", "refused"), [(90, False, False), (89, True, False), (50, True, False), (49, True, True)]
)
def test_models_d1_the_limits(share: int, warned: bool, refused: bool) -> None:
    model = nn.Sequential(nn.Linear(share, 10), nn.Unflatten(1, (10, 1)), nn.Conv1d(10, 100 - share, 1))
    found = coverage(quantize(model, EIGHT, EIGHT), torch.zeros(1, share), {})
    assert found.shares["weight_share"] == share / 100
    assert bool(found.told()) == warned
    if refused:
        with pytest.raises(UserError, match=r"quant\.partial=true"):
            found.require(partial=False)
    else:
        found.require(partial=False)


def test_models_d1_what_the_rules_skip_is_counted_and_named_and_neither_warned_of_nor_refused(
    build_visual: Callable[..., nn.Module],
) -> None:
    # The attention of the first block stays an nn.MultiheadAttention, which holds in_proj as a bare Parameter.
    rules: dict[str, Any] = {
        "transformer.resblocks.0.*": None,
        "transformer.resblocks.1.mlp.c_fc": {"weight": None},
        "transformer.resblocks.1.mlp.c_proj": {"act": None},
    }
    found = of(quantize(build_visual(), EIGHT, EIGHT, rules), rules)
    skipped = BLOCKS // DEPTH + MLP_LAYERS // 2
    assert macs(found) == macs(of(quantize(build_visual(), EIGHT, EIGHT)))
    assert found.shares == {
        "weight_share": (BLOCKS - skipped) / TOTAL,
        "act_share": (BLOCKS // DEPTH - MLP_LAYERS // 2) / TOTAL,
        "product_share": ATTENTION_LAYERS / TOTAL,
        "skipped_share": skipped / TOTAL,
        "attention_share": QK_AND_PV / (TOTAL + QK_AND_PV),
    }
    assert found.shares["weight_share"] < 0.5
    found.require(partial=False)
    share = f"{100 * skipped / TOTAL:.1f} %"
    rule, *more = found.told()
    names = ", ".join(list(rules)[:2])
    assert rule == f"quant.rules leave out 5 layers, {share} of the products with a weight: {names}"
    assert f"{share} are left out by quant.rules" in statement(found.shares)
    # the patch convolution and the projection are in no rule: what is warned of is what would be without rules
    assert bool(more) == (BLOCKS / TOTAL < 0.9)
    assert covered_share(found.shares, "weight") == pytest.approx(BLOCKS / TOTAL)


def test_where_no_weight_is_rounded_the_activations_count(build_visual: Callable[..., nn.Module]) -> None:
    rules: dict[str, Any] = {"*.c_fc": {"act": None}, "*.attn.*": {"weight": None}}
    found = of(quantize(build_visual(), None, EIGHT, rules), rules, judged="act")
    skipped = DEPTH * MLP_LAYERS // 2
    assert [found.shares[f"{name}_share"] for name in ("weight", "product")] == [0, 0]
    assert found.shares["act_share"] == (BLOCKS - skipped) / TOTAL
    assert found.shares["skipped_share"] == skipped / TOTAL
    found.require(partial=False)
    assert (
        f"{100 * (BLOCKS - skipped) / TOTAL:.1f} % of the products with a weight have the activation rounded, 0.0 %"
        in (statement(found.shares))
    )


def test_the_products_of_adapters_are_in_full_precision(build_visual: Callable[..., nn.Module]) -> None:
    found = of(quantize(build_visual(), EIGHT, EIGHT, adapter=partial(LoRA, rank=4)))
    low_rank = DEPTH * TOKENS * 4 * sum(n + m for n, m in [(32, 96), (32, 32), (32, 128), (128, 32)])
    assert sum(macs(found).values()) == TOTAL + low_rank
    assert found.shares["weight_share"] == BLOCKS / (TOTAL + low_rank)


class Odd(nn.Module):
    """A weight made of parts, a layer whose weight its owner reads, a learned query, a weight of two layers, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(16, 8))
        self.read, self.query, self.once = nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.twice = nn.Linear(8, 8, bias=False)
        self.twice.weight = self.once.weight
        self.latent = nn.Parameter(torch.zeros(1, 1, 8))
        self.hadamard = [torch.ones(8, 8)]

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, torch.cat([self.q, self.kv]))[..., :8]  # 3 tokens x 8 x 24
        x = self.twice(self.once(x @ self.hadamard[0]))  # 2 x 3 x 64
        query = self.query(self.latent.expand(len(x), -1, -1))  # 64
        x = (query @ x.mT) @ x  # 2 x 24, of activations
        return x @ self.read.weight.T  # 32


def test_products_are_found_wherever_their_weight_is_read() -> None:
    found = coverage(quantize(Odd(), EIGHT, EIGHT), torch.zeros(1, 3, 8), {})
    products = {p.layer: (p.macs, p.weight) for p in found.products}
    assert products == {
        "q": (3 * 8 * 24, False),
        "once": (3 * 64, True),
        "twice": (3 * 64, True),
        "query": (64, True),
        "read": (32, False),
    }
    assert found.attention == 2 * 24
