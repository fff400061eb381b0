"""A plain tar on this disk for every shard: remote and compressed ones are brought into the cache once per machine."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from webdataset.gopen import gopen

from qatlab.cache import cache_dir, digest, once
from qatlab.errors import UserError

CHUNK = 2**20
COMPRESSIONS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


def is_local(shard: str) -> bool:
    """Return whether a shard is a path on this disk rather than a URL or a command."""
    return "://" not in shard and not shard.startswith("pipe:")


def shown(shard: str) -> str:
    """Return a shard as it may be printed: a URL without its query, which may hold a signature."""
    return shard.split("?")[0] if "://" in shard and not shard.startswith("pipe:") else shard


def identity(path: Path | str, status: os.stat_result) -> str:
    """Return the text by which caches know a file: its path, size and time of change."""
    return f"{os.path.abspath(path)}/{status.st_size}/{status.st_mtime_ns}"


def local_file(shard: str) -> Path:
    """Return the path of the shard as an uncompressed tar.

    That is the shard itself, or for a URL or ``pipe:`` command a copy in the cache (``$QATLAB_CACHE/shards``): fetched
    through webdataset's openers when it is first asked for, once per machine, however many workers and ranks ask. A
    copy is kept under its URL for good: what changes behind the same URL is not seen. Compressed tars (gzip, bzip2,
    xz) are unpacked there too. Raises UserError when the shard cannot be fetched or the cache cannot be written.
    """
    if is_local(shard):
        source = Path(shard)
        with source.open("rb") as file:
            compressed = _compression(file.read(6))
        if compressed is None:
            return source
        target = _place(identity(source, source.stat()))
        once(target, lambda path: _unpack(compressed, source, path))
    else:
        target = _place(shard)
        once(target, lambda path: _fetch(shard, path))
    return target


def _place(text: str) -> Path:
    return cache_dir("shards") / f"{digest(text)}.tar"


def _fetch(shard: str, path: Path) -> None:
    stream: Any = None
    with path.open("wb") as file:
        try:
            stream = gopen(shard)
            chunk = stream.read(CHUNK)
        except (OSError, ValueError) as error:
            raise _unfetchable(shard, stream, error) from None
        while chunk:
            file.write(chunk)
            try:
                chunk = stream.read(CHUNK)
            except OSError as error:
                raise _unfetchable(shard, stream, error) from None
        try:
            stream.close()
        except OSError as error:
            raise _unfetchable(shard, stream, error) from None
    with path.open("rb") as file:
        compressed = _compression(file.read(6))
    if compressed is not None:
        packed = path.with_suffix(".packed")
        path.rename(packed)
        try:
            _unpack(compressed, packed, path)
        finally:
            packed.unlink()


def _unfetchable(shard: str, stream: Any, error: Exception) -> UserError:
    # webdataset's own text holds the whole command, with a token where the scheme needs one
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


def _unpack(opener: Callable[[Path], Any], source: Path, target: Path) -> None:
    """Write what can be unpacked; a damaged end is found again, and reported, when the tar is read."""
    with opener(source) as stream, target.open("wb") as file:
        while True:
            try:
                chunk = stream.read1(CHUNK)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                if getattr(error, "errno", None):  # the disk's error, not one of the packed data
                    raise UserError(f"data.shards: {source} cannot be read: {error}.") from error
                return
            if not chunk:
                return
            file.write(chunk)
