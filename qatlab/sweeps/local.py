"""Cells as processes on this machine, a number of them at a time."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qatlab.config.heeded import IN_SWEEP
from qatlab.core.files import full_disk_named
from qatlab.core.signals import Stopped, StopSignals
from qatlab.sweeps.grid import Cell
from qatlab.sweeps.state import EXIT, STOPPED, log_of, state_of

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
_POLL = 0.2  # seconds between two looks at the processes: a run takes minutes, but a Ctrl-C should be answered at once


def command(cell: Cell, config_dir: Path | None) -> list[str]:
    """Return the command that runs a cell."""
    where = ["--config-dir", str(config_dir)] if config_dir else []
    return [sys.executable, "-m", "qatlab.fit", *where, *cell.overrides]


def run(cells: Sequence[Cell], kinds: Sequence[str], jobs: int, config_dir: Path | None, gpus: int) -> None:
    """Run the cells, ``jobs`` at a time, each with its output in its log; a cell that fails leaves the others running.

    A cell that another process runs is waited for, and started if its state is then one of ``kinds``. Several
    ``gpus`` are given to the jobs in turn. A signal is passed on to the cells, which stop where the same command can
    continue; then Stopped is raised.
    """
    slots: list[_Process | None] = [None] * jobs
    waiting = list(cells)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with StopSignals() as stop, Progress(*columns) as progress:
        # A signal must not raise in the middle of starting a cell, because nobody could then stop the cell's process.
        stop.deferred = True
        task = progress.add_task("runs", total=len(cells))
        while (waiting and stop.received is None) or any(slots):
            for i, process in enumerate(slots):
                if process is not None and process.ended():
                    # The exit code 2 of a mistake, on a run that is going
                    # on, means that another process held the run first.
                    if process.code == 2 and state_of(process.cell).kind == "running":
                        waiting.append(process.cell)
                    else:
                        progress.console.print(process.told(), highlight=False, markup=False, soft_wrap=True)
                    slots[i] = process = None
                if process is None and stop.received is None and (cell := _next(waiting, kinds)):
                    slots[i] = _Process(cell, config_dir, _environment(cell, i, jobs, gpus))
                elif process is not None and stop.received is not None:
                    process.stop(stop.received)
            progress.update(task, completed=len(cells) - len(waiting) - sum(map(bool, slots)))
            time.sleep(_POLL)
    if stop.received is not None:
        raise Stopped(stop.received)


def _next(waiting: list[Cell], kinds: Sequence[str]) -> Cell | None:
    """Take the next cell to start out of ``waiting``, and return it; None where there is none to start now.

    A cell that another process runs stays in ``waiting``. A cell that is finished by now, or of no kind in ``kinds``,
    leaves ``waiting``.
    """
    # The state is read only now, because other processes may work on the same sweep.
    for cell in [*waiting]:
        if (kind := state_of(cell).kind) != "running":
            waiting.remove(cell)
            if kind in kinds:
                return cell
    return None


def gpus() -> int:
    """Return how many GPUs this process sees."""
    import torch  # imported here, because planning a sweep needs no torch

    return torch.cuda.device_count()


def _environment(cell: Cell, slot: int, jobs: int, gpus: int) -> dict[str, str]:
    """Return the environment of a cell: its share of the cores, and the GPUs of its place among the jobs."""
    # Without a bound every job would start as many threads as the machine has cores.
    environment, devices = {**os.environ, IN_SWEEP: "1"}, cell.config.trainer.devices
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (jobs * devices))))
    # A job that needs all GPUs is left as it is. The names may be
    # those of a scheduler (GPU-3f2a..., 4,7) instead of 0, 1, 2.
    if gpus > devices:
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        names = visible.split(",")[:gpus]
        turn = [names[(slot * devices + i) % len(names)] for i in range(devices)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(turn)
    return environment


class _Process:
    """A running cell with its log open; the last line of the log will be the exit code of the process."""

    def __init__(self, cell: Cell, config_dir: Path | None, environment: dict[str, str]) -> None:
        assert cell.run is not None
        self.cell, self.name, self.log = cell, cell.run.folder.name, log_of(cell.run)
        self.started, self.seconds, self.stopped = time.monotonic(), 0.0, False
        self.code: int | None = None
        with full_disk_named(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.log.open("a")  # appended: an earlier process of the run may have said why it failed
        # A session of its own keeps Ctrl-C from reaching the cell twice, from the terminal and from this process.
        self.process = subprocess.Popen(
            command(cell, config_dir),
            env=environment,
            stdout=self.file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )

    def ended(self) -> bool:
        """Return whether the process has ended; if so, write its exit code to the log and close it."""
        self.code = self.process.poll()
        if self.code is None:
            return False
        self.seconds = time.monotonic() - self.started
        with full_disk_named(self.log), self.file:
            self.file.write(f"\n{EXIT}{self.code}\n")
        return True

    def told(self) -> str:
        """Return a line on how the process ended, such as "<run>: finished, 12 s"."""
        if self.code and self.code in STOPPED:
            return f"{self.name}: stopped"
        ended = f"failed with {EXIT}{self.code}" if self.code else "finished"
        return f"{self.name}: {ended}, {self.seconds:.0f} s{f': {self.log}' if self.code else ''}"

    def stop(self, number: int) -> None:
        """Pass a signal on to the cell once, because a second SIGINT would stop the cell without a checkpoint."""
        if not self.stopped:
            self.stopped = True
            with suppress(ProcessLookupError):  # the process has just ended by itself
                os.killpg(self.process.pid, number)


def _end_with_parent() -> Callable[[], None] | None:
    """Return a function by which a child process on Linux asks for SIGTERM when this process dies; None elsewhere.

    A cell that outlived a killed sweep would keep its run locked for the next sweep.
    """
    if sys.platform != "linux":
        return None
    # libc is loaded here, because between fork and exec a child of
    # a process with threads may do hardly more than system calls.
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(_DEATH_SIGNAL, signal.SIGTERM)

    return ask
