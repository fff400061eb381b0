"""Where the time of training goes: a trace of a few steps, and a table of all steps."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, schedule
from torch.profiler import profile as torch_profiler

from qatlab.core.console import console
from qatlab.core.files import atomic
from qatlab.core.signals import Stopped
from qatlab.training.stopwatch import OTHER, PROBES, PROFILER, START, Actions, Stopwatch

TRACED = 4  # steps in a trace; a few steps already make a file of several megabytes
# Steps before the trace, in a run that has so many: the first steps compile kernels and fill the loader's queues.
SETTLED = 20
# The rows of the table in their order: {phase: (label, explanation or "")}.
IN_STEP = {
    "data": ("data", "waiting, copying to the device"),
    "teacher": ("teacher", "and frozen texts"),
    "student": ("student forward", ""),
    "loss": ("loss", "rest of the training step"),
    "backward": ("backward", ""),
    "optimizer": ("optimizer", ""),
}
BEFORE = {START: ("start-up", "until a batch is asked for")}
AFTER = {
    PROBES: ("probes", "whole passes"),
    "checkpoints": ("checkpoints", "saving"),
    PROFILER: ("profiler", "tracing a few steps"),
    OTHER: ("other", "callbacks, loggers, Lightning"),
}


def steps_to_trace(steps: int) -> range:
    """Return which of ``steps`` steps are traced: few, after a warm-up, and at least one."""
    # A short run is traced around its middle, because its first and last steps differ from the others.
    first = min(SETTLED, max(steps - TRACED, 0) // 2)
    first = max(first, min(1, steps - 1))  # torch's tracer warms up in a step of its own, if the run has two
    return range(first, min(first + TRACED, steps))


def phase_table(seconds: Mapping[str, float], steps: int, title: str) -> Table:
    """Return the table of exclusive ``seconds`` by phase over ``steps`` steps, with their sum in the last row."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("phase")
    for name in ("s", "%", "ms/step"):
        table.add_column(name, justify="right")
    table.add_column("", style="dim")
    total = sum(seconds.values())
    digits = 2 if total < 1000 else 0  # hundredths of a second tell nothing in a table of hours

    def add(label: str, spent: float, what: str = "") -> None:
        table.add_row(
            label, f"{spent:.{digits}f}", f"{100 * spent / total:.1f}", f"{1000 * spent / max(steps, 1):.1f}", what
        )

    # A phase that no table above lists still gets a row, because the rows have to add up to the total.
    unlisted = {name: (name, "") for name in seconds if name not in {**BEFORE, **IN_STEP, **AFTER}}
    for name, (label, what) in {**BEFORE, **IN_STEP, **unlisted, **AFTER}.items():
        add(label, seconds.get(name, 0.0), what)
    table.add_section()
    add("total", total)
    return table


class Profile(L.Callback):
    """Writes ``<folder>/profile/trace.json.gz`` and prints where the time of ``trainer.fit`` went, on rank zero.

    On CUDA the device is synchronised wherever a phase begins or ends. The trained weights stay the same to the last
    bit.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        self.path = folder / "profile" / "trace.json.gz"
        self.clock = clock
        self.stopwatch: Stopwatch | None = None
        self.tracer: torch_profiler | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock, and listen to what Lightning does."""
        if not trainer.is_global_zero:
            return
        self.device = pl_module.device
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.steps = self.images = 0
        self.first_step = 0.0
        # The steps in the trace, counted from the first step of the run; None until the trace is written.
        self.traced: range | None = None
        self.stopwatch = Stopwatch(self._now)
        self.stopwatch.start()
        self.stopwatch.enter(START)
        # Lightning tells its profiler when an action begins and ends. The replaced profiler is put back at the end.
        self.replaced, trainer.profiler = trainer.profiler, Actions(self.stopwatch)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Choose the steps to trace."""
        if self.stopwatch is None:
            return
        self.before = trainer.global_step
        # Steps are counted from where this process begins, so that a run that goes on from a checkpoint is traced too.
        steps = steps_to_trace(trainer.max_steps - self.before)
        tracing = schedule(wait=max(steps.start - 1, 0), warmup=min(steps.start, 1), active=len(steps), repeat=1)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        # Kineto, torch's tracer, writes to stderr at every start and
        # reports a missing GPU as an error; level 99 silences Kineto.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        with self.stopwatch.phase(PROFILER):
            self.tracer = torch_profiler(activities=kinds, schedule=tracing, on_trace_ready=self._write)
            self.first = steps.start
            self.tracer.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step; a trace begins and ends between two steps."""
        if self.stopwatch is None:
            return
        self.steps += 1
        self.images += len(batch["images"]) * trainer.world_size
        # The first step compiles kernels and fills queues, so its time is printed beside the mean of all steps.
        if self.steps == 1:
            self.first_step = sum(s for name, s in self.stopwatch.seconds.items() if name in IN_STEP)
        if self.tracer is not None:
            with self.stopwatch.phase(PROFILER):
                self.tracer.step()
            if self.traced is not None:
                self._end_trace()

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Stop the clock and print; the progress bar of a callback before this one is closed by now."""
        if self.stopwatch is not None:
            self._finish(trainer, self.stopwatch, say=True)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Stop the clock, and print the table if the run was interrupted; a failed run only says why it failed."""
        if self.stopwatch is not None:
            self._finish(trainer, self.stopwatch, say=isinstance(exception, (KeyboardInterrupt, Stopped)))

    def _now(self) -> float:
        """Return the seconds on the clock after the GPU has finished, because kernels run asynchronously."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def _end_trace(self) -> None:
        tracer, self.tracer = self.tracer, None  # _finish calls this method too; a tracer may be stopped only once
        if tracer is not None and self.stopwatch is not None:
            with self.stopwatch.phase(PROFILER):
                tracer.stop()  # this calls _write where training ended within the trace

    def _write(self, tracer: torch_profiler) -> None:
        with atomic(self.path) as temporary:
            tracer.export_chrome_trace(str(temporary))
        self.traced = range(self.before + self.first + 1, self.before + tracer.step_num + 1)

    def _finish(self, trainer: L.Trainer, stopwatch: Stopwatch, say: bool) -> None:
        self._end_trace()
        stopwatch.stop()
        self.stopwatch = None  # teardown follows an exception, and the time is printed once
        trainer.profiler = self.replaced  # type: ignore[attr-defined]
        if say and self.steps:
            self._print(dict(stopwatch.seconds), trainer.world_size)

    def _print(self, seconds: dict[str, float], ranks: int) -> None:
        out = console()
        rank = f", rank 0 of {ranks}" if ranks > 1 else ""
        out.print(phase_table(seconds, self.steps, f"where the time of training went{rank}"))
        for line in self._notes(seconds):
            out.print(line, highlight=False, soft_wrap=True)

    def _notes(self, seconds: Mapping[str, float]) -> list[str]:
        """Return the lines under the table: throughput, memory, where the trace lies and which program opens it."""
        in_step = sum(seconds.get(name, 0.0) for name in IN_STEP)
        per_second = [f"{self.images / s:.1f}" if s else "0" for s in (in_step, sum(seconds.values()))]
        cuda = self.device.type == "cuda"
        lines = [
            f"{self.steps} steps, {self.images} images: {per_second[0]} images/s in the steps, {per_second[1]} over all; "
            f"first step {self.first_step:.2f} s",
            f"peak memory {_peak_bytes(self.device) / 2**20:.0f} MiB "
            + (
                "on the GPU, which is synchronised at every border of a phase"
                if cuda
                else "of the process since its start"
            ),
        ]
        if self.traced:
            lines.append(f"trace of steps {self.traced[0]} to {self.traced[-1]}, which ran slower for it:")
            lines.append(f"  {self.path}   (open it in https://ui.perfetto.dev or chrome://tracing)")
        return lines


def _peak_bytes(device: torch.device) -> int:
    """Return the largest memory in bytes: of the GPU's tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return high if sys.platform == "darwin" else high * 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
