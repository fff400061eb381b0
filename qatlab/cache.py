"""Files that can be made again: where they lie, and how they are written so that no reader sees half of one."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qatlab.errors import UserError


def cache_dir(*parts: str) -> Path:
    """Return the folder ``$QATLAB_CACHE/<parts>`` (default ``~/.cache/qatlab``), made if absent."""
    root = Path(os.environ.get("QATLAB_CACHE") or Path.home() / ".cache" / "qatlab")
    folder = root.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(text: str) -> str:
    """Return the 32 hex digits under which caches file what belongs to ``text``."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


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


def once(path: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` make the file ``path`` unless it is there; of several processes one does, the others wait.

    ``write`` is given a temporary path, so that no reader sees half a file; what a killed process left of one is
    removed. Raises UserError when the folder cannot be written to.
    """
    if path.exists():
        return
    with locked(path.name) as alone:
        if path.exists():
            return
        for rest in path.parent.glob(f".{path.name}.*") if alone else ():
            rest.unlink(missing_ok=True)
        try:
            with atomic(path) as temporary:
                write(temporary)
        except OSError as error:
            raise unwritable(path.parent, error) from error


@contextmanager
def locked(name: str) -> Iterator[bool]:
    """Hold one of 256 locks of this machine, chosen by ``name``.

    Yields False on a file system without locks, where several processes may then do the same work.
    """
    with (cache_dir("locks") / digest(name)[:2]).open("a") as file:
        yield lock(file, wait=True) is True


def lock(file: IO[Any], wait: bool, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Lock an open file until it is closed, by the kernel too when its holder dies.

    Returns True, or False where another process has it and this one does not ``wait``, or None on a file system without
    locks.
    """
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_locked(path: Path) -> bool:
    """Return whether a process has locked a file; one that tries to meanwhile may be refused."""
    try:
        with path.open() as file:
            return lock(file, wait=False, kind=fcntl.LOCK_SH) is False
    except OSError:  # no such file
        return False


def unwritable(folder: Path, error: OSError, remedy: str = "") -> UserError:
    """Return the UserError for a cache folder that cannot be written to, with the free space and what can be done."""
    free = shutil.disk_usage(folder).free / 2**20
    return UserError(
        f"{folder} cannot be written to ({error.strerror or error}; {free:.0f} MiB are free on its disk): make room or "
        f"point QATLAB_CACHE at another disk{remedy}."
    )


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
