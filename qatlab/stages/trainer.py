"""The Lightning trainer of a run: the same trainer embeds suites and trains, with the run's callbacks and loggers."""

from __future__ import annotations

import logging
import sys
import warnings

import lightning as L
import torch
from lightning.fabric.connector import _convert_precision_to_unified_args
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar

from qatlab.callbacks import ProgressLines, Results
from qatlab.config import Config
from qatlab.core.errors import UserError
from qatlab.data.captions.batches import check_batch
from qatlab.results.run import Run
from qatlab.stages.loggers import build_loggers
from qatlab.training.checkpoints import AtomicCheckpointIO


def build_trainer(
    config: Config, run: Run, recipe: str, callbacks: list[L.Callback], progress: dict[str, int]
) -> L.Trainer:
    """Return the trainer of a run.

    ``callbacks`` are placed before the callbacks that every run has. ``progress`` will hold the number of batches of a
    pass, for the lines that replace a progress bar outside of a terminal. Raises UserError for trainer options that
    this machine cannot meet, and for a global batch that cannot be divided among its devices.
    """
    fit, where = config.fit, config.trainer
    if fit.steps:
        check_batch(fit.batch_size, where.devices * where.num_nodes)  # found here, not after hours of scoring
    terminal = sys.stdout.isatty()
    try:
        trainer = L.Trainer(
            accelerator=_accelerator(where.accelerator),
            devices=where.devices,
            num_nodes=where.num_nodes,
            precision=where.precision,  # type: ignore[arg-type]
            strategy=where.strategy,
            max_steps=fit.steps,
            val_check_interval=fit.eval_every or None,
            check_val_every_n_epoch=None,  # val_check_interval then counts steps across epochs
            gradient_clip_val=fit.grad_clip,
            num_sanity_val_steps=0,  # Lightning's check of validation before training would store rows
            log_every_n_steps=1,
            logger=build_loggers(config, run, recipe),
            callbacks=[
                *callbacks,
                Results(run),
                RichProgressBar(leave=True) if terminal else ProgressLines(progress),
            ],
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=False,  # qatlab.callbacks.Checkpoints writes checkpoints, with regard to probes and signals
            enable_progress_bar=terminal,
            enable_model_summary=False,
            use_distributed_sampler=False,  # Lightning's sampler repeats images to fill shares; qatlab's loaders do not
            inference_mode=False,  # folded weights are used again in training, which refuses inference tensors
            default_root_dir=run.folder,
        )
    except (MisconfigurationException, ValueError) as error:
        asked = ", ".join(f"trainer.{name}={value}" for name, value in vars(where).items())
        raise UserError(f"{asked} cannot be met here: {str(error).split(chr(10))[0].strip()}") from error
    _require_precision(trainer, where.precision)
    # Lightning's handler of SIGTERM starts a collective call at once, also where the other processes do not take part.
    # It is switched off, and qatlab.core.signals handles the signals.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _require_precision(trainer: L.Trainer, asked: str) -> None:
    """Raise UserError where Lightning computes in another precision than the option says, for example 16-mixed on a CPU.

    Lightning only warns and goes on. The id and the rows of the run would then name a precision that was not used.
    """
    device = trainer.strategy.root_device.type
    if trainer.precision != _convert_precision_to_unified_args(asked):  # type: ignore[arg-type]
        raise UserError(
            f"trainer.precision={asked} is not what a {device.upper()} computes in: Lightning takes {trainer.precision} there. "
            f"Set trainer.precision={trainer.precision}, or give another trainer.accelerator."
        )


def _accelerator(asked: str) -> str:
    """Return the accelerator: for ``auto`` CUDA if there is any, else the CPU.

    Apple's GPUs are never chosen, because they have no float64, in which the scores are computed.
    """
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def quiet() -> None:
    """Silence messages that libraries print on every start and that no user of qatlab can act on."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", message=".*lightning.*")
