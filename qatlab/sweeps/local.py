"""Cells as processes on this machine, some at a time."""

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

from qatlab.cache import full_disk_named
from qatlab.stopping import Stopped, StopSignals
from qatlab.sweeps.grid import Cell
from qatlab.sweeps.state import EXIT, STOPPED, log_of, state_of

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
_POLL = 0.2  # seconds


def command(cell: Cell, own: Path | None) -> list[str]:
    """Return what runs a cell."""
    where = ["--config-dir", str(own)] if own else []
    return [sys.executable, "-m", "qatlab.fit", *where, *cell.overrides]


def run(cells: Sequence[Cell], kinds: Sequence[str], jobs: int, own: Path | None, gpus: int) -> None:
    """Run the cells, ``jobs`` at a time, each with its output in its log; a cell that fails leaves the others running.

    A cell that another process runs is waited for; it is started where it is then of one of ``kinds``. With several
    ``gpus`` the jobs take turns with them. A signal goes on to the cells, which stop where the same command goes on; raises
    Stopped once they have.
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
        stop.deferred = True
        task = progress.add_task("runs", total=len(cells))
        while (waiting and stop.received is None) or any(slots):
            for i, process in enumerate(slots):
                if process is not None and process.ended():
                    if process.code == 2 and state_of(process.cell).kind == "running":
                        waiting.append(process.cell)  # another process was faster
                    else:
                        progress.console.print(process.told(), highlight=False, soft_wrap=True)
                    slots[i] = process = None
                if process is None and stop.received is None and (cell := _next(waiting, kinds)):
                    slots[i] = _Process(cell, own, _environment(cell, i, jobs, gpus))
                elif process is not None and stop.received is not None:
                    process.stop(stop.received)
            progress.update(task, completed=len(cells) - len(waiting) - sum(map(bool, slots)))
            time.sleep(_POLL)
    if stop.received is not None:
        raise Stopped(stop.received)


def _next(waiting: list[Cell], kinds: Sequence[str]) -> Cell | None:
    """Take the next cell to start; one that another process has stays, one that it has ended by now goes."""
    for cell in [*waiting]:
        if (kind := state_of(cell).kind) != "running":
            waiting.remove(cell)
            if kind in kinds:
                return cell
    return None


def gpus() -> int:
    """Return how many GPUs there are to take turns with."""
    import torch

    return torch.cuda.device_count()


def _environment(cell: Cell, slot: int, jobs: int, gpus: int) -> dict[str, str]:
    """Return the environment of a cell: its share of the cores, and the GPUs of its place among the jobs."""
    environment, devices = {**os.environ}, cell.config.trainer.devices
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (jobs * devices))))
    if gpus > devices:
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        names = visible.split(",")[:gpus]
        turn = [names[(slot * devices + i) % len(names)] for i in range(devices)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(turn)
    return environment


class _Process:
    """A cell that runs, its log open; the last line of the log is how it ended, where it ended by itself."""

    def __init__(self, cell: Cell, own: Path | None, environment: dict[str, str]) -> None:
        assert cell.run is not None
        self.cell, self.name, self.log = cell, cell.run.folder.name, log_of(cell.run)
        self.started, self.seconds, self.stopped = time.monotonic(), 0.0, False
        self.code: int | None = None
        with full_disk_named(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.log.open("a")  # what an earlier process said stays
        # A group of its own: a Ctrl-C at the terminal reaches it once, through this process.
        self.process = subprocess.Popen(
            command(cell, own),
            env=environment,
            stdout=self.file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )

    def ended(self) -> bool:
        """Return whether it has, and note how in its log."""
        self.code = self.process.poll()
        if self.code is None:
            return False
        self.seconds = time.monotonic() - self.started
        with full_disk_named(self.log), self.file:
            self.file.write(f"\n{EXIT}{self.code}\n")
        return True

    def told(self) -> str:
        """Return a line on how it ended."""
        if self.code and self.code in STOPPED:
            return f"{self.name}: stopped"
        ended = f"failed with {EXIT}{self.code}" if self.code else "finished"
        return f"{self.name}: {ended}, {self.seconds:.0f} s{f': {self.log}' if self.code else ''}"

    def stop(self, number: int) -> None:
        """Hand a signal on, once."""
        if not self.stopped:
            self.stopped = True
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


def _end_with_parent() -> Callable[[], None] | None:
    """On Linux, have a cell be told to stop when this process is killed: it would hold its run against the next sweep."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(_DEATH_SIGNAL, signal.SIGTERM)

    return ask
