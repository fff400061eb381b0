"""Ctrl-C, SIGTERM and SIGUSR1: told to a run so that it stops where the same command can go on."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

# BSD's EX_TEMPFAIL, "try again later": what a batch script requeues on.
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def rank() -> int:
    """Return the number of this process among those of its run, from what started it: torchrun, Lightning or srun."""
    return next((int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), 0)


def leave_to_parent(worker: int) -> None:
    """Have a data-loading process (a ``worker_init_fn``) ignore the signals: its parent ends it, and often both get them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Stopped(BaseException):
    """The run was told to stop by signal ``number``; all that is finished, and the last checkpoint, are on disk."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Return 130 after Ctrl-C, as shells do, and 75 after SIGTERM and SIGUSR1, which a scheduler sends."""
        return EXIT_INTERRUPTED if self.number == signal.SIGINT else EXIT_REQUEUE


class StopSignals:
    """Inside this context the signals raise Stopped: at once, or, while ``deferred``, when ``received`` is looked at.

    A second Ctrl-C always raises at once. In a thread other than the main one nothing is installed: Python delivers
    signals to the main thread only.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def release(self) -> None:
        """Let signals raise at once from now on; raises Stopped for one that is waiting."""
        self.deferred = False
        if self.received is not None:
            raise Stopped(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None and number == signal.SIGINT
        self.received = self.received or number
        if again or not self.deferred:
            raise Stopped(number)
        if number == signal.SIGINT and rank() == 0:
            print("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once", flush=True)
