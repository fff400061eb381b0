"""The rows of the probes, in the run's file and in its curves."""

from __future__ import annotations

from typing import Any

import lightning as L

from qatlab.core.errors import UserError
from qatlab.evaluation.evaluation import Evaluation
from qatlab.results.run import Run


class Results(L.Callback):
    """Asks every Evaluation for its rows at the end of a probe, completes and stores them, and hands them to the loggers.

    Of the probe before the first step nothing is stored: it begins the curves.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Raise UserError when the ranks were started with different options."""
        # Under srun or torchrun every rank has a command line of its own, and the command lines may differ.
        first = trainer.strategy.broadcast(self.run.id)
        if first != self.run.id:
            raise UserError(
                f"rank {trainer.global_rank} is run {self.run.id}, rank 0 is run {first}: start all with the same options."
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Collect, store and log the rows of the probe."""
        evaluations = [callback for callback in trainer.callbacks if isinstance(callback, Evaluation)]  # type: ignore[attr-defined]
        # Every rank computes, because the evaluations gather over
        # the ranks; the first rank alone writes the run's file.
        rows = [row for evaluation in evaluations for row in evaluation.compute()]
        for row in rows:
            row.update(pl_module.facts, step=pl_module.step, prompts=pl_module.heads[row["reference"]].classes.prompts)
        # With the number of images: the same set has other numbers on all of its images, at the end of the run.
        values: dict[str, float] = {}
        for row in rows:
            of = f"probe/{row['dataset']}@{row['n']}/{row['score']}"
            values |= {f"{of}/{name}": value for name, value in row["metrics"].items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=pl_module.step)
            logger.save()
        # Of a probe before the first step nothing is stored: it is for the curves alone. The rows are stored last, because
        # a probe with stored rows counts as done and would never log its curves again.
        if pl_module.step:
            self.run.append(rows)
