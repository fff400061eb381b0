"""Files that can be made again: where they lie, and how they are written so that no reader sees half of one."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO, Any

from qatlab.core.errors import UserError
from qatlab.core.hashing import digest

# Error numbers for a disk, rights or a name that do not allow a file. A user can mend the cause, but no code can.
REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.EIO, errno.ESTALE, errno.ELOOP, errno.ENOLINK),
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


FEATURES = "features-2"
"""The cache's folder of image features. The folder "features" of earlier releases knew images by name and size."""


def expanded(text: str) -> str:
    """Return a text with the ~ or ~name that it begins with replaced by that home folder; as it is where there is none."""
    # The only place where ~ is expanded: shells do so at the beginning of a word alone, and not in output=~/runs.
    return os.path.expanduser(text)


def user_path(written: str | Path) -> Path:
    """Return the path that a user wrote, ~ understood; raises UserError where nobody has the home that it begins with."""
    path = Path(expanded(str(written)))
    if path.parts[:1] and path.parts[0].startswith("~"):
        raise UserError(f"{written}: {path.parts[0]} is nobody's home here; write the path out, from / on.")
    return path


def cache_dir(*parts: str) -> Path:
    """Return the folder ``$QATLAB_CACHE/<parts>`` (default ``~/.cache/qatlab``), made if absent.

    A new folder gets the rights of the cache's root, so that a cache that several users share stays shared. Raises
    UserError when the folder cannot be made.
    """
    root = cache_root()
    folder = root.joinpath(*parts)
    if not os.path.isdir(folder):  # Path.is_dir raises OSError for a name that is too long, os.path.isdir does not
        try:
            root.mkdir(parents=True, exist_ok=True)
            for made in (*reversed(folder.relative_to(root).parents), folder.relative_to(root)):
                _make_like(root / made, root)
        except OSError as error:
            raise unwritable(folder, error) from error
    return folder


def cache_root() -> Path:
    """Return the folder of the cache; raises UserError when neither QATLAB_CACHE nor a home folder is known."""
    if given := os.environ.get("QATLAB_CACHE"):
        return user_path(given)
    try:
        return Path.home() / ".cache" / "qatlab"
    except RuntimeError as error:
        raise UserError(
            "this user has no home folder (HOME is not set): say where the cache may lie, QATLAB_CACHE=FOLDER."
        ) from error


def _make_like(folder: Path, root: Path) -> None:
    """Make ``folder`` with the rights of ``root``, whatever the umask is."""
    try:
        folder.mkdir()
    except FileExistsError:
        if folder.is_dir():
            return
        raise
    with suppress(PermissionError):  # some network and FAT disks refuse to change rights
        folder.chmod(stat.S_IMODE(root.stat().st_mode))


@contextmanager
def atomic(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which replaces ``path`` after the block, or is removed after an error.

    The new file is flushed to the disk and has the rights ``mode``. Raises UserError when the disk is full or refuses
    the file; an earlier file at ``path`` is then untouched.
    """
    with full_disk_named(path), refusal_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
    temporary = Path(name)
    try:
        with full_disk_named(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            with refusal_named(path):
                os.chmod(temporary, mode)
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, data: bytes) -> None:
    """Add ``data`` at the end of the file ``path``, made if absent, and flush it; an error leaves none of ``data``.

    A process that is killed meanwhile may leave a part of ``data``, so each line needs a checksum. Raises UserError
    when the disk is full or refuses the file.
    """
    with full_disk_named(path), refusal_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("ab") as file:
            if new:
                os.fchmod(file.fileno(), 0o644)
            size = file.tell()
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                os.truncate(path, size)
                raise


def once(path: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` make the file ``path`` unless it exists; of several processes one writes, and the others wait.

    ``write`` is given a temporary path, so that no reader sees half a file; temporary files of killed processes are
    removed. Raises UserError when the folder cannot be written to.
    """
    if path.exists():
        return
    with locked(path.name) as alone:
        if path.exists():
            return
        try:
            for rest in path.parent.glob(f".{escape(path.name)}.*") if alone else ():
                rest.unlink(missing_ok=True)
            with atomic(path) as temporary:
                write(temporary)
        except OSError as error:
            raise unwritable(path.parent, error) from error


@contextmanager
def locked(name: str) -> Iterator[bool]:
    """Hold one of 256 locks of this machine, chosen by ``name``.

    Yields False on a file system without locks, where several processes may then do the same work.
    """
    with cache_lock(digest(name)[:2]) as file:
        yield lock(file, wait=True) is True


@contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder`` itself, which needs no file, among the threads and processes that ask for it."""
    number = os.open(folder, os.O_RDONLY)
    try:
        lock(number, wait=True)
        yield
    finally:
        os.close(number)


def cache_lock(name: str, *folder: str) -> IO[str]:
    """Return a file of the cache open to be locked; raises UserError where it can be neither made nor read."""
    path = cache_dir("locks", *folder) / name
    try:
        return open_lock(path)
    except OSError as error:
        raise unwritable(path, error) from error


def open_lock(path: Path) -> IO[str]:
    """Return the file ``path``, made if absent, open to be locked by any user, whoever made it.

    To lock a file the right to read it is enough, except on some network disks.
    """
    with suppress(FileNotFoundError):
        return _open_existing(path)
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:  # another process has made the file meanwhile
        return _open_existing(path)
    os.fchmod(number, 0o666)  # whatever the umask is: every user may lock the file, which holds nothing of value
    return os.fdopen(number, "r+", errors="replace")


def _open_existing(path: Path) -> IO[str]:
    try:
        return path.open("r+", errors="replace")
    except FileNotFoundError:
        raise
    except OSError:  # the file is another user's, or the disk is read only
        return path.open(errors="replace")


def lock(file: IO[Any] | int, wait: bool, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Lock an open file until it is closed; the kernel also frees the lock when the process dies.

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


def release(file: IO[Any]) -> None:
    """Unlock and close an open file.

    Closing alone is not enough: processes that were forked meanwhile, such as those of a DataLoader, hold the file open too,
    and the kernel keeps the lock until the last of them ends.
    """
    if not file.closed:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)
        file.close()


def is_locked(path: Path) -> bool:
    """Return whether a process has locked a file; a process that asks for the lock during the check may be refused."""
    try:
        with path.open() as file:
            return lock(file, wait=False, kind=fcntl.LOCK_SH) is False
    except OSError:  # the file does not exist
        return False


def is_read_only(folder: Path) -> bool:
    """Return whether no file can be made in a folder; a file is tried, because rights do not tell it on every disk."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return False
    except OSError as error:
        return error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)


def unwritable(path: Path, error: OSError, remedy: str = "") -> UserError:
    """Return the UserError for a path of the cache that cannot be written, with the free space and a remedy."""
    free = f"; {_free(path):.0f} MiB are free on its disk" if error.errno in FULL else ""
    return UserError(
        f"{path} cannot be written to ({error.strerror or error}{free}): make room or rights for it, or point QATLAB_CACHE at "
        f"another disk{remedy}."
    )


def _free(path: Path) -> float:
    """Return the MiB that are free where ``path`` is or would be."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(there).free / 2**20


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Inside this context a full disk, or a reached quota or size limit, raises UserError that names ``path``."""
    try:
        yield
    except Exception as error:
        if not _means_full_disk(error):
            raise
        raise UserError(
            f"{path} could not be written, the disk or quota is full ({_free(path):.0f} MiB free): make room there. What was "
            "written before is whole, and the same command goes on from it."
        ) from error


@contextmanager
def refusal_named(path: Path) -> Iterator[None]:
    """Inside this context a read-only disk, missing rights or a bad name raise UserError that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*REFUSALS, errno.ENOENT):  # making a folder below /proc gives ENOENT
            raise
        raise UserError(
            f"{path} cannot be made or written ({error.strerror}): give a place where it can, or change its rights."
        ) from error


def _means_full_disk(error: BaseException | None) -> bool:
    """Return whether ``error`` comes from a full disk, by its text too: safetensors, polars and torch keep no errno."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if (
            "No space left on device" in str(error)
            or "File too large" in str(error)
            or "file write failed" in str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
