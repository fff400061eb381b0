"""Time left, in lines, where there is no terminal for a bar (a log file, a batch job)."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

FIRST = 3  # batches before the first estimate
EVERY = 20.0  # seconds between lines


class ProgressLines(L.Callback):
    """Prints how far training and each pass are, and the time left: after the first batches, then every 20 seconds."""

    def __init__(self, passes: dict[str, int]) -> None:
        self.passes = passes  # batches of the pass about to run, filled in by whoever starts it
        self.start = self.last = 0.0
        self.done = self.before = 0  # in this process, and before it

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start counting a pass; a probe stays silent."""
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
        self.done += 1
        now = time.monotonic()
        if trainer.is_global_zero and total and (self.done == FIRST or now - self.last > EVERY):
            self.last = now
            each = (now - self.start) / self.done
            done = self.before + self.done
            print(f"  {done}/{total} {unit}, {each:.2f} s each, {each * (total - done):.0f} s left", flush=True)
