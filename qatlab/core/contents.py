"""The sha256 of files: each file is read once, and found in a table as long as its size, times and place stay."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qatlab.core.errors import UserError
from qatlab.core.files import atomic, cache_dir, locked
from qatlab.core.hashing import CHUNK, digest, sha256
from qatlab.core.ranks import is_first

HASH, STAMP = 32, 16  # bytes
# Nanoseconds in which a file may change again without a change of its times: FAT, the coarsest of the usual file
# systems, keeps times in steps of 2 s.
YOUNG = 2 * 10**9
TASK = 32  # files that a thread takes at once, because handing out small files one by one costs time
BLOCK = 2**16  # files after which the table is written: an interrupted start loses no more hashes than these
SPARE = 2**21  # entries (100 MB) above which the table drops what the present files do not use
# At most 8 threads: a large machine has hundreds of cores, but other jobs use the same disk.
THREADS = min(8, os.cpu_count() or 1)

Found = tuple[bytes | None, bytes]
"""A pair: the stamp that a hash may be kept under (None for a young file), and the hash."""


def stamp(path: str, status: os.stat_result) -> bytes:
    """Return 16 bytes that stand for a file in its present state: a hash of its path, size, times, inode and device."""
    # The time of modification can be set back (cp -p, rsync, tar), but the time of the last status change cannot.
    times = status.st_mtime_ns, status.st_ctime_ns
    return _short(repr((path, status.st_size, *times, status.st_ino, status.st_dev)))


def part(of: bytes, which: Any) -> bytes:
    """Return the stamp, 16 bytes, of the part ``which`` of a file with stamp ``of``, such as an image in an array."""
    return _short(repr((of, which)))


def is_young(status: os.stat_result, now: int) -> bool:
    """Return whether a file changed less than 2 s before ``now`` (in ns), or after it.

    The clock of a file system moves in steps: a change in the same step leaves the times of a file as they are.
    """
    return now - max(status.st_mtime_ns, status.st_ctime_ns) < YOUNG


def array_hash(array: np.ndarray) -> bytes:
    """Return the sha256, 32 bytes, of the type, shape and values of an array of any shape and dtype."""
    # Without type and shape in the hash, arrays of the same bytes but another type or shape would count as equal.
    return sha256([f"{array.dtype.str} {array.shape}\n", array.tobytes()])


def file_hashes(tree: Path, paths: Sequence[str], stamps: Sequence[bytes]) -> np.ndarray:
    """Return the sha256 of the bytes of the files ``paths`` below ``tree``, (n, 32) uint8.

    ``stamps`` are those of the files when they were listed. Raises OSError, with its name, for a file that cannot be
    read.
    """
    return hashes(tree, stamps, lambda i: _read(paths[i]))


def file_stamp(path: str) -> bytes:
    """Return the ``stamp`` of the file at an absolute path; raises OSError where there is none."""
    return stamp(path, os.stat(path))


def hashes(of: Path, stamps: Sequence[bytes], read: Callable[[int], Found]) -> np.ndarray:
    """Return the sha256 of the contents that ``stamps`` stand for, (n, 32) uint8.

    A hash comes from the table of ``of`` (in ``$QATLAB_CACHE/contents``), else from ``read(i)``. A damaged table is
    made again, and where no table can be written everything is read. Of several processes on a machine one reads, and
    the others wait for it and find the hashes in the table.
    """
    table, now = _load(of), dict[int, bytes]()
    if any(each not in table for each in stamps):
        with _alone(of):
            # The table is read again under the lock, because another process may have hashed the same files meanwhile.
            table = _load(of)
            lacking = [i for i, each in enumerate(stamps) if each not in table]
            for first in range(0, len(lacking), BLOCK):
                block = lacking[first : first + BLOCK]
                for i, (kept, hashed) in zip(block, _read_all(block, read), strict=True):
                    # The hash is kept by position too, because the table has no entry for a young file, and has an
                    # entry under a newer stamp for a file that changed since it was listed.
                    now[i] = hashed
                    if kept is not None:
                        table[kept] = hashed
                _save(of, table, stamps)
    found = (now[i] if i in now else table[each] for i, each in enumerate(stamps))
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, HASH)


def _read(path: str) -> Found:
    """Return the stamp to keep a hash under, None for a file that is too young, and the hash of the file's bytes."""
    # The time is taken before reading, so that a change while the file is read counts as young.
    now = time.time_ns()
    # Status and bytes come from one open file, because another file may be moved to the path between two calls.
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(number)
        hashed = sha256(iter(lambda: os.read(number, CHUNK), b""))
    except OSError as error:
        # An error of os.read knows only the number of the file, but the message to the user needs its name.
        error.filename = path
        raise
    finally:
        os.close(number)
    return None if is_young(status, now) else stamp(path, status), hashed


def _read_all(places: Sequence[int], read: Callable[[int], Found]) -> list[Found]:
    """Return ``read(place)`` for every place, in order, from several threads where there are many places."""
    tasks = [places[first : first + TASK] for first in range(0, len(places), TASK)]

    def read_task(task: Sequence[int]) -> list[Found]:
        return [read(i) for i in task]

    if len(tasks) < 2:
        return read_task(places)
    # Threads suffice, and no processes are needed: hashlib and os.read release Python's global lock.
    with ThreadPoolExecutor(THREADS) as pool:
        return [found for task in pool.map(read_task, tasks) for found in task]


def _load(of: Path) -> dict[bytes, bytes]:
    """Return {stamp: hash}, empty where there is no table or the table is damaged."""
    try:
        content = _path(of).read_bytes()
    except (OSError, UserError):
        return {}
    # The file is the hash of all entries, then the entries: 48 bytes each, a stamp and a hash.
    checksum, entries = content[:HASH], content[HASH:]
    if sha256([entries]) != checksum or len(entries) % (STAMP + HASH):
        return {}
    starts = range(0, len(entries), STAMP + HASH)
    return {entries[i : i + STAMP]: entries[i + STAMP : i + STAMP + HASH] for i in starts}


def _save(of: Path, table: dict[bytes, bytes], wanted: Iterable[bytes]) -> None:
    """Write the table of ``of``; a large table keeps only the entries of ``wanted``."""
    # Every change of a file adds an entry under a new stamp, and an entry does not tell whether it is still used.
    if len(table) > SPARE:
        wanted = {*wanted}
        table = {each: hashed for each, hashed in table.items() if each in wanted}
    entries = b"".join(each + hashed for each, hashed in table.items())
    try:
        with atomic(_path(of)) as temporary, temporary.open("wb") as file:
            file.write(sha256([entries]) + entries)
    except (OSError, UserError) as error:
        _say_once(str(error))


@contextmanager
def _alone(of: Path) -> Iterator[None]:
    """Inside this context no other process on this machine fills the table of ``of``; no cache means no lock."""
    # With an ExitStack errors of the lock are caught here, and errors of the caller's block are not.
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(f"contents of {of}"))
        except (OSError, UserError) as error:
            _say_once(str(error))
        yield


def _path(of: Path) -> Path:
    # The file name is a digest, because a path has slashes and may be longer than a file name can be.
    return cache_dir("contents") / f"{digest(str(of))[:32]}.sha256"


_said: set[str] = set()


def _say_once(why: str) -> None:
    """Print once for this process that no table can be kept, and why."""
    if not _said and is_first():
        print(f"what files hold cannot be kept in the cache and is read from them at every start: {why}")
    _said.add(why)


def _short(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=STAMP).digest()
