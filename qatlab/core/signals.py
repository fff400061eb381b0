"""Ctrl-C, SIGTERM and SIGUSR1: they stop a run at a point from which the same command can continue."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from qatlab.core.ranks import is_first

# BSD's EX_TEMPFAIL, "try again later": the batch scripts of slurm/ put a job back into the queue on this code.
EXIT_REQUEUE = 75
# Shells report this exit code after Ctrl-C: 128 + SIGINT.
EXIT_INTERRUPTED = 130
# SIGINT comes from Ctrl-C, SIGTERM from most schedulers at the end of a job's time, and SIGUSR1 from Slurm's
# --signal=USR1 before the end.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def leave_to_parent(worker: int) -> None:
    """Have a data-loading process (a ``worker_init_fn``) ignore the signals, so that its parent decides on its end."""
    # A terminal sends Ctrl-C to the whole process group, and so do schedulers. If a loader process died of the signal,
    # its parent would fail in the middle of a step, where it has no checkpoint to continue from.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# Stopped is not an Exception, because code that catches every Exception of a library must not catch it.
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
    """Inside this context the signals raise Stopped at once, or, while ``deferred``, where the run checks ``received``.

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
        # A notebook or test that called the run has handlers of its own, which are put back here.
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def release(self) -> None:
        """Let signals raise at once from now on; raises Stopped for one that is waiting."""
        self.deferred = False
        if self.received is not None:
            raise Stopped(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None and number == signal.SIGINT
        # The first signal decides the exit code, because schedulers send SIGTERM after their warning.
        self.received = self.received or number
        if again or not self.deferred:
            raise Stopped(number)
        if number == signal.SIGINT and is_first():
            print("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once", flush=True)
