"""What training decides by looking at the machine: options first, then what a resumed run had, then memory and length."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from brief import BRIEF
from torch import nn

from qatlab.config import Config, ModelConfig
from qatlab.core.errors import UserError
from qatlab.data.embedded.sets import CLASS_NAMES, EmbeddedSet
from qatlab.models import clip as clips
from qatlab.models.quantized import quantized_copy
from qatlab.quant import calibrate
from qatlab.quant.quantizers import kernels
from qatlab.results.run import Run
from qatlab.training import machine as settling
from qatlab.training.machine import MachineChoice, choose
from qatlab.training.memory import SHARE, saved_bytes
from qatlab.training.student import Student

Options = Callable[..., Config]
PLENTY = 10**15
WIDTH, LAYERS, PATCHES = 192, 4, 16  # of the embedded model
WEIGHTS = LAYERS * 12 * WIDTH**2
ACTIVATIONS = LAYERS * (PATCHES + 1) * 7 * WIDTH


def images(count: int) -> torch.Tensor:
    return torch.stack([EmbeddedSet("id", 8)[i % 8][0] for i in range(count)])


@pytest.fixture
def student(small: Options) -> Callable[..., Student]:
    def build(*overrides: str, recipe: str = "light_qat_lsq_pc") -> Student:
        config = small(recipe, *overrides)
        clip = clips.load(ModelConfig(), from_scratch=config.fit.from_scratch)
        visual: nn.Module = clip.visual
        if not config.fit.from_scratch:
            visual = quantized_copy(clip.visual, config.quant)
            calibrate(visual, [clip.preprocess.normalize(images(8))])
        return Student(config, clip, visual)

    return build


def trainer(processes: int = 1, on_node: int = 1, rank: int = 0) -> Any:
    device = SimpleNamespace(
        root_device=torch.device("cpu"),
        reduce=lambda tensor, reduce_op: tensor,
        broadcast=lambda value: value,
    )
    return SimpleNamespace(strategy=device, world_size=processes, num_devices=on_node, is_global_zero=rank == 0)


def chosen_for(module: Student, trainer: Any, earlier: MachineChoice | None) -> MachineChoice:
    return choose(module.config.fit, module.config.quant, module.step_needs(), trainer, earlier)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``memory(bytes)``: from now on this much is free."""
    return lambda free: monkeypatch.setattr(settling, "free_bytes", lambda device: free)


def needed(module: Student, count: int) -> int:
    """The free bytes at which ``count`` images just go through at once: theirs, and 16 for each trained weight."""
    assert module.batch_features is not None
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return int((count * module.batch_features.bytes_per_image() + 16 * trained) / SHARE) + 2


# -- images at once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "taken"), [(1, 1), (3, 3), (8, 8), (100, 8)])
def test_the_option_wins(student: Any, memory: Any, asked: int, taken: int) -> None:
    module = student(f"fit.micro_batch={asked}")
    for free in (0, PLENTY):
        memory(free)
        assert chosen_for(module, trainer(), None)["micro_batch"] == taken
        assert chosen_for(module, trainer(), {"micro_batch": 5, "kernels": "eager"})["micro_batch"] == taken


@pytest.mark.parametrize(("fit", "taken"), [(8, 8), (7, 4), (4, 4), (3, 3), (2, 2), (1, 1)])
def test_else_what_fits_into_free_memory_and_it_is_said(
    student: Any, memory: Any, capsys: pytest.CaptureFixture[str], fit: int, taken: int
) -> None:
    module = student()
    memory(needed(module, fit))
    assert chosen_for(module, trainer(), None) == {"micro_batch": taken, "kernels": "eager"}
    share = "all 8 images at once" if taken == 8 else f"{taken} of 8 images at a time"
    mib = f"{taken * module.batch_features.bytes_per_image() / 2**20:.0f}"
    assert capsys.readouterr().out == f"  {share} ({mib} MiB), eager kernels\n"


def test_one_image_goes_through_however_little_is_free(student: Any, memory: Any) -> None:
    memory(0)
    assert chosen_for(student(), trainer(), None)["micro_batch"] == 1


def test_processes_share_the_batch_and_the_memory_of_their_node(
    student: Any, memory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    module = student()
    memory(2 * needed(module, 4))
    assert chosen_for(module, trainer(2, on_node=2, rank=1), None)["micro_batch"] == 4
    assert capsys.readouterr().out == ""
    memory(needed(module, 4))
    assert chosen_for(module, trainer(2, on_node=2), None)["micro_batch"] < 4
    assert chosen_for(module, trainer(2, on_node=1), None)["micro_batch"] == 4
    assert chosen_for(student("fit.micro_batch=8"), trainer(2), None)["micro_batch"] == 4


@pytest.mark.parametrize("recipe", ["light_qat_lsq_pc", "pretrain_tiny", "light_qat_distill"])
@pytest.mark.parametrize("count", [2, 16])
def test_a_batch_needs_what_its_images_need(student: Any, recipe: str, count: int) -> None:
    module = student(recipe=recipe)
    tokens = module.clip.tokenizer([f"a photo of a {CLASS_NAMES[i % 5]}" for i in range(count)])
    batch = {"images": images(count), "tokens": tokens}
    whole = saved_bytes(lambda: module.batch_features.learned(batch, 0), module.parameters())
    assert whole / count == pytest.approx(module.batch_features.bytes_per_image(), rel=0.1)


def test_looking_changes_nothing(student: Any) -> None:
    module = student()
    before = copy.deepcopy(module.state_dict())
    chosen_for(module, trainer(), None)
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


# -- kernels ---------------------------------------------------------------------------------------------------------


def test_the_length_of_the_run_is_what_it_rounds(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(kernels, "choose", lambda *given: asked.append(given) or "eager")
    chosen_for(student("fit.steps=7"), trainer(), None)
    chosen_for(student("fit.steps=7", "quant.act=null", "quant.kernels=compiled"), trainer(2), None)
    cpu = torch.device("cpu")
    assert asked == [("auto", cpu, 7 * (WEIGHTS + 8 * ACTIVATIONS)), ("compiled", cpu, 7 * WEIGHTS)]


def test_long_runs_are_compiled(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_missing_compiler", lambda _: None)
    elements = 2 * (WEIGHTS + 8 * ACTIVATIONS)
    for limit, chosen in ((elements + 1, "eager"), (elements, "compiled")):
        monkeypatch.setattr(kernels, "LONG_RUN", limit)
        assert chosen_for(student(), trainer(), None)["kernels"] == chosen
    assert chosen_for(student("quant.kernels=eager"), trainer(), None)["kernels"] == "eager"


def test_kernels_that_cannot_be_had(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_missing_compiler", lambda _: "a C++ compiler")
    with pytest.raises(UserError, match=r"quant\.kernels=compiled needs a C\+\+ compiler"):
        chosen_for(student("quant.kernels=compiled"), trainer(), None)
    with pytest.raises(UserError, match=r"quant\.kernels=fast is unknown"):
        chosen_for(student("quant.kernels=fast"), trainer(), None)


# -- a resumed run ---------------------------------------------------------------------------------------------------


def test_what_the_stopped_run_had_is_kept_where_no_option_decides(
    student: Any, memory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    memory(PLENTY)
    earlier = {"micro_batch": 3, "kernels": "compiled"}
    assert chosen_for(student(), trainer(), dict(earlier)) == earlier
    assert "3 of 8 images at a time" in capsys.readouterr().out
    assert chosen_for(student("fit.micro_batch=4"), trainer(), earlier) == {"micro_batch": 4, "kernels": "compiled"}
    assert chosen_for(student("quant.kernels=eager"), trainer(), earlier) == {"micro_batch": 3, "kernels": "eager"}


class CrashError(Exception):
    """Stands for whatever ends a process."""


def test_a_checkpoint_carries_the_choice_to_a_machine_with_more_memory(
    small_fit: Callable[..., Run], memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    options = ["fit.steps=4", "fit.checkpoint_every=1", "fit.eval_every=0", *BRIEF]
    step, taken, last = Student.training_step, [], 2

    def training_step(self: Student, batch: dict[str, Any], index: int) -> Any:
        if self.global_step == last:
            raise CrashError
        taken.append((self.global_step, self.micro_batch))
        return step(self, batch, index)

    monkeypatch.setattr(Student, "training_step", training_step)
    memory(0)
    with pytest.raises(CrashError):
        small_fit("light_qat_lsq_pc", tmp_path, *options)
    assert "1 of 8 images at a time" in capsys.readouterr().out
    memory(PLENTY)
    monkeypatch.setattr(kernels, "LONG_RUN", 0)  # a run that began now would compile
    last = 4
    small_fit("light_qat_lsq_pc", tmp_path, *options)
    said = capsys.readouterr().out
    assert "1 of 8 images at a time" in said
    assert "eager kernels" in said
    assert taken == [(0, 1), (1, 1), (2, 1), (3, 1)]
