"""The memory that a training step keeps, the memory that is free, and the number of images that fit at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

# For each version of control groups: the file with the limit, the file
# with the use, and the line of memory.stat that counts cached files.
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
# The share of the free memory that is planned with. The rest is for
# what the estimate leaves out: temporaries, fragmentation, the loader.
SHARE = 0.6


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Return the bytes of memory that ``forward()`` keeps for its backward, ``parameters`` (of any shape) left out."""
    # Storages are counted, not tensors, because several views of one storage take its memory once.
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        """Note the storage of a tensor (of any shape) that is saved, and return the tensor as it is."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
        # The result must live until all is counted, because a freed storage could give its address to another one.
        result = forward()
    del result
    return sum(kept.values())


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a new process could still take on ``device``; a CPU has the control group's limit too."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that torch has reserved but not given out is free
        # for this process, although the driver counts it as used.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([psutil.virtual_memory().available, *_control_group()])


def _control_group() -> list[int]:
    """Return the bytes left by the process's control groups (of Slurm or a container), [] where there is no limit."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # this system has no control groups
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # Version 2 has one hierarchy, whose list of controllers is
        # empty; in version 1 memory has a hierarchy of its own.
        version = {"": V2, "memory": V1}.get(controllers)
        if version is None:
            continue
        top = root / controllers
        group = top / path.lstrip("/")
        # The limit of every parent group holds too.
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                found += _room(folder, version)
    return found


def _room(folder: Path, names: tuple[str, str, str]) -> list[int]:
    """Return the bytes that the limit of one group leaves, in a list that is empty where there is no limit."""
    try:
        limit, used, stat = ((folder / name).read_text() for name in (*names[:2], "memory.stat"))
    except OSError:  # the root group of version 2 has no such files
        return []
    # Files that the kernel only caches count as used, but their memory is given back on demand.
    cached = dict(line.split() for line in stat.splitlines()).get(names[2], 0)
    return [] if limit.strip() == "max" else [max(0, int(limit) - int(used) + int(cached))]


def largest_micro_batch(images: int, per_image: int, fixed: int, free: int) -> int:
    """Return how many of ``images`` are computed at once: equal parts, as few as ``free`` bytes allow.

    ``per_image`` are the bytes an image keeps for backward, ``fixed`` those the step needs anyway (gradients, moments).
    The result is at least 1.
    """
    room = max(0, int(free * SHARE) - fixed)
    most = max(1, min(images, room // max(1, per_image)))
    # -(-a // b) is a / b rounded up. The parts get equal sizes, because a small last part would not save a pass.
    parts = -(-images // most)
    return -(-images // parts)
