"""The group of processes that compute a run, and the trainer that starts them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from qatlab.config import TrainerConfig
from qatlab.core.errors import UserError
from qatlab.stages.faults import Faults

T = TypeVar("T")


class Processes:
    """The processes of a run, with the ``trainer`` that starts them; no model belongs to this object.

    Runs that are scored together share one object, because a command can start only one group of processes.
    ``progress`` holds the number of batches of the current pass, for the lines that replace a progress bar outside of a
    terminal.
    """

    def __init__(self, trainer: L.Trainer, asked: TrainerConfig, faults: Faults, progress: dict[str, int]) -> None:
        self.trainer, self.progress = trainer, progress
        self._asked, self._faults = asked, faults

    @property
    def device(self) -> torch.device:
        """Return the device that this process computes on."""
        return self.trainer.strategy.root_device

    @property
    def first(self) -> bool:
        """Return whether this is the first process, which alone writes and prints."""
        return self.trainer.is_global_zero

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make the processes one group that ends together; faults of the machine inside this context become UserErrors."""
        try:
            with self._faults.named(self.trainer):
                self._meet()
                yield
        except BaseException:
            # The other processes are killed. Otherwise they would wait for this one in a collective call until a
            # timeout, and the message of the timeout would hide what went wrong here.
            if isinstance(launcher := self.trainer.strategy.launcher, _SubprocessScriptLauncher):
                launcher.kill(signal.SIGKILL)
            raise

    def _meet(self) -> None:
        """Start the other processes and form the group.

        This comes before anything is looked up that another run may be changing at the same time. Afterwards the first
        process can look it up and tell the others, so that all processes see the same.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, DDPStrategy):  # one process
            return
        assert strategy.launcher is not None
        try:
            strategy.launcher.launch(strategy.setup_environment)
        except ValueError as error:
            raise UserError(
                f"trainer.devices={self._asked.devices} with trainer.num_nodes={self._asked.num_nodes} is not what this job "
                f"has: {str(error).splitlines()[0]}"
            ) from error

    def require_same(self, definitions: Mapping[str, str], root: str | None) -> None:
        """Raise UserError on every process where one process has other images than the first.

        ``definitions`` {set: definition} are those of this process, ``root`` is the folder of the sets.
        """
        if not torch.distributed.is_initialized():
            return
        # Every process compares all definitions, so that all raise together. A process that went on would wait for ever
        # for those that have ended.
        of_ranks: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(of_ranks, dict(definitions))
        first = of_ranks[0]
        for rank, theirs in enumerate(of_ranks):
            if differing := [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]:
                raise UserError(
                    f"suite.sets.{differing[0]} is not the same for process {rank} as for the first: the files below "
                    f"suite.root={root}, and the options, have to be the same on every machine."
                )

    def agree(self, make: Callable[[], T]) -> T:
        """Return, on every process, the object that ``make()`` gives on the first process."""
        if not torch.distributed.is_initialized():  # one process
            return make()
        made: Any = self.trainer.strategy.broadcast(make() if self.first else None)
        return made  # type: ignore[no-any-return]

    def say(self, line: str) -> None:
        """Print ``line`` on the first process."""
        if self.first:
            print(line, flush=True)
