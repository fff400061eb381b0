"""What the recipes promise: every bit-width of the table, what is trained and what stays, and bad input told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from brief import BRIEF
from embedded_images import embedded_images
from safetensors.torch import load_file
from torch import Tensor, nn

from qatlab.config import ModelConfig, compose
from qatlab.core.errors import UserError
from qatlab.models import clip as clips
from qatlab.models.quantized import fitted_copy, load_quantized
from qatlab.quant import LRQAT, MinMax, merge, quant_layers, verify
from qatlab.results.run import Run

Fit = Callable[..., Run]
WEIGHTS = Path(str(files("qatlab") / "assets" / "tiny.safetensors"))
TABLE = [(8, 8), (6, 8), (6, 6), (4, 8), (4, 6), (4, 4)]
BOTH = ["ptq", "smoothquant", "raana", "rotation", "light_qat_lsq", "lsq_plus", "lr_qat"]
ADAPTED = ["qat_lora", "qat_lora_lsq", "qat_lora_distill", "lr_qat"]


@pytest.fixture(scope="module")
def visual() -> nn.Module:
    return clips.load(ModelConfig()).visual


@pytest.fixture(scope="module")
def images() -> Tensor:
    return embedded_images(clips.load(ModelConfig()))


@torch.no_grad()
def cosine(visual: nn.Module, model: nn.Module, images: Tensor) -> float:
    """The least cosine of the features to the unquantized ones, float64."""
    features = (nn.functional.normalize(tower.eval()(images).double(), dim=-1) for tower in (visual, model))
    return float((next(features) * next(features)).sum(1).min())


# -- every bit-width -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", BOTH)
def test_every_bit_width_of_the_table_runs_and_is_verified(visual: nn.Module, images: Tensor, recipe: str) -> None:
    found, config = {}, compose(f"recipe={recipe}").quant
    for weight, act in TABLE:
        config.weight["bits"], config.act["bits"] = weight, act
        model, _ = fitted_copy(visual, config, lambda: images.split(4))
        rows = verify(model, images)
        assert len(rows) == 2 * 16
        assert {(row["tensor"], row["bits"]) for row in rows} == {("weight", weight), ("act", act)}
        found[weight, act] = cosine(visual, model, images)
    assert found[8, 8] > 0.995
    assert found[8, 8] > found[4, 8] > found[4, 4]
    assert found[8, 8] > found[6, 6] > found[4, 4]


@pytest.mark.parametrize(
    ("recipe", "options", "all_bits"),
    [
        ("weight_only", [], range(2, 9)),
        ("ptq", ["quant.act=null"], range(2, 9)),
        ("rotation", ["quant.act=null"], range(2, 9)),
        ("raana", ["quant.act=null"], range(1, 9)),
    ],
)
def test_weights_alone_at_every_number_of_bits(
    visual: nn.Module, images: Tensor, recipe: str, options: list[str], all_bits: range
) -> None:
    found, config = [], compose(f"recipe={recipe}", *options).quant
    for bits in all_bits:
        config.weight["bits"] = bits
        model, _ = fitted_copy(visual, config, lambda: images.split(4))
        rows = verify(model, images)
        assert len(rows) == 16
        assert {(row["tensor"], row["bits"]) for row in rows} == {("weight", bits)}
        found.append(cosine(visual, model, images))
    assert found == sorted(found)
    assert found[-1] > 0.999


# -- adapters: what is trained, what stays ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(small_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """``trained(recipe)``: two steps at a rate that moves integers."""
    done: dict[str, Run] = {}

    def get(recipe: str) -> Run:
        if recipe not in done:
            unscored = [f"callbacks.{name}=null" for name in ("calibration", "ood", "predictions", "temperature")]
            options = [
                "fit.lr=0.1",
                "optim.scale_lr=0.1",
                "optim.weight_decay=0.1",
                "fit.eval_every=0",
                *BRIEF,
                *unscored,
            ]
            done[recipe] = small_fit(recipe, tmp_path_factory.mktemp(recipe), *options)
        return done[recipe]

    return get


def of_checkpoint(name: str) -> str:
    """The name in the checkpoint of a quantized model's tensor."""
    return f"visual.{name.replace('in_proj.', 'in_proj_')}"


@pytest.mark.parametrize("recipe", ADAPTED)
def test_only_adapters_and_scales_are_trained(trained: Callable[[str], Run], recipe: str) -> None:
    folder = trained(recipe).folder
    start = load_file(WEIGHTS)
    before, after = (load_file(folder / f"{name}.safetensors") for name in ("quantized", "model"))
    assert set(before) == set(after)
    base = {name for name in after if "quantizer" not in name and "adapter" not in name}
    assert {of_checkpoint(name) for name in base} == {name for name in start if name.startswith("visual.")}
    for name in base:
        assert torch.equal(after[name], start[of_checkpoint(name)])
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    learned = {name for name, parameter in load_quantized(folder).named_parameters() if name not in base}
    assert moved == learned
    assert sum(name.endswith(".up") for name in moved) == 16
    assert any("act_quantizer" in name for name in moved) == (recipe != "qat_lora")
    assert any("weight_quantizer" in name for name in moved) == (recipe == "lr_qat")


@torch.no_grad()
def test_trained_low_rank_weights_merge_into_integers_bit_for_bit(
    trained: Callable[[str], Run], visual: nn.Module, images: Tensor
) -> None:
    folder = trained("lr_qat").folder
    unmerged, untrained = load_quantized(folder), load_quantized(folder / "quantized.safetensors")
    codes = {name: layer.weight_quantizer.codes(layer.weight) for name, layer in quant_layers(unmerged).items()}  # type: ignore[union-attr]
    for name, layer in quant_layers(untrained).items():
        assert not torch.equal(layer.weight_quantizer.codes(layer.weight), codes[name])  # type: ignore[union-attr]
    expected = unmerged(images)
    merged = merge(copy.deepcopy(unmerged))
    assert torch.equal(merged(images), expected)
    layers = quant_layers(merged)
    assert all(type(layer.weight_quantizer) is MinMax for layer in layers.values())
    assert not any(isinstance(module, LRQAT) for module in merged.modules())
    for name, layer in layers.items():
        assert torch.equal(layer.weight_quantizer.codes(layer.weight), codes[name])  # type: ignore[union-attr]
    verify(merged, images)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("ptq", r"NaN.*transformer\.resblocks\.0\.attn\.in_proj|transformer\.resblocks\.0\.attn\.in_proj.*NaN"),
        ("light_qat_lsq", r"transformer\.resblocks\.0\.attn\.in_proj"),
        ("lsq_plus", r"transformer\.resblocks\.0\.attn\.in_proj"),
        ("raana", r"transformer\.resblocks\.0\.attn\.in_proj"),
        ("rotation", r"transformer\.resblocks\.0\.attn\.in_proj"),
        ("smoothquant", r"transformer\.resblocks\.0\.attn\.in_proj"),
        ("qat_lora", r"transformer\.resblocks\.0\.attn\.in_proj"),
        ("mixed_precision", r"finite|NaN"),
        ("vit_literature", r"NaN"),
    ],
)
def test_a_calibration_image_that_is_not_a_number(visual: nn.Module, images: Tensor, recipe: str, message: str) -> None:
    broken = images.clone()
    broken[5, 0, 3, 3] = float("nan")
    with pytest.raises(UserError, match=message) as told:
        fitted_copy(visual, compose(f"recipe={recipe}").quant, lambda: broken.split(4))
    assert "\n" not in str(told.value)


def test_weights_alone_do_not_look_at_a_broken_image(visual: nn.Module, images: Tensor) -> None:
    broken = images * float("nan")
    model, _ = fitted_copy(visual, compose("recipe=weight_only").quant, lambda: [broken])
    assert cosine(visual, model, images) > 0.9


@pytest.mark.parametrize(
    "recipe", ["ptq", "smoothquant", "rotation", "raana", "light_qat_lsq", "mixed_precision", "vit_literature"]
)
def test_no_calibration_images(visual: nn.Module, recipe: str) -> None:
    quant = compose(f"recipe={recipe}").quant
    for batches in ([], [torch.empty(0, 3, 64, 64)]):
        with pytest.raises(UserError, match="image") as told:
            fitted_copy(visual, quant, lambda batches=batches: batches)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("recipe", ["weight_only", "rotation"])
def test_a_run_without_calibration_images(small_fit: Fit, tmp_path: Path, recipe: str) -> None:
    with pytest.raises(UserError, match=r"quant\.calibration_images=0: it takes a whole number from 1 on"):
        small_fit(recipe, tmp_path, "quant.calibration_images=0")


@pytest.mark.parametrize(
    "recipe", ["ptq", "smoothquant", "rotation", "raana", "light_qat_lsq", "weight_only", "vit_literature"]
)
def test_an_all_zero_weight_row_and_a_constant_image_give_numbers(
    visual: nn.Module, images: Tensor, recipe: str
) -> None:
    model: Any = copy.deepcopy(visual)
    model.transformer.resblocks[1].mlp.c_fc.weight.data[3] = 0
    model.transformer.resblocks[1].mlp.c_fc.bias.data[3] = 0
    flat = torch.zeros_like(images[:2])
    quantized, _ = fitted_copy(model, compose(f"recipe={recipe}").quant, lambda: [flat])
    assert quantized.eval()(images).isfinite().all()
    verify(quantized, images)


def test_calibration_images_are_drawn_by_their_seed(small_fit: Fit, tmp_path: Path) -> None:
    def scales(folder: str, *overrides: str) -> list[float]:
        done = small_fit(
            "ptq", tmp_path / folder, *BRIEF, *(f"callbacks.{name}=null" for name in ("ood", "temperature")), *overrides
        )
        return pl.read_csv(done.folder / "layers.csv")["act_scale"].to_list()

    first, drawn = scales("first"), scales("drawn", "quant.calibration_seed=1")
    assert drawn == scales("again", "quant.calibration_seed=1")
    assert drawn != first
    assert drawn != scales("other", "quant.calibration_seed=2")
