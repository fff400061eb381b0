"""What can go wrong with a machine in the middle of work, as sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch

from qatlab.config import Config
from qatlab.errors import UserError

GOES_ON = "The same command goes on from the last checkpoint or finished stage."


@contextmanager
def faults_named(config: Config, trainer: L.Trainer) -> Iterator[None]:
    """Inside this context memory that ran out and loader processes that were killed raise UserError with the remedy."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
            raise UserError(_out_of_memory(config, trainer)) from error
        if "DataLoader worker" in text:
            raise UserError(
                f"a data-loading process ended unexpectedly ({text.splitlines()[0].rstrip('.')}): the system kills one when "
                f"memory runs out. Lower fit.workers={config.fit.workers}. {GOES_ON}"
            ) from error
        raise


def _out_of_memory(config: Config, trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    training = trainer.state.fn == "fit" and not trainer.validating
    if training:
        at_once: Any = trainer.lightning_module.micro_batch
        remedy = f"fit.micro_batch={max(1, (at_once or config.fit.batch_size) // 2)} (now {at_once}): the loss stays the same"
    else:
        remedy = f"suite.batch_size={max(1, config.suite.batch_size // 2)} (now {config.suite.batch_size})"
    where = f"{device} ran out of memory" + (f" at step {trainer.global_step}" if training else " while scoring")
    return f"{where}; set {remedy}. {GOES_ON}"
