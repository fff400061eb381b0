"""One global batch, one loss and one gradient: whole, in parts that fit into memory, and shared by two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from qatlab.config import compose
from qatlab.data.embedded.sets import CLASS_NAMES, EmbeddedSet
from qatlab.models import clip as clips
from qatlab.models.quantized import quantized_copy
from qatlab.quant import LSQ, calibrate
from qatlab.training.global_batch import in_batch_step, parts_of, summed_step
from qatlab.training.student import Student

IMAGES = 32
# What is minimised, and whether a batch's images are compared with each other's captions.
CASES = {
    "contrastive": ["objective.contrastive=1"],
    "kl": ["objective.contrastive=0", "objective.kl=1"],
    "distill": ["objective.contrastive=0.5", "objective.kl=0.5"],
    "feature_mse": ["objective.contrastive=0", "objective.feature_mse=1"],
    "from_scratch": [],
}


composed = cache(compose)


def options(case: str) -> list[str]:
    recipe = "pretrain_tiny" if case == "from_scratch" else "light_qat_lsq_pc"
    plain = ["trainer.precision=32-true", "fit.grad_clip=null", "fit.warmup=0", "fit.schedule=constant"]
    return [f"recipe={recipe}", "quant.weight.bits=4" if recipe != "pretrain_tiny" else "seed=0", *plain, *CASES[case]]


@cache
def the_batch() -> dict[str, Any]:
    shown = EmbeddedSet("id", IMAGES)
    images = torch.stack([shown[i][0] for i in range(IMAGES)])
    labels = torch.tensor([shown[i][1] for i in range(IMAGES)])
    captions = [f"a photo of a {CLASS_NAMES[label]}" for label in labels]  # several times the same one
    tokens = clips.load(composed("recipe=fp32").model).tokenizer(captions)
    return {"images": images, "caption_ids": labels.clone(), "tokens": tokens, "labels": labels}


def student(case: str) -> Student:
    config = deepcopy(composed(*options(case)))
    torch.manual_seed(0)
    clip = clips.load(config.model, config.fit.from_scratch)
    visual: Any = clip.visual
    if not config.fit.from_scratch:
        visual = quantized_copy(clip.visual, config.quant)
        calibrate(visual, [clip.preprocess.normalize(the_batch()["images"][:8])])
    module = Student(config, clip, visual)
    module.class_tokens = clip.tokenizer([f"a photo of a {name}" for name in CLASS_NAMES])  # type: ignore[misc]
    return module


class Watch(L.Callback):
    """Keeps the gradients and the terms of the first step."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if not self.found:
            named = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
            terms = {name: value.clone() for name, value in trainer.callback_metrics.items()}
            self.found = named | terms


def train(case: str, micro_batch: int, steps: int = 1, devices: int = 1) -> dict[str, Tensor]:
    """The gradients and terms of the first step, and the learned scales after the last."""
    torch.use_deterministic_algorithms(True)
    module, watch = student(case), Watch()
    module.config.fit.micro_batch, module.config.fit.steps = micro_batch, steps
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[watch], use_distributed_sampler=False,
    )  # fmt: skip
    rank, whole = int(os.environ.get("LOCAL_RANK", 0)), the_batch()
    mine = {name: value[rank::devices] for name, value in whole.items()}
    trainer.fit(module, DataLoader([mine] * steps, batch_size=None))  # type: ignore[arg-type]
    scales = {n: q.scale.detach().clone() for n, q in module.visual.named_modules() if isinstance(q, LSQ)}
    return {**watch.found, **{f"scale of {name}": scale for name, scale in scales.items()}}


@pytest.fixture(scope="module")
def whole() -> Callable[[str], dict[str, Tensor]]:
    done: dict[str, dict[str, Tensor]] = {}

    def get(case: str) -> dict[str, Tensor]:
        if case not in done:
            done[case] = train(case, IMAGES)
        return done[case]

    return get


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(name.endswith("log_step") for name in found) or "both_towers.logit_scale" in found
    gradients = [name for name in found if not name.startswith(("train/", "scale of"))]
    largest = max(float(expected[name].norm()) for name in gradients)
    for name in found:
        error, size = float((found[name] - expected[name]).norm()), float(expected[name].norm())
        # A vanishing gradient is the sum of large ones, and a loss of 0.01 nats that of terms of order 1.
        assert error <= 1e-6 * max(size, largest if name in gradients else 1.0), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch", [16, 5])
def test_parts_give_the_loss_and_the_gradient_of_the_whole(
    whole: Callable[[str], dict[str, Tensor]], case: str, micro_batch: int
) -> None:
    require_equal(train(case, micro_batch), whole(case))


SHARED = {"contrastive": 16, "distill": 4, "feature_mse": 16, "from_scratch": 8}  # micro-batches


@pytest.fixture(scope="module")
def two_processes(
    python: str, subprocess_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes that share the batch found, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    line = [python, __file__, str(folder)]
    done = subprocess.run(line, env=subprocess_environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", SHARED)
def test_two_processes_give_the_loss_and_the_gradient_of_one(
    two_processes: list[dict[str, dict[str, Tensor]]], whole: Callable[[str], dict[str, Tensor]], case: str
) -> None:
    first, second = (found[case] for found in two_processes)
    one_step = {name: value for name, value in first.items() if not name.startswith("scale of")}
    require_equal(one_step, {name: value for name, value in whole(case).items() if name in one_step})
    assert first.keys() == second.keys()
    for name in first:  # after three steps
        assert torch.equal(first[name], second[name]), name


def in_a_process(folder: str) -> None:
    found = {case: train(case, micro_batch, steps=3, devices=2) for case, micro_batch in SHARED.items()}
    torch.save(found, Path(folder) / f"{os.environ.get('LOCAL_RANK', 0)}.pt")


# -- the two ways by themselves, on a model of one number per feature ------------------------------------------------------


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [None, 6, 4, 1])
def test_in_batch_step_against_autograd(size: int | None) -> None:
    """A loss of all rows, of two features and of a shared tensor: value and gradients of plain autograd in float64."""
    images, texts, weight = rows(6, 0), rows(6, 1), rows(3, 2).requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def features(batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"student": (batch["images"] @ weight).tanh(), "captions": (batch["texts"] @ weight).sin()}

    def terms(all_rows: dict[str, Tensor], shared: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = shared["scale"].exp() * all_rows["student"] @ all_rows["captions"].T
        return {"loss": torch.nn.functional.cross_entropy(logits, torch.arange(6))}

    whole = {"images": images, "texts": texts}
    expected = terms(features(whole), {"scale": scale})["loss"]
    wanted = torch.autograd.grad(expected, [weight, scale])
    parts = parts_of(whole, size)
    calls = 0

    def encode(part: dict[str, Any], i: int) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return features(part)

    found, left = in_batch_step(parts, encode, {"scale": scale}, terms, lambda loss: loss.backward())
    left.backward()
    assert calls == (1 if len(parts) == 1 else 2 * len(parts))
    torch.testing.assert_close(found["loss"], expected.detach(), rtol=1e-12, atol=0)
    for tensor, gradient in zip((weight, scale), wanted, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [None, 6, 4, 1])
def test_summed_step_against_autograd(size: int | None) -> None:
    """A mean over images, in parts of unequal sizes too; one forward per part."""
    images, weight = rows(6, 0), rows(3, 2).requires_grad_()
    expected = (images @ weight).square().mean()
    (wanted,) = torch.autograd.grad(expected, [weight])
    parts = parts_of({"images": images, "skipped": {}}, size)
    calls = 0

    def terms(part: dict[str, Any], i: int) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        loss = (part["images"] @ weight).square().mean()
        return {"feature_mse": loss, "loss": loss}

    found, left = summed_step(parts, terms, lambda loss: loss.backward())
    left.backward()
    assert calls == len(parts)
    torch.testing.assert_close(found["loss"], expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-12, atol=1e-14)


if __name__ == "__main__":
    in_a_process(*sys.argv[1:])
