"""Training checkpoints on disk: written whole or not at all, and the last whole one found again."""

from __future__ import annotations

import errno
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from qatlab.cache import atomic
from qatlab.errors import UserError

KEPT = 2  # the last one, and the one before it should that be damaged
MADE_WITH = "qatlab"  # the key of what a checkpoint says about the run it belongs to

# What is raised on a file that is cut off, empty, or has other bits than were written.
DAMAGES = (zipfile.BadZipFile, EOFError, ValueError, pickle.UnpicklingError)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints under a temporary name first; UserError when the disk is full, the ones before it untouched."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path`` and keep the last two of its folder."""
        path = Path(path)
        with atomic(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)  # by itself torch forgets why a write failed
        for old in checkpoints(path.parent)[KEPT:]:
            old.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, the latest step first."""
    return sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]), reverse=True)


def last_whole(folder: Path) -> tuple[Path | None, dict[str, Any], dict[Path, str]]:
    """Return the latest whole checkpoint of ``folder`` with its content, and the damaged ones after it with the reason.

    (None, {}, damaged) where there is none. Every byte is read, so that the trainer meets no damage later. Raises UserError
    for a file that is there and cannot be read now: it may be whole.
    """
    damaged: dict[Path, str] = {}
    for path in checkpoints(folder):
        try:
            _require_checksums(path)
            return path, torch.load(path, map_location="cpu", weights_only=True), damaged
        except DAMAGES as error:
            damaged[path] = str(error).splitlines()[0] if str(error) else type(error).__name__
        except OSError as error:
            if error.errno != errno.EINVAL:  # what zipfile meets where a damaged directory points
                raise UserError(
                    f"{path} cannot be read ({error.strerror}): try again when the disk answers."
                ) from error
            damaged[path] = str(error)
    return None, {}, damaged


def _require_checksums(path: Path) -> None:
    """Raise BadZipFile when a record has other bits than were written: torch stores checksums and does not look at them."""
    with zipfile.ZipFile(path) as archive:
        if (record := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {record} is wrong")


def require_same(path: Path, content: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError when the checkpoint was made with other options or data than ``now``, naming the differences."""
    then, now = json.loads(content.get(MADE_WITH, "{}")), json.loads(json.dumps(now))  # as JSON, tuples are lists
    differing = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
    if differing:
        listed = ", ".join(f"{key} {then.get(key)} there and {now.get(key)} now" for key in differing[:5])
        raise UserError(
            f"{path} belongs to another run: {listed}{' ...' if len(differing) > 5 else ''}. Give the old options again to "
            "go on with it, another output= for a run of its own, or force=true to move the old folder aside."
        )
