"""The number of this process within its run, and how many processes share the batch; torch is not imported for that."""

from __future__ import annotations

import os
import sys
from typing import Any

# Variables by which torchrun, Lightning and srun number the processes that they start, before a process group exists.
_STARTED_AS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def rank() -> int:
    """Return the number of this process: its rank in the process group, else the number from its launcher, else 0."""
    if (group := _group()) is not None:
        return int(group.get_rank())
    return next((int(os.environ[name]) for name in _STARTED_AS if name in os.environ), 0)


def is_first() -> bool:
    """Return whether this process is the one that writes and prints: the first of its group, or a single process."""
    return rank() == 0


def world_size() -> int:
    """Return how many processes share the global batch: those of the process group, 1 without one."""
    group = _group()
    return 1 if group is None else int(group.get_world_size())


def _group() -> Any:
    """Return torch.distributed where it holds a process group, else None; without torch there can be no group."""
    # The module is looked up, not imported: importing torch would
    # cost commands that only plan or print several seconds.
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed
