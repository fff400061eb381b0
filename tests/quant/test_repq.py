"""RepQ against the formulas of its paper in float64, on every family, and with the quantizers behind it."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_towers
import torch
from embedded_images import embedded_images
from torch import Tensor, nn

from qatlab.config import ModelConfig, compose
from qatlab.core.errors import UserError
from qatlab.models import clip as clips
from qatlab.models.quantized import check_quantizers, fitted_copy, load_quantized, save_quantized
from qatlab.models.text_tower import TextTower
from qatlab.quant import LSQ, MinMax, RepQ, calibrate, quant_layers, quantize
from qatlab.quant.inspect.hooks import on_outputs
from qatlab.quant.rewrites.repq import PERCENTILES, channel_ranges, factors_and_shifts

ACT = partial(MinMax, 6, symmetric=False, observer="mse")
# Towers with RMSNorms, norms behind their layers or behind another norm, and padded windows.
LEFT = ("timm vit, RMSNorm", "eva02-e", "vitamin", "swin")


def features(visual: nn.Module, images: Tensor) -> Tensor:
    output = visual(images)
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in tiny_towers.TRANSFORMERS if name not in LEFT])
@torch.no_grad()
def test_it_is_exact(name: str, dtype: torch.dtype) -> None:
    visual, images = tiny_towers.tower(name).to(dtype), tiny_towers.images(name).to(dtype)
    rewritten = copy.deepcopy(visual)
    assert RepQ(ACT)(rewritten, images.split(2)) is rewritten
    other = images.flip(0) * 1.5
    before, after = features(visual, other).flatten(1), features(rewritten, other).flatten(1)
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    assert float(((after - before).norm(dim=1) / before.norm(dim=1)).max()) < bound
    # The state loads into what is prepared without data.
    prepared = RepQ(ACT).prepare(copy.deepcopy(visual))
    prepared.load_state_dict(rewritten.state_dict())
    assert torch.equal(features(prepared, other), features(rewritten, other))


@pytest.mark.parametrize("name", LEFT)
def test_what_would_not_be_exact_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="RepQ cannot rewrite"):
        RepQ(ACT)(tiny_towers.tower(name), [tiny_towers.images(name)])


def by_paper(rows: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """(r, c) of RepQ-ViT, channel by channel."""
    scales, zeros, lows = [], [], []
    for column in rows.T:
        tried = []
        for percentile in PERCENTILES:
            low, high = np.quantile(column, [1 - percentile, percentile])
            scale = (high - low) / levels
            zero = np.round(-low / scale)
            code = np.clip(np.round(column / scale) + zero, 0, levels)
            tried.append((((code - zero) * scale - column) ** 2).sum())
        best = PERCENTILES[int(np.argmin(tried))]
        low, high = np.quantile(column, [1 - best, best])
        scales.append((high - low) / levels)
        zeros.append(np.round(-low / scales[-1]))
        lows.append(low)
    scale, zero, low = np.array(scales), np.array(zeros), np.array(lows)
    ratio = scale / scale.mean()
    least = -np.round(zero.mean()) * scale.mean()
    return ratio, low / ratio - least


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [50, 5000])
def test_factors_and_shifts_are_those_of_the_paper(bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, 10, generator=generator, dtype=torch.float64) ** 3
    rows = rows * torch.arange(1, 11) + torch.randn(10, generator=generator)
    ratio, shift = factors_and_shifts(*channel_ranges(rows, 2**bits - 1), 2**bits - 1)
    right = by_paper(rows.numpy(), 2**bits - 1)
    np.testing.assert_allclose(ratio.numpy(), right[0], rtol=1e-9)
    np.testing.assert_allclose(shift.numpy(), right[1], rtol=1e-9, atol=1e-9)


def test_a_channel_without_a_range_keeps_finite_weights() -> None:
    rows = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    rows[:, 1] = 0.25
    ratio, shift = factors_and_shifts(*channel_ranges(rows, 63), 63)
    assert bool(ratio.isfinite().all())
    assert bool(shift.isfinite().all())
    assert float(ratio.min()) > 0


@torch.no_grad()
def outlying(name: str = "clip") -> tuple[nn.Module, Tensor]:
    """A tower whose first norm has channels of very different ranges, away from 0."""
    visual, images = tiny_towers.tower(name), tiny_towers.images(name)
    norm = visual.transformer.resblocks[0].ln_1
    width = len(norm.weight)
    norm.weight.copy_(torch.logspace(-1, 1, width))
    norm.bias.copy_(torch.randn(width, generator=torch.Generator().manual_seed(3)) * norm.weight)
    return visual, images


@torch.no_grad()
def outputs_of(visual: nn.Module, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    norm = visual.transformer.resblocks[0].ln_1
    with on_outputs({"norm": norm}, lambda _name, _module, _inputs, output: seen.append(output)):
        visual(images)
    return seen[0]


def test_all_channels_have_the_range_of_the_grid_that_the_activations_fit() -> None:
    """The quantizer's own fit is near the mean scale and zero point, in its step and in its error."""
    visual, images = outlying()
    rows = outputs_of(visual, images).flatten(0, 1).double()
    low, high = channel_ranges(rows, 63)
    scale = float(((high - low) / 63).mean())
    zero = float((-low / ((high - low) / 63)).round().mean().round())
    rewritten = RepQ(ACT)(copy.deepcopy(visual), [images])
    outputs = outputs_of(rewritten, images)
    assert float((outputs.flatten(0, 1).amin(0) + zero * scale).abs().max()) < 2 * scale
    model = quantize(rewritten, None, ACT)
    calibrate(model, [images])
    quantizer: Any = quant_layers(model)["transformer.resblocks.0.attn.in_proj"].act_quantizer
    assert abs(float(quantizer.scale) / scale - 1) < 0.1
    right = (torch.clamp((outputs / scale).round() + zero, 0, 63) - zero) * scale
    # Of so few tokens the ends of every channel lie on the grid of the mean scale, which no other grid offers.
    assert float((quantizer(outputs) - outputs).square().sum()) < 1.2 * float((right - outputs).square().sum())


def test_a_grid_for_the_tensor_gives_what_one_for_each_channel_does() -> None:
    visual, images = outlying()

    def error(act: Any, rewrite: bool) -> float:
        """The mean squared error of what in_proj reads, relative to each channel's variance."""
        tower = RepQ(ACT)(copy.deepcopy(visual), [images]) if rewrite else copy.deepcopy(visual)
        outputs = outputs_of(tower, images)
        model = quantize(tower, None, act)
        calibrate(model, [images])
        quantizer: Any = quant_layers(model)["transformer.resblocks.0.attn.in_proj"].act_quantizer
        rounded = (quantizer(outputs) - outputs).flatten(0, 1)
        return float((rounded.square().mean(0) / outputs.flatten(0, 1).var(0)).mean())

    by_channel = error(partial(MinMax, 6, symmetric=False, per_channel=True), False)
    assert error(ACT, True) < 1.2 * by_channel
    assert error(ACT, False) > 10 * by_channel


@pytest.mark.parametrize(
    ("recipe", "options", "sentence"),
    [
        ("recipe=weight_only", [], "RepQ gives rounded activations one range, and quant/act is null"),
        ("recipe=ptq", [], r"give quant\.act\.symmetric=false"),
        ("recipe=ptq", ["quant/act=lsq"], r"give quant\.act\.symmetric=false"),
    ],
)
def test_activations_need_a_zero_point(recipe: str, options: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_quantizers(compose(recipe, "quant/rewrite=repq", *options).quant)


def test_images_are_needed_and_looked_at() -> None:
    visual, images = outlying()
    before = copy.deepcopy(visual.state_dict())
    with pytest.raises(UserError, match="RepQ got no images"):
        RepQ(ACT)(visual, [])
    with pytest.raises(UserError, match=r"layer transformer\.resblocks\.0\.attn\.in_proj: .* NaN"):
        RepQ(ACT)(visual, [images * float("nan")])
    assert all(torch.equal(before[name], tensor) for name, tensor in visual.state_dict().items())
    with pytest.raises(UserError, match="RepQ cannot rewrite"):
        RepQ(ACT)(quantize(visual, partial(LSQ, 8), None), [images])


@torch.no_grad()
def test_a_text_tower_is_rewritten_exactly() -> None:
    clip = clips.load(ModelConfig())
    assert clip.model is not None
    assert clip.tokenizer is not None
    texts = clip.tokenizer(["a photo of a circle", "a red star", "a small square", "a blue circle"])
    tower = TextTower(copy.deepcopy(clip.model))
    before = tower(texts)
    rewritten = RepQ(ACT)(TextTower(copy.deepcopy(clip.model)), texts.split(2))
    assert float(((rewritten(texts) - before).norm(dim=1) / before.norm(dim=1)).max()) < 1e-5


def test_what_a_run_leaves_gives_its_outputs_bit_for_bit(tmp_path: Path) -> None:
    config = compose("recipe=ptq", "quant/act=mse", "quant.act.symmetric=false", "quant/rewrite=repq").quant
    clip = clips.load(ModelConfig())
    seen = embedded_images(clip)
    model, config = fitted_copy(clip.visual, config, lambda: seen.split(4))
    save_quantized(model, tmp_path / "quantized.safetensors", ModelConfig(), config)
    with torch.no_grad():
        assert torch.equal(load_quantized(tmp_path)(seen), model.eval()(seen))
        assert float(torch.cosine_similarity(model(seen), clip.visual(seen)).min()) > 0.99
