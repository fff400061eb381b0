"""Files that can be made again: where they lie, and how they are written so that no reader sees half of one."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qatlab.errors import UserError


def cache_dir(*parts: str) -> Path:
    """Return the folder ``$QATLAB_CACHE/<parts>`` (default ``~/.cache/qatlab``), made if absent."""
    root = Path(os.environ.get("QATLAB_CACHE") or Path.home() / ".cache" / "qatlab")
    folder = root.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it at the end, on the disk itself, or is removed if the block raises.

    Raises UserError when the disk is full; what lay at ``path`` before is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        with full_disk_named(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Inside this context a full disk, or a reached quota or size limit, raises UserError that names ``path``."""
    try:
        yield
    except Exception as error:
        if not _means_full_disk(error):
            raise
        free = shutil.disk_usage(path.parent).free / 2**20
        raise UserError(
            f"{path} could not be written, the disk or quota is full ({free:.0f} MiB free): make room there. What was "
            "written before is whole, and the same command goes on from it."
        ) from error


def _means_full_disk(error: BaseException | None) -> bool:
    """Return whether ``error`` or what it came from is a failed write; safetensors, polars and torch keep no errno."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if (
            "No space left on device" in str(error)
            or "File too large" in str(error)
            or "file write failed" in str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
