"""Local tars for all shards: remote and compressed shards are copied to the cache once per machine."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from webdataset.gopen import gopen

from qatlab.core.checksums import read_json, write_json
from qatlab.core.contents import file_hashes, file_stamp
from qatlab.core.damage import set_aside, whole
from qatlab.core.errors import UserError
from qatlab.core.files import atomic, cache_dir, once
from qatlab.core.hashing import digest
from qatlab.core.secrets import shown

CHUNK = 2**20
# Images hardly shrink when they are compressed, and texts to a tenth. An archive that unpacks to more than 100 times
# its size and to more than 64 MiB is taken for an attack that fills the disk.
UNPACKED_TIMES, UNPACKED_BYTES = 100, 2**26
# The first bytes of a file tell its compression; suffixes may lie, and URLs may have none.
COMPRESSIONS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


def is_local(shard: str) -> bool:
    """Return whether a shard is a path on this disk rather than a URL or a command."""
    return "://" not in shard and not shard.startswith("pipe:")


def identity(path: Path | str, status: os.stat_result) -> str:
    """Return a text that identifies a file and its state: path, size, time, device, inode and time of the inode."""
    # The time of the inode is the last part, because ``OpenFile`` compares the text without it.
    file = f"{os.path.abspath(path)}/{status.st_size}/{status.st_mtime_ns}"
    return f"{file}/{status.st_dev}/{status.st_ino}/{status.st_ctime_ns}"


def local_file(shard: str) -> Path:
    """Return the path of the shard as an uncompressed tar.

    A local uncompressed tar is returned as it is. For a URL or ``pipe:`` command the result is a copy in the cache
    (``$QATLAB_CACHE/shards``), which webdataset's openers fetch once per machine, however many workers and ranks need
    it. The copy is kept under its URL without the signature, so that a later change behind the same URL is not noticed.
    Compressed tars (gzip, bzip2, xz) are unpacked in the same folder. Raises UserError when the shard cannot be
    fetched, unpacks to a hundred times its size, or the cache cannot be written.
    """
    if is_local(shard):
        source = Path(shard)
        with source.open("rb") as file:
            # 6 bytes are the longest magic number, that of xz.
            compressed = _compression(file.read(6))
        if compressed is None:
            return source
        # The unpacked copy is kept under a hash of the content, so that a moved archive is not unpacked again.
        return _kept(_place(content(source)), lambda path: _unpack(compressed, source, path, shard))
    return _kept(_place(kept_as(shard)), lambda path: _fetch(shard, path))


def _kept(target: Path, write: Callable[[Path], None]) -> Path:
    """Return ``target``, which ``write`` makes if it is missing or no longer has the size that it was made with."""
    record = target.with_suffix(".json")
    size = (whole(record, read_json) or {}).get("size")
    # A copy of another size was cut short, for example on a full disk or by a program that cleans up.
    if target.exists() and size is not None and target.stat().st_size != size:
        set_aside(target, ValueError(f"it has {target.stat().st_size} bytes of {size}"))
        size = None
    once(target, write)
    if size is None:
        # A cache on a read-only disk can be used without the record of the size.
        with suppress(UserError), atomic(record) as temporary:
            write_json(temporary, {"size": target.stat().st_size})
    return target


def content(file: Path) -> str:
    """Return the sha256 of a file in hexadecimal; known hashes are looked up. Raises OSError if it cannot be read."""
    path = str(file.resolve())
    return file_hashes(file.resolve(), [path], [file_stamp(path)])[0].tobytes().hex()


def kept_as(shard: str) -> str:
    """Return the text whose hash names the copy of a remote shard: a URL without secrets, or the whole command."""
    return shard if shard.startswith("pipe:") else shown(shard)


def _place(text: str) -> Path:
    return cache_dir("shards") / f"{digest(text)[:32]}.tar"


def _fetch(shard: str, path: Path) -> None:
    stream: Any = None
    with path.open("wb") as file:
        try:
            stream = gopen(shard)
            chunk = stream.read(CHUNK)
        except (OSError, ValueError) as error:
            # "from None" hides the original error, whose text contains the URL with its signature.
            raise _unfetchable(shard, stream, error) from None
        while chunk:
            file.write(chunk)
            try:
                chunk = stream.read(CHUNK)
            except OSError as error:
                raise _unfetchable(shard, stream, error) from None
        try:
            # Whether a command has failed is known only at its end: then close raises an error.
            stream.close()
        except OSError as error:
            raise _unfetchable(shard, stream, error) from None
    with path.open("rb") as file:
        compressed = _compression(file.read(6))
    if compressed is not None:
        # A fetched shard may be compressed. It is replaced by its unpacked content.
        packed = path.with_suffix(".packed")
        path.rename(packed)
        try:
            _unpack(compressed, packed, path, shown(shard))
        finally:
            packed.unlink()


def _unfetchable(shard: str, stream: Any, error: Exception) -> UserError:
    # The text of webdataset's error contains the whole command, perhaps with a secret, so only its status is used.
    status = getattr(stream, "status", None)
    reason = (
        f"its command ended with status {status}" if status is not None else str(error).replace(shard, shown(shard))
    )
    return UserError(
        f"data.shards: {shown(shard)} cannot be fetched ({reason}); check the address and this machine's network, then "
        "give the same command again: it goes on from the last checkpoint."
    )


def _compression(start: bytes) -> Callable[[Path], Any] | None:
    return next((opener for magic, opener in COMPRESSIONS.items() if start.startswith(magic)), None)


def _unpack(opener: Callable[[Path], Any], source: Path, target: Path, named: str) -> None:
    """Write everything that can be unpacked of ``source`` to ``target``; the reader of the tar reports a damaged end.

    Raises UserError for an archive that unpacks to more than UNPACKED_TIMES its own size and UNPACKED_BYTES.
    """
    packed, unpacked = source.stat().st_size, 0
    with opener(source) as stream, target.open("wb") as file:
        while True:
            try:
                # read1 returns after each step. read would lose the bytes that it has unpacked before it meets damage.
                chunk = stream.read1(CHUNK)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                # An error with an errno comes from the disk, an error without one from damaged packed data.
                if getattr(error, "errno", None):
                    raise UserError(f"data.shards: {named} cannot be read: {error}.") from error
                return
            if not chunk:
                return
            unpacked += len(chunk)
            if unpacked > max(UNPACKED_BYTES, UNPACKED_TIMES * packed):
                raise UserError(
                    f"data.shards: {named} unpacks to more than {UNPACKED_TIMES} times its {packed} bytes, as no images do: "
                    "leave it out, or unpack it yourself and name the .tar if you trust it."
                )
            file.write(chunk)
