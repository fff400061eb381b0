"""When a training checkpoint is written, and where training stops after a signal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch

from qatlab.core.errors import UserError
from qatlab.core.signals import Stopped, StopSignals
from qatlab.training.checkpoints import MADE_WITH


class Checkpoints(L.Callback):
    """Writes ``folder``/step=<n>.ckpt every ``every`` steps, and raises Stopped between two steps after a signal.

    A checkpoint is also written before each probe (``probe_every``), so that only the probe is repeated after a kill,
    and after the last step. A signal that reached any rank stops all ranks after the same step, with a checkpoint; a
    signal within a probe stops at once. ``made_with`` is what the checkpoint says about its run.
    """

    def __init__(
        self, folder: Path, every: int, probe_every: int, stop: StopSignals, made_with: dict[str, Any]
    ) -> None:
        self.folder, self.every, self.probe_every, self.stop = folder, every, probe_every, stop
        self.made_with = made_with
        self.stopping = 0  # the number of the signal that any rank has received, the same on all ranks

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let steps finish before a signal stops the run; UserError when the ranks go on from different checkpoints."""
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
        # A signal may reach one rank alone. If only that rank stopped, the others would wait for it in the next step.
        received = torch.tensor(self.stop.received or 0, device=trainer.strategy.root_device)
        self.stopping = int(trainer.strategy.reduce(received, reduce_op="max"))
        probe = self.probe_every and step % self.probe_every == 0
        if self.stopping or probe or step % self.every == 0 or step == trainer.max_steps:
            # Lightning logs a step only after this hook. Without this call the curves of a process that ends here would
            # lack the step, because the process that goes on from the checkpoint begins with the next one.
            trainer._logger_connector.update_train_step_metrics()
            # Curves are written first: a process that goes on from the checkpoint does not compute earlier steps again.
            self._save_curves(trainer)
            trainer.save_checkpoint(self.folder / f"step={step}.ckpt")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop before the next step, on every rank, after a signal; the curves of the last step are logged by now."""
        self._stop_if_told(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let a signal end a probe at once, because a checkpoint was written before the probe."""
        if trainer.state.fn == "fit":
            self._stop_if_told(trainer)
            self.stop.release()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let steps finish again before a signal ends training."""
        # trainer.validate repeats a probe before training: no step is under way then, and a signal may stop it at once.
        self.stop.deferred = trainer.state.fn == "fit"

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let a signal end the stages after training at once."""
        self._stop_if_told(trainer)
        self.stop.release()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Let a signal end at once whatever follows the exception."""
        self.stop.deferred = False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint which run it belongs to."""
        checkpoint[MADE_WITH] = json.dumps(self.made_with)

    def _stop_if_told(self, trainer: L.Trainer) -> None:
        """Raise Stopped where a rank has received a signal."""
        if self.stopping:
            self._save_curves(trainer)
            raise Stopped(self.stopping)

    def _save_curves(self, trainer: L.Trainer) -> None:
        """Write what the loggers hold in memory, because a killed process loses it."""
        for logger in trainer.loggers:
            logger.save()
