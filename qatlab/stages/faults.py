"""Faults of the machine in the middle of work, told as UserErrors with a remedy."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning as L
import torch

from qatlab.config import Config
from qatlab.core.errors import UserError

GOES_ON = "The same command goes on from the last checkpoint or finished stage."


class Faults(L.Callback):
    """Turns errors for lack of memory, and for killed loader processes or ranks, into a UserError with the remedy."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.training = False

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Store whether the error came in training: later, in ``named``, the trainer does not know this any more."""
        self.training = trainer.training

    @contextmanager
    def named(self, trainer: L.Trainer) -> Iterator[None]:
        """Turn a fault of the machine inside this context into a UserError."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError, ConnectionError, EOFError) as error:
            # torch raises a plain RuntimeError for most of these faults, which differ only in their text.
            text = str(error)
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
                raise UserError(self._out_of_memory(trainer)) from error
            cut_off = _is_cut_off(error)
            if cut_off:
                # The connection is closed a moment before the system tells this process of the end, by a signal whose
                # handler raises torch's "DataLoader worker ..." in whatever line runs then. It is waited for, because
                # nothing may be raised in the lines that end the run.
                with suppress(RuntimeError):
                    time.sleep(1)
            if cut_off or "DataLoader worker" in text:
                reason = text.splitlines()[0].rstrip(". ") if text else "its connection was closed"
                raise UserError(
                    f"a data-loading process ended unexpectedly ({reason}): the system kills one when memory runs out. "
                    f"Lower fit.workers={self.config.fit.workers}. {GOES_ON}"
                ) from error
            if isinstance(error, torch.distributed.DistError) or "gloo/transport" in text:
                # The text is "[pair.cc:534] Connection closed by peer. ...": the place in the C++ code is cut off.
                reason = re.sub(r"^\[\S+\] ", "", text).split(". ")[0].splitlines()[0]
                raise UserError(
                    f"another process of this run has ended or cannot be reached ({reason}): what it said itself, and the "
                    f"system's log, tell why. {GOES_ON}"
                ) from error
            raise

    def _out_of_memory(self, trainer: L.Trainer) -> str:
        """Return the sentence on memory that ran out; its remedy is half the batch size."""
        option, now, where = "suite.batch_size", self.config.suite.batch_size, "while scoring"
        if self.training:
            # The gradients of micro-batches add up to the gradient of the batch: a smaller one costs only time.
            module: Any = trainer.lightning_module
            option, where = "fit.micro_batch", f"at step {trainer.global_step}"
            now = module.micro_batch or self.config.fit.batch_size
        remedy = f"set {option}={now // 2} (it was {now}), which changes no result"
        if now == 1:
            remedy = "not even one image at a time fits, so take a smaller model or a larger device"
        return f"{trainer.strategy.root_device} ran out of memory {where}: {remedy}. {GOES_ON}"


def _is_cut_off(error: BaseException) -> bool:
    """Return whether the error is a connection that a data-loading process closed, by ending while it sent a batch."""
    # An error inside a data-loading process, as of a file on a network, is raised again in another function.
    functions = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, (ConnectionError, EOFError)) and "_try_get_data" in functions
