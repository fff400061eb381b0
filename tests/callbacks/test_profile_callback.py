"""Where the time goes, on a clock that only the parts of the training move: every second is accounted for exactly."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from brief import BRIEF, with_options
from rich.console import Console
from torch import nn

from qatlab.callbacks.profile import SETTLED, TRACED, Profile, phase_table, steps_to_trace
from qatlab.training import stopwatch as phases
from qatlab.training.stopwatch import Stopwatch, phase

# -- the stopwatch -----------------------------------------------------------------------------------------------------


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def stopwatch(clock):
    stopwatch = Stopwatch(clock)
    stopwatch.start()
    yield stopwatch
    stopwatch.stop()


def test_an_inner_phase_interrupts_the_outer_one(stopwatch, clock):
    clock.advance(1)
    with phase("student"):
        clock.advance(2)
        with phase("teacher"):
            clock.advance(4)
            with phase("student"):
                clock.advance(8)
        clock.advance(16)
    clock.advance(32)
    stopwatch.stop()
    assert stopwatch.seconds == {"student": 2 + 8 + 16, "teacher": 4, "other": 1 + 32}


def test_a_phase_ends_where_its_block_raises(stopwatch, clock):
    def fails() -> None:
        with phase("student"):
            clock.advance(1)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 (it is ours)
        fails()
    clock.advance(2)
    stopwatch.stop()
    assert stopwatch.seconds == {"student": 1, "other": 2}


def test_a_probe_pass_is_one_thing(stopwatch, clock):
    with phase("probes"):
        clock.advance(1)
        with phase("student"), phase("data"):
            clock.advance(2)
        clock.advance(4)
    with phase("student"):
        clock.advance(8)
    assert stopwatch.seconds == {"probes": 7, "student": 8, "other": 0}


def test_open_phases_end_with_the_clock(stopwatch, clock):
    stopwatch.enter("start")
    stopwatch.enter("data")
    clock.advance(3)
    stopwatch.stop()
    stopwatch.leave()  # what began before the end may end after it
    clock.advance(5)
    assert dict(stopwatch.seconds) == {"data": 3, "start": 0, "other": 0}


def test_a_pass_without_images_ends_where_training_goes_on(stopwatch, clock):
    actions = phases.Actions(stopwatch)
    actions.start("[LightningModule]Student.on_validation_model_zero_grad")
    clock.advance(1)
    actions.stop("[LightningModule]Student.on_validation_model_zero_grad")
    clock.advance(2)
    with actions.profile("[_TrainingEpochLoop].train_dataloader_next"):
        clock.advance(4)
    clock.advance(8)
    stopwatch.stop()
    assert stopwatch.seconds == {"probes": 3, "data": 4, "other": 8}


def test_nobody_measures(clock):
    stopwatch = Stopwatch(clock)
    with torch.profiler.profile() as tracer, phase("student"):
        clock.advance(1)
    assert not stopwatch.seconds
    assert "student" not in {event.name for event in tracer.events()}


# -- which steps, and the table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "traced"),
    [
        (1, range(0, 1)),
        (2, range(1, 2)),
        (3, range(1, 3)),
        (TRACED + 1, range(1, TRACED + 1)),
        (16, range(6, 10)),
        (100, range(SETTLED, SETTLED + TRACED)),
        (10**6, range(SETTLED, SETTLED + TRACED)),
    ],
)
def test_a_few_steps_in_the_middle_are_traced(steps, traced):
    assert steps_to_trace(steps) == traced


def cells(table, width: int = 80) -> list[list[str]]:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(table)
    printed = capture.get().splitlines()
    assert max(map(len, printed)) <= width
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in printed if line[:1] == "│"]


def test_the_rows_add_up():
    seconds = {"start": 1.0, "data": 2.0, "student": 5.0, "backward": 10.0, "probes": 20.0, "mine": 0.5, "other": 1.5}
    rows = {label: values for label, *values, _ in cells(phase_table(seconds, 4, "t"))}
    assert rows["data"] == ["2.00", "5.0", "500.0"]
    assert rows["student forward"] == ["5.00", "12.5", "1250.0"]
    assert rows["teacher"] == ["0.00", "0.0", "0.0"]
    assert rows["total"] == ["40.00", "100.0", "10000.0"]
    sums = [sum(float(values[i]) for label, values in rows.items() if label != "total") for i in range(3)]
    assert sums == pytest.approx([40.0, 100.0, 10000.0], abs=0.3)  # a digit each of the shares
    assert list(rows)[-2:] == ["other", "total"]
    assert rows["mine"] == ["0.50", "1.2", "125.0"]


def test_the_table_fits_a_small_screen_however_long_it_took():
    lines = cells(phase_table({"student": 86400.0, "probes": 3600.0}, 10**5, "t"))
    assert len(lines) == 12


# -- a training whose parts move the clock -----------------------------------------------------------------------------

BATCH = 3


class Tick(torch.autograd.Function):
    """The identity, whose backward takes eleven seconds."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clock: Clock) -> torch.Tensor:
        ctx.clock = clock
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.clock.advance(11)
        return gradients[0], None


class Slow(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        CLOCKS[0].advance(13)
        return loss


CLOCKS: list[Clock] = []


class Images(torch.utils.data.IterableDataset):
    def __init__(self, clock: Clock, seconds: float, n: int) -> None:
        self.clock, self.seconds, self.n = clock, seconds, n

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(5)
        for _ in range(self.n):
            self.clock.advance(self.seconds)
            yield {"images": torch.randn(BATCH, 4, generator=generator)}

    def __len__(self) -> int:
        return self.n


class Lesson(L.LightningModule):
    """A student that follows a teacher in two micro-batches, the first one's backward its own."""

    def __init__(self, clock: Clock, interrupt: tuple[int, type[BaseException]] | None = None) -> None:
        super().__init__()
        self.clock, self.interrupt = clock, interrupt
        torch.manual_seed(1)
        self.net, self.teacher = nn.Linear(4, 2), nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.interrupt and self.global_step == self.interrupt[0]:
            raise self.interrupt[1]("enough")
        losses = []
        for part in batch["images"].split(2):
            with phase("student"):
                self.clock.advance(7)
                student = Tick.apply(self.net(part), self.clock)
                with torch.no_grad(), phase("teacher"):
                    self.clock.advance(5)
                    teacher = self.teacher(part)
            self.clock.advance(3)
            losses.append((student - teacher).square().sum())
        with phase("backward"):
            losses[0].backward()
        return losses[1]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with phase("student"):
            self.clock.advance(17)

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        self.clock.advance(23)

    def configure_optimizers(self) -> Any:
        return Slow(self.net.parameters(), lr=0.01)

    def optimizer_zero_grad(self, *_: Any) -> None:
        """The gradient of the first micro-batch is kept."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.clock.advance(0.5)
        return batch

    def on_train_epoch_start(self) -> None:
        self.clock.advance(37)

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.advance(41)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for parameter in self.parameters():
            parameter.grad = None


class Watcher(L.Callback):
    """Someone else's callback, called in the middle of the optimizer's step and of the backward."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.clock.advance(19)

    def on_after_backward(self, *_: Any) -> None:
        self.clock.advance(29)

    def on_train_start(self, *_: Any) -> None:
        self.clock.advance(31)


def train(folder: Path, clock: Clock, steps: int, *, profile: bool = True, resume: Path | None = None, **lesson: Any):
    """A fit of so many steps; its trainer and module."""
    CLOCKS[:] = [clock]
    checkpoints = L.pytorch.callbacks.ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, val_check_interval=2, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[Watcher(clock), checkpoints, *([Profile(folder, clock)] if profile else [])],
    )  # fmt: skip
    loaders = [
        torch.utils.data.DataLoader(Images(clock, *args), batch_size=None) for args in ((2, steps + 1), (0.25, 2))
    ]
    module = Lesson(clock, **lesson)
    trainer.fit(module, *loaders, ckpt_path=resume, weights_only=True)
    return trainer, module


def of(trainer: L.Trainer) -> Profile:
    (profile,) = (callback for callback in trainer.callbacks if isinstance(callback, Profile))
    return profile


def labels(trace: Path) -> list[str]:
    return [event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_every_second_of_a_training_is_where_it_was_spent(tmp_path, clock, steps, monkeypatch):
    found: dict[str, float] = {}
    monkeypatch.setattr(Profile, "_print", lambda self, seconds, ranks: found.update(seconds))
    begun = clock.now
    train(tmp_path, clock, steps)
    pairs = steps // 2
    expected = {
        "start": 37,
        "data": (2 + 0.5) * steps,
        "student": 2 * 7 * steps,
        "teacher": 2 * 5 * steps,
        "loss": 2 * 3 * steps,
        "backward": 2 * 11 * steps,
        "optimizer": 13 * steps,
        "other": (19 + 29 + 41) * steps + 31,
        "probes": 2 * (17 + 0.25 + 0.5) * pairs,
        "checkpoints": 23 * pairs,
    }
    assert {name: s for name, s in found.items() if s} == {name: s for name, s in expected.items() if s}
    assert sum(found.values()) == clock.now - begun


def test_what_is_printed(tmp_path, clock, capsys):
    train(tmp_path, clock, 4)
    said = capsys.readouterr().out
    step = 2.5 + 2 * (7 + 5 + 3 + 11) + 13
    total = 4 * (step + 19 + 29 + 41) + 31 + 37 + 2 * (2 * 17.75 + 23)
    assert f"4 steps, 12 images: {12 / (4 * step):.1f} images/s in the steps, {12 / total:.1f} over all" in said
    assert f"first step {step:.2f} s" in said
    assert f"{4 * 2 * 7:.2f}" in next(line for line in said.splitlines() if "student forward" in line)
    assert "MiB of the process" in said
    assert "trace of steps 2 to 4, " in said
    assert str(tmp_path / "profile" / "trace.json.gz") in said
    assert "ui.perfetto.dev" in said
    assert max(len(line) for line in said.splitlines() if line[:1] in "│┃┏└") <= 80


def test_the_trace_shows_the_phases_of_its_steps(tmp_path, clock):
    train(tmp_path, clock, 16)
    (trace,) = (tmp_path / "profile").iterdir()
    found = labels(trace)
    assert [name for name in found if name.startswith("ProfilerStep")] == [f"ProfilerStep#{i}" for i in range(6, 10)]
    # per step: two micro-batches, two backward calls, Lightning's optimizer hook
    counts = {name: found.count(name) for name in ("student", "teacher", "loss", "backward", "optimizer", "probes")}
    assert counts == {"student": 8 + 2 * 2, "teacher": 8, "loss": 4, "backward": 8, "optimizer": 4, "probes": 2}
    assert "aten::linear" in found
    assert trace.stat().st_size < 10**6


@pytest.mark.parametrize(("steps", "traced"), [(1, [0]), (2, [1]), (3, [1, 2])])
@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
def test_a_short_run_is_traced_to_its_last_step(tmp_path, clock, steps, traced):
    train(tmp_path, clock, steps)
    found = labels(tmp_path / "profile" / "trace.json.gz")
    assert [name for name in found if name.startswith("ProfilerStep")] == [f"ProfilerStep#{step}" for step in traced]
    assert found.count("optimizer") == len(traced)


def test_an_interrupted_run_keeps_the_steps_it_traced(tmp_path, clock, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path, clock, 16, interrupt=(8, KeyboardInterrupt))
    found = labels(tmp_path / "profile" / "trace.json.gz")
    assert {"ProfilerStep#6", "ProfilerStep#7"} <= set(found)
    said = capsys.readouterr().out
    assert "8 steps, 24 images" in said
    assert "trace of steps 7 to 8, " in said
    assert phases._running is None


def test_a_resumed_run_tells_of_its_own_steps(tmp_path, clock, capsys):
    train(tmp_path, clock, 4, profile=False)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    train(tmp_path, clock, 8, resume=checkpoint)
    said = capsys.readouterr().out
    assert "4 steps, 12 images" in said
    assert "trace of steps 6 to 8, " in said
    (checkpoint,) = set((tmp_path / "checkpoints").glob("*.ckpt")) - {checkpoint}
    train(tmp_path, clock, 8, resume=checkpoint)
    assert not capsys.readouterr().out  # nothing was left to train


def test_a_failed_run_only_says_why(tmp_path, clock, capsys):
    with pytest.raises(RuntimeError, match="enough"):
        train(tmp_path, clock, 16, interrupt=(2, RuntimeError))
    assert "where the time" not in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()
    assert phases._running is None


def test_on_cuda_a_phase_ends_when_the_device_has_done_it(tmp_path, clock, monkeypatch):
    """Without such a device: that the clock is read after it has caught up, its own memory is told, and that this is said."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.advance(3))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**20)
    profile = Profile(tmp_path, clock)
    profile.device, profile.steps, profile.images, profile.first_step = torch.device("cuda"), 1, 8, 0.5
    profile.traced = None
    assert profile._now() == 1003
    throughput, memory = profile._notes({"student": 4.0})
    assert throughput.startswith("1 steps, 8 images: 2.0 images/s in the steps, 2.0 over all")
    assert memory == "peak memory 5 MiB on the GPU, which is synchronised at every border of a phase"


def test_lightning_has_its_own_profiler_back(tmp_path, clock):
    trainer, _ = train(tmp_path, clock, 2)
    assert isinstance(trainer.profiler, L.pytorch.profilers.PassThroughProfiler)
    assert of(trainer).stopwatch is None


def test_the_weights_are_those_of_a_run_without_it(tmp_path, clock):
    _, plain = train(tmp_path / "plain", clock, 9, profile=False)
    _, profiled = train(tmp_path / "profiled", clock, 9)
    start = Lesson(clock).net.weight
    assert not torch.equal(plain.net.weight, start)
    for one, other in zip(plain.parameters(), profiled.parameters(), strict=True):
        assert torch.equal(one, other)


# -- the real thing ----------------------------------------------------------------------------------------------------

REAL = ["objective.feature_mse=1", "fit.steps=3", "fit.batch_size=8", "fit.unique_samples=16", *BRIEF]
SAID = "where the time of training went"


def same_model(plain: Path, profiled: Path) -> bool:
    one, other = ((folder / "model.safetensors").read_bytes() for folder in (plain, profiled))
    return one == other


def test_a_run_trains_the_same_model(small_fit, tmp_path, capsys):
    plain = small_fit("light_qat_lsq", tmp_path / "plain", *REAL).folder
    assert SAID not in capsys.readouterr().out
    profiled = small_fit("light_qat_lsq", tmp_path / "profiled", *REAL, "fit.profile=true").folder
    said = capsys.readouterr().out
    assert same_model(plain, profiled)
    assert "3 steps, 24 images" in said
    rows = {
        cell[0].strip(): cell[1].strip() for line in said.splitlines() if len(cell := line.strip("│").split("│")) == 5
    }
    assert all(float(rows[name]) > 0 for name in ("student forward", "backward", "probes"))
    found = labels(profiled / "profile" / "trace.json.gz")
    assert {"data", "teacher", "student", "backward", "optimizer", "probes"} <= set(found)


@pytest.mark.slow
def test_two_processes_train_the_same_model_and_one_speaks(tmp_path, small_options, subprocess_environment, python):
    said = {}
    for profile in ("false", "true"):
        options = ["recipe=light_qat_lsq", *REAL, "trainer.devices=2", f"fit.profile={profile}"]
        line = [python, "-m", "qatlab.fit", f"output={tmp_path / profile}", *with_options(small_options, *options)]
        done = subprocess.run(
            line, env=subprocess_environment, cwd=tmp_path, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-4000:]
        said[profile] = done.stdout
    plain, profiled = (next((tmp_path / profile).glob("*/model.safetensors")).parent for profile in ("false", "true"))
    assert same_model(plain, profiled)
    assert [said[profile].count(SAID) for profile in ("false", "true")] == [0, 1]
    assert f"{SAID}, rank 0 of 2" in said["true"]
    assert "3 steps, 24 images" in said["true"]
    assert [path.name for path in (profiled / "profile").iterdir()] == ["trace.json.gz"]
