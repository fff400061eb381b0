"""How much memory a training step keeps, how much is free, and how many images therefore go through at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

# Limit, use and given-back files in the two versions of control groups.
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
# What is left for what the estimate does not see: temporaries, fragmentation, the loader.
SHARE = 0.6


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Return the bytes of memory that ``forward()`` keeps for its backward, each storage once, ``parameters`` left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
        result = forward()  # held until here: freed storages would lend their address to others
    del result
    return sum(kept.values())


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a new process could still take on ``device``; on a CPU the control group's limit counts too."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([psutil.virtual_memory().available, *_control_group()])


def _control_group() -> list[int]:
    """Return what the process's control group leaves (Slurm and containers set one), nothing where there is no limit."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # no control groups
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version = {"": V2, "memory": V1}.get(controllers)
        if version is not None:
            top = root / controllers
            own = top / path.lstrip("/")
            found += [
                room for folder in (own, *own.parents) if folder.is_relative_to(top) for room in _room(folder, version)
            ]
    return found


def _room(folder: Path, names: tuple[str, str, str]) -> list[int]:
    """Return what the limit of one group leaves; files that the kernel only caches are given back when asked for."""
    try:
        limit, used, stat = ((folder / name).read_text() for name in (*names[:2], "memory.stat"))
    except OSError:  # the root group of version 2 has none
        return []
    cached = dict(line.split() for line in stat.splitlines()).get(names[2], 0)
    return [] if limit.strip() == "max" else [max(0, int(limit) - int(used) + int(cached))]


def largest_micro_batch(images: int, per_image: int, fixed: int, free: int) -> int:
    """Return how many of ``images`` go through at once: equal parts, as few as ``free`` bytes allow, at least one image.

    ``per_image`` are the bytes an image keeps for backward, ``fixed`` those the step needs anyway (gradients, moments).
    """
    room = max(0, int(free * SHARE) - fixed)
    most = max(1, min(images, room // max(1, per_image)))
    parts = -(-images // most)
    return -(-images // parts)
