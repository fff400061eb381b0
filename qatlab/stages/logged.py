"""What loggers are given besides curves: the options of a run, and at its end its numbers, table and pictures."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.loggers import Logger

from qatlab.reports.numbers import table_numbers
from qatlab.reports.table import table_lines
from qatlab.results.rowfile import Row
from qatlab.stages.experiment import Experiment
from qatlab.stages.loggers import Curves, TensorBoard, Wandb, options_of


def tell_options(experiment: Experiment) -> None:
    """Give the options of a run to its loggers, once; W&B and TensorBoard were given them when they were made."""
    if not experiment.options_told:
        for logger in _loggers(experiment):
            if not isinstance(logger, (Wandb, TensorBoard)):
                logger.log_hyperparams(options_of(experiment.run, experiment.recipe))
    experiment.options_told = True


def tell_results(experiment: Experiment, rows: Sequence[Row]) -> None:
    """Give the numbers of a finished run to its loggers; W&B and TensorBoard are also given its table and pictures."""
    loggers = _loggers(experiment)
    if not loggers:
        return
    tell_options(experiment)
    numbers, step = table_numbers(rows), experiment.config.fit.steps
    columns, lines = table_lines(rows)
    # The title of a column has a line break for the terminal, which loggers do not need.
    table = [["set", "metric", *(column.replace("\n", " ") for column in columns)]]
    for line in lines:
        table.append([line.dataset, line.label, *(cell.text for cell in line.cells)])
    pictures = sorted(experiment.run.folder.glob("*.png"))
    for logger in loggers:
        if isinstance(logger, (Wandb, TensorBoard)):
            logger.log_results(numbers, table, pictures, step)
        else:
            logger.log_metrics(numbers, step)
        logger.save()
        logger.finalize("success")


def _loggers(experiment: Experiment) -> list[Logger]:
    """Return the loggers of a run except the CSV logger, which holds only curves."""
    return [logger for logger in experiment.processes.trainer.loggers if not isinstance(logger, Curves)]
