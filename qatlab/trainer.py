"""The one Lightning trainer of a run: it embeds suites and trains, with the run's callbacks and loggers."""

from __future__ import annotations

import logging
import sys
import warnings

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar

from qatlab.callbacks import ProgressLines, Results
from qatlab.checkpoints import AtomicCheckpointIO
from qatlab.config import Config
from qatlab.data.module import check_batch
from qatlab.errors import UserError
from qatlab.loggers import build_loggers
from qatlab.results import Run


def build_trainer(
    config: Config, run: Run, recipe: str, callbacks: list[L.Callback], progress: dict[str, int]
) -> L.Trainer:
    """Return the trainer; ``progress`` is told the batches of each pass, for lines where there is no terminal for a bar.

    ``callbacks`` come before those that every run has. Raises UserError for trainer options that this machine cannot meet,
    and for a global batch that its devices cannot share.
    """
    fit, where = config.fit, config.trainer
    if fit.steps:
        check_batch(fit.batch_size, where.devices * where.num_nodes)  # here already, before anything is scored
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
            check_val_every_n_epoch=None,
            gradient_clip_val=fit.grad_clip,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=build_loggers(config, run, recipe),
            callbacks=[
                *callbacks,
                Results(run),
                RichProgressBar(leave=True) if terminal else ProgressLines(progress),
            ],
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=False,  # qatlab.callbacks.Checkpoints knows about probes and signals
            enable_progress_bar=terminal,
            enable_model_summary=False,
            use_distributed_sampler=False,  # the loaders already divide the images: no image twice
            inference_mode=False,  # folded weights outlive a pass
            default_root_dir=run.folder,
        )
    except (MisconfigurationException, ValueError) as error:
        asked = ", ".join(f"trainer.{name}={value}" for name, value in vars(where).items())
        raise UserError(f"{asked} cannot be met here: {str(error).split(chr(10))[0].strip()}") from error
    # Lightning's own handler of SIGTERM starts a collective from wherever the signal struck; qatlab.stopping has the signals.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _accelerator(asked: str) -> str:
    """Return what ``auto`` stands for: CUDA, else the CPU; Apple's GPUs have no float64, which the scores are computed in."""
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def quiet() -> None:
    """Silence what libraries say on every start and no user of qatlab can act on."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", message=".*lightning.*")
