"""Training checkpoints on disk, each written whole or not at all, and the search for the last whole one."""

from __future__ import annotations

import errno
import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from qatlab.core.damage import DAMAGES, reason
from qatlab.core.errors import UserError
from qatlab.core.files import atomic

KEPT = 2  # checkpoints of a folder: if the last one is damaged, the one before is used
MADE_WITH = "qatlab"  # the key under which a checkpoint holds the options and the data of its run
HOLDS = "tensors"  # the key under which a checkpoint lists the names of all its tensors


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints under a temporary name first; UserError when the disk is full, with earlier ones untouched."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path`` and keep the last two of its folder."""
        path = Path(path)
        checkpoint[HOLDS] = list(_tensors(checkpoint))
        with atomic(path) as temporary, temporary.open("wb") as file:
            # torch gets an open file, because its error for a file
            # that it opens itself does not say why a write failed.
            torch.save(checkpoint, file)
        # Old checkpoints are deleted only now, when the new checkpoint is whole.
        for old in checkpoints(path.parent)[KEPT:]:
            old.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, the latest step first."""
    return sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]), reverse=True)


def last_whole(folder: Path) -> tuple[Path | None, dict[str, Any], dict[Path, str]]:
    """Return (path, content, damaged): the latest whole checkpoint of ``folder``, and later ones with their damage.

    Without a whole checkpoint the result is (None, {}, damaged). Raises UserError for a file that exists and cannot be
    read now, because it may be whole.
    """
    damaged: dict[Path, str] = {}
    for path in checkpoints(folder):
        try:
            # Every byte is checked here, so that the trainer meets no damage later.
            _require_checksums(path)
            return path, torch.load(path, map_location="cpu", weights_only=True), damaged
        except DAMAGES as error:
            damaged[path] = reason(error)
        except OSError as error:
            # A damaged directory of a zip file can point before the file's start, where seeking fails with EINVAL.
            # Every other error comes from the disk.
            if error.errno != errno.EINVAL:
                raise UserError(
                    f"{path} cannot be read ({error.strerror}): try again when the disk answers."
                ) from error
            damaged[path] = str(error)
    return None, {}, damaged


def _require_checksums(path: Path) -> None:
    """Raise BadZipFile when a record's bits differ from those that were written."""
    # torch writes checksums, but does not check them when it loads.
    with zipfile.ZipFile(path) as archive:
        if (record := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {record} is wrong")


def require_tensors(path: Path, content: dict[str, Any], needed: Iterable[str]) -> None:
    """Raise UserError naming a tensor that the checkpoint lacks, although it lists the tensor or its run needs it."""
    # A file may have right checksums and still lack tensors, if another program has read it and written it again.
    told = {*content.get(HOLDS, ()), *(f"state_dict.{name}" for name in needed)}
    if missing := sorted(told - set(_tensors(content))):
        raise UserError(
            f"{path} lacks {len(missing)} of {len(told)} tensors that training goes on from, the first is {missing[0]}: it was "
            "changed after it was written; delete it, and the one before it, or the start, is taken."
        )


def _tensors(content: Any, name: str = "") -> Iterator[str]:
    """Yield the names of all tensors in nested mappings and lists, such as "optimizer_states.0.state.3.exp_avg"."""
    if isinstance(content, Tensor):
        yield name
    elif isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def require_same(path: Path, content: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError when the checkpoint was made with other options or data than ``now``, naming the differences."""
    # Both sides are compared as JSON gives them back, because JSON turns tuples into lists.
    then, now = json.loads(content.get(MADE_WITH, "{}")), json.loads(json.dumps(now))
    differing = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
    if differing:
        listed = ", ".join(f"{key} {then.get(key)} there and {now.get(key)} now" for key in differing[:5])
        raise UserError(
            f"{path} belongs to another run: {listed}{' ...' if len(differing) > 5 else ''}. Give the old options again to "
            "go on with it, another output= for a run of its own, or force=true to move the old folder aside."
        )
