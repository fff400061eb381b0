"""Named phases of training: seconds on a stopwatch and labels in a profiler's trace, or nothing when neither runs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lightning.pytorch.profilers import Profiler
from torch.profiler import record_function

START, PROBES, PROFILER, OTHER = "start", "probes", "profiler", "other"


class Stopwatch:
    """Exclusive seconds by phase: an inner phase interrupts the outer one, and time outside every phase is ``other``.

    A probe pass is one phase: everything within it counts for ``probes``. ``clock`` returns seconds and is read once at
    every border, so that the phases add up to the time from ``start`` to ``stop``.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[tuple[str, AbstractContextManager[Any]]] = []
        self._since = 0.0

    @property
    def current(self) -> str:
        """Return the phase for which time counts at the moment."""
        return self._open[-1][0] if self._open else OTHER

    def start(self) -> None:
        """Start the clock; from now on the function ``phase`` uses this stopwatch."""
        global _running
        _running, self._since = self, self.clock()

    def stop(self) -> None:
        """Stop the clock; phases that are still open end with it."""
        global _running
        # A phase that only a later action ends, such as the start-up,
        # is still open where training ended before that action.
        while self._open:
            self.leave()
        self._charge()
        _running = None

    def enter(self, name: str) -> None:
        """Begin a phase, for places where a ``with`` block cannot be used."""
        self._charge()
        # Phases in which a profiler starts or stops have no label, because the trace would hold only half of the label.
        label = nullcontext() if name in (PROFILER, OTHER) else record_function(name)
        label.__enter__()
        # Everything within a probe counts as part of the probe, but keeps its own label in a trace.
        self._open.append((PROBES if self.current == PROBES else name, label))

    def leave(self) -> None:
        """End the phase that began last."""
        # ``stop`` has ended all phases, but the ``with`` block of a phase may end after ``stop``.
        if _running is self:
            self._charge()
            self._open.pop()[1].__exit__(None, None, None)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count a block for ``name``."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def _charge(self) -> None:
        now = self.clock()
        self.seconds[self.current] += now - self._since
        self._since = now


_running: Stopwatch | None = None


def phase(name: str) -> AbstractContextManager[None]:
    """Return a context that counts for ``name`` on the running stopwatch and has that label in a trace."""
    return nullcontext() if _running is None else _running.phase(name)


# The phase of each action that Lightning reports, by the last part of the action's name. A training step has inner
# phases ("student", "teacher"), so only the rest of the step counts as "loss".
_ACTIONS = {
    "train_dataloader_next": "data",
    "batch_to_device": "data",
    "training_step": "loss",
    "backward": "backward",
    "optimizer_step": "optimizer",
    "save_checkpoint": "checkpoints",
}


class Actions(Profiler):
    """A Lightning profiler that counts the actions of the trainer on ``stopwatch``; callbacks count as ``other``."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.stopwatch = stopwatch

    def start(self, action_name: str) -> None:
        """Begin the phase of an action; asking for a batch also ends the start-up, or a probe pass without images."""
        last = action_name.rpartition(".")[2]
        if last == "train_dataloader_next" and self.stopwatch.current in (START, PROBES):
            self.stopwatch.leave()
        if name := self._phase(action_name):
            self.stopwatch.enter(name)
        elif last == "on_validation_model_zero_grad":
            # Lightning calls this hook before it opens the loaders of
            # a probe pass, so the opening counts as part of the pass.
            self.stopwatch.enter(PROBES)

    def stop(self, action_name: str) -> None:
        """End the phase of an action; the end of the strategy's on_validation_end ends a probe pass."""
        # Lightning announces the end of a pass to callbacks, the module and the strategy, in this order.
        ends_pass = action_name.startswith("[Strategy]") and action_name.endswith(".on_validation_end")
        if ends_pass or self._phase(action_name):
            self.stopwatch.leave()

    def _phase(self, action: str) -> str | None:
        return OTHER if action.startswith("[Callback]") else _ACTIONS.get(action.rpartition(".")[2])
