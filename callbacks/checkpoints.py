"""When a training checkpoint is written, and where training stops when it is told to."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import lightning as L

from qatlab.checkpoints import MADE_WITH
from qatlab.stopping import Stopped, StopSignals


class Checkpoints(L.Callback):
    """Writes ``folder``/step=<n>.ckpt every ``every`` steps, and raises Stopped between two steps where ``stop`` was told to.

    One lies before each probe too (``probe_every``), so that a probe that was cut short is all there is to repeat, and
    after the last step. A signal that reached any rank stops all of them after the same step, behind a checkpoint; inside
    a probe it stops at once. ``made_with`` is what the checkpoint says about its run.
    """

    def __init__(
        self, folder: Path, every: int, probe_every: int, stop: StopSignals, made_with: dict[str, Any]
    ) -> None:
        self.folder, self.every, self.probe_every, self.stop = folder, every, probe_every, stop
        self.made_with = made_with

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let steps finish from now on."""
        self.stop.deferred = True

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Write a checkpoint where one is due; raise Stopped on every rank after the step in which one was told to."""
        step = trainer.global_step
        stopping = trainer.strategy.reduce_boolean_decision(self.stop.received is not None, all=False)
        probe = self.probe_every and step % self.probe_every == 0
        if stopping or probe or step % self.every == 0 or step == trainer.max_steps:
            for logger in trainer.loggers:
                logger.save()  # the curves up to here: a killed process would take them along
            trainer.save_checkpoint(self.folder / f"step={step}.ckpt")
        if stopping:
            raise Stopped(self.stop.received or signal.SIGTERM)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint which run it belongs to."""
        checkpoint[MADE_WITH] = json.dumps(self.made_with)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let a signal end a probe at once: its checkpoint is there."""
        self.stop.deferred = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let steps finish again."""
        self.stop.deferred = trainer.state.fn == "fit"

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let a signal end the stages after training at once."""
        self.stop.deferred = False

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Let a signal end what follows at once."""
        self.stop.deferred = False
