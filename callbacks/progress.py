"""Lines with the progress and the time left, where there is no terminal for a bar (a log file, a batch job)."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

FIRST = 3  # batches before the first estimate, because the first batch is slow
EVERY = 20.0  # seconds between lines, so that a job of a day writes some thousand lines and no more


class ProgressLines(L.Callback):
    """Prints how far training and each pass are, and the time left: after the first batches, then every 20 seconds."""

    def __init__(self, passes: dict[str, int]) -> None:
        self.passes = passes  # {"batches": the length of the pass that is about to run}, set by whoever starts the pass
        self.start = self.last = 0.0
        self.done = self.before = 0  # done: batches or steps of this process; before: steps of earlier processes

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start counting the batches of a pass; a probe, which Lightning calls validation, stays silent."""
        self._begin()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start counting steps, from where a resumed run stands."""
        self._begin()
        self.before = trainer.global_step

    def on_predict_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Count one batch of a pass."""
        self._tick(trainer, "batches", self.passes.get("batches", 0))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Count one step."""
        self._tick(trainer, "steps", trainer.max_steps)

    def _begin(self) -> None:
        self.start = self.last = time.monotonic()
        self.done = self.before = 0

    def _tick(self, trainer: L.Trainer, unit: str, total: int) -> None:
        """Count one of ``total``; print a line on the first process where one is due."""
        self.done += 1
        now = time.monotonic()
        if trainer.is_global_zero and total and (self.done == FIRST or now - self.last > EVERY):
            self.last = now
            # Only the time of this process counts, because earlier processes may have run on another machine.
            each = (now - self.start) / self.done
            done = self.before + self.done
            print(f"  {done}/{total} {unit}, {each:.2f} s each, {each * (total - done):.0f} s left", flush=True)
