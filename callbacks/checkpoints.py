"""When a training checkpoint is written, and where training stops when it is told to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch

from qatlab.checkpoints import MADE_WITH
from qatlab.errors import UserError
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
        self.stopping = 0  # the signal that a rank got, on all of them

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let steps finish from now on; UserError when the ranks go on from different checkpoints."""
        first = trainer.strategy.broadcast(trainer.global_step)
        if first != trainer.global_step:
            raise UserError(
                f"rank {trainer.global_rank} goes on from step {trainer.global_step} and rank 0 from step {first}: do all "
                f"nodes see the same {self.folder}?"
            )
        self.stopping = 0
        self.stop.deferred = True

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Write a checkpoint where one is due, or where a signal has reached any of the ranks."""
        step = trainer.global_step
        received = torch.tensor(self.stop.received or 0, device=trainer.strategy.root_device)
        self.stopping = int(trainer.strategy.reduce(received, reduce_op="max"))
        probe = self.probe_every and step % self.probe_every == 0
        if self.stopping or probe or step % self.every == 0 or step == trainer.max_steps:
            self._save_curves(trainer)
            trainer.save_checkpoint(self.folder / f"step={step}.ckpt")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop before the next step, on every rank, when the last one was to be the last: its curves are logged by now."""
        self._stop_if_told(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let a signal end a probe at once: its checkpoint is there."""
        if trainer.state.fn == "fit":
            self._stop_if_told(trainer)
            self.stop.release()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let steps finish again."""
        self.stop.deferred = trainer.state.fn == "fit"

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let a signal end the stages after training at once."""
        self._stop_if_told(trainer)
        self.stop.release()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Let a signal end what follows at once."""
        self.stop.deferred = False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint which run it belongs to."""
        checkpoint[MADE_WITH] = json.dumps(self.made_with)

    def _stop_if_told(self, trainer: L.Trainer) -> None:
        if self.stopping:
            self._save_curves(trainer)
            raise Stopped(self.stopping)

    def _save_curves(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()  # a killed process would take along what it holds
