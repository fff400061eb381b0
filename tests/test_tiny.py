"""The embedded CLIP is a useful miniature: good, not perfect, and hurt by the things that hurt real models.

Its thresholds hold on three seeds of the world: other images than it was trained on, the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from qatlab.config import Config, compose, recipe_files
from qatlab.fit import fit

SEEDS = (0, 1, 2)
IMAGES = 256
SETS = OmegaConf.load(recipe_files("suite")["embedded"]).sets
FEW_SETS = [f"~suite.sets.{name}" for name in SETS if name not in ("id", "calibration")]
# 100 steps of 100 images, distilled from the unquantized encoder on the batch's captions
QAT = [
    *("objective.contrastive=0", "objective.kl=1", "fit.unique_samples=2000"),
    *("fit.lr=1e-4", "fit.schedule=cosine", "fit.warmup=10", "optim.scale_lr=5e-3"),
]
Metrics = dict[tuple[int, str, str, str], dict[str, float]]


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Metrics]:
    """``metrics(recipe, *overrides)``: {(seed, stage, dataset, score): metrics}, computed once."""
    output, known = tmp_path_factory.mktemp("tiny"), {}

    def options(recipe: str, seed: int, overrides: tuple[str, ...]) -> Config:
        here = ["trainer.accelerator=cpu", "fit.workers=0", "fit.eval_every=0", "wandb.mode=disabled"]
        what = [
            f"suite.seed={seed}",
            f"suite.images={IMAGES}",
            f"output={output}",
            "callbacks.temperature=null",
            "suite.resamples=0",
        ]
        return compose(f"recipe={recipe}", *here, *what, *overrides)

    def run(recipe: str, *overrides: str) -> Metrics:
        if (recipe, overrides) not in known:
            found: Metrics = {}
            for seed in SEEDS:  # the same run, trained once and scored on three worlds
                rows: list[dict[str, Any]] = fit(options(recipe, seed, overrides), recipe).rows()
                for row in rows:
                    key = row["config"]["suite.seed"], row["stage"], row["dataset"], row["score"]
                    found[key] = row["metrics"]
            known[recipe, overrides] = found
        return known[recipe, overrides]

    return run


@pytest.fixture
def unquantized(metrics: Callable[..., Metrics]) -> Metrics:
    return metrics("fp32")


def top1(found: Metrics, stage: str, dataset: str = "id") -> float:
    """The accuracy in % over the images of all seeds."""
    return 100 * float(np.mean([found[seed, stage, dataset, "zero_shot"]["top1"] for seed in SEEDS]))


def quantized(metrics: Callable[..., Metrics], bits: int) -> float:
    """The points of accuracy that absmax quantization of weights and activations costs."""
    found = metrics("ptq", f"quant.weight.bits={bits}", f"quant.act.bits={bits}", *FEW_SETS)
    return top1(found, "fp32") - top1(found, "quantized")


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_good_but_not_perfect(unquantized: Metrics, seed: int) -> None:
    row = unquantized[seed, "fp32", "id", "zero_shot"]
    assert 0.80 <= row["top1"] <= 0.97
    assert 0.02 <= row["ece"] <= 0.15


@pytest.mark.parametrize("seed", SEEDS)
def test_shapes_it_does_not_know_are_harder_to_tell_than_no_shapes(unquantized: Metrics, seed: int) -> None:
    near, far = (unquantized[seed, "fp32", name, "max_logit"]["auroc"] for name in ("near_ood", "far_ood"))
    assert 0.75 <= near <= 0.95
    assert 0.85 <= far <= 0.99
    assert near < far


def test_so_they_are_by_its_confidence(unquantized: Metrics) -> None:
    """Over all seeds: its bounds are closer than the error of one seed's few images (about 0.017)."""
    near, far = (
        np.mean([unquantized[seed, "fp32", name, "msp"]["auroc"] for seed in SEEDS]) for name in ("near_ood", "far_ood")
    )
    assert 0.75 <= near <= 0.95
    assert 0.85 <= far <= 0.99
    assert near < far


def test_three_shifts_hurt_it(unquantized: Metrics) -> None:
    shifts = ("noise", "fog", "gray", "outline", "blur")
    cost = {name: top1(unquantized, "fp32") - top1(unquantized, "fp32", name) for name in shifts}
    assert len([name for name, points in cost.items() if 3 <= points <= 45]) >= 3, cost


def test_an_unusual_background_hurts_it(unquantized: Metrics) -> None:
    assert top1(unquantized, "fp32", "usual") - top1(unquantized, "fp32", "unusual") >= 5


def test_eight_bits_are_nearly_free(metrics: Callable[..., Metrics]) -> None:
    assert quantized(metrics, 8) < 3


def test_four_bits_are_not(metrics: Callable[..., Metrics]) -> None:
    assert quantized(metrics, 4) >= 5


def test_three_bits_are_ruinous(metrics: Callable[..., Metrics]) -> None:
    assert quantized(metrics, 3) >= 20


@pytest.mark.slow
def test_training_recovers_half_of_what_four_bits_cost(metrics: Callable[..., Metrics]) -> None:
    found = metrics("light_qat_lsq_pc", "quant.weight.bits=4", "quant.act.bits=4", *QAT, *FEW_SETS)
    full, start, trained = (top1(found, stage) for stage in ("fp32", "quantized", "adapted"))
    assert full - start >= 5
    assert trained - start >= (full - start) / 2


def test_the_file_is_small() -> None:
    import qatlab

    assert (Path(qatlab.__file__).parent / "assets" / "tiny.safetensors").stat().st_size <= 6_000_000
