"""The rows of the probes, in the run's file and as curves."""

from __future__ import annotations

from typing import Any

import lightning as L

from qatlab.errors import UserError
from qatlab.evaluation import Evaluation
from qatlab.results import Run


class Results(L.Callback):
    """Asks every Evaluation for its rows at the end of a probe, completes and stores them, and hands them to the loggers."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Raise UserError when the ranks were started with different options."""
        first = trainer.strategy.broadcast(self.run.id)
        if first != self.run.id:
            raise UserError(
                f"rank {trainer.global_rank} is run {self.run.id}, rank 0 is run {first}: start all with the same options."
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Collect, store and log the rows of the probe."""
        evaluations = [callback for callback in trainer.callbacks if isinstance(callback, Evaluation)]  # type: ignore[attr-defined]
        rows = [row for evaluation in evaluations for row in evaluation.compute()]
        for row in rows:
            row.update(pl_module.facts, step=pl_module.step, prompts=pl_module.heads[row["reference"]].classes.prompts)
        self.run.append(rows)
        values = {f"probe/{r['dataset']}/{r['score']}/{name}": v for r in rows for name, v in r["metrics"].items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=pl_module.step)
