"""Tars as tables: an index says where the parts of each sample are in the file, so that they can be read directly."""

from __future__ import annotations

import json
import os
import re
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from webdataset.tariterators import base_plus_ext

from qatlab.core.contents import is_young
from qatlab.core.damage import whole
from qatlab.core.errors import UserError
from qatlab.core.files import cache_dir, cache_root, once
from qatlab.core.hashing import digest
from qatlab.core.limits import limits
from qatlab.core.secrets import shown
from qatlab.data.preprocess import BadImage
from qatlab.data.storage.fetch import identity, local_file

VERSION = 2  # raise this number when an index has other contents than before, because cached indices are named by it
OPEN_FILES = 32  # a process may usually have 1024 files open, and needs most of them for other things
# Indices stay in memory while they describe at most this many samples together. The last two that were used stay,
# whatever their size.
INDEXED_SAMPLES = 40_000
# Members such as __meta__ describe a shard. webdataset's readers pass over them.
META = re.compile(r"__[^/]*__($|/)")
# The largest header for a long name or for extended attributes: tarfile reads such headers into memory whole.
HEADER_BYTES = 2**20
# The errors that tarfile raises on damaged headers. OSError is left out, because it is an error of the disk.
DAMAGE = (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError)


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The table of the samples in one tar.

    Sample i has the parts ``starts[i]`` .. ``starts[i + 1]`` - 1; part j is named ``suffixes[names[j]]`` and has
    ``sizes[j]`` bytes from ``offsets[j]`` on (all int64). ``damage`` says why the tar could not be read to its end, or
    is empty. ``settled`` is false for a tar that was written a moment ago: it may change and keep its ``identity``, so
    nothing about it must be stored.
    """

    path: str
    identity: str
    settled: bool
    damage: str
    keys: list[str]
    suffixes: list[str]
    starts: np.ndarray
    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


class OpenFile:
    """A tar that is open for reading at any place; its last user closes it.

    Raises UserError if the file cannot be opened, or is not the one that ``index`` describes.
    """

    def __init__(self, index: TarIndex) -> None:
        self.path = index.path
        try:
            self.number = os.open(index.path, os.O_RDONLY)
        # The file may be missing although its index is known, because users empty caches during runs.
        except OSError as error:
            raise _lost(index.path, error) from error
        # The last part of an identity is the time of the inode. A new hard link or a new mode changes that time, but not the
        # content, so the part is left out of the comparison.
        now = identity(index.path, os.fstat(self.number))
        if now.rpartition("/")[0] != index.identity.rpartition("/")[0]:
            raise UserError(f"{index.path} was changed while it was being read; start again with files that stay.")

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on; raises UserError when the disk does not give them."""
        try:
            # pread takes the place as an argument. seek would move the position of the file for all forked processes,
            # which share it.
            data = os.pread(self.number, size, offset)
        except OSError as error:
            raise _lost(self.path, error) from error
        if len(data) < size:
            raise UserError(f"{self.path} was cut off while it was being read; put the whole file back.")
        return data


Key = TypeVar("Key")
File = TypeVar("File")


class OpenFiles(Generic[Key, File]):
    """The open files that were used last, at most OPEN_FILES of them; a copy in another process begins without any."""

    def __init__(self) -> None:
        self._files: OrderedDict[Key, File] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # The number of an open file is valid only in its own process.
        return {"_files": OrderedDict()}

    def get(self, key: Key, opened: Callable[[], File]) -> File:
        """Return the file of ``key``, which ``opened()`` opens if it is not open."""
        if key not in self._files:
            self._files[key] = opened()
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(key)
        return self._files[key]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: its key, and {suffix: (offset, size)} of its parts, which ``read`` reads."""

    key: str
    parts: dict[str, tuple[int, int]]
    file: OpenFile

    def read(self, suffix: str) -> bytes:
        """Return the content of one part; raises BadImage for one above limits.member_bytes."""
        return read_part(self.file, *self.parts[suffix])


def read_part(file: OpenFile, offset: int, size: int) -> bytes:
    """Return a part of a sample; raises BadImage where it is above limits.member_bytes."""
    if size > (bound := limits().member_bytes):
        raise BadImage(f"{size} bytes are above limits.member_bytes={bound}")
    return file.read(offset, size)


class Shards:
    """The samples of a list of shards, by number of shard and number of sample; a shard is opened when it is needed.

    The object may be used in other processes, forked or spawned: reading moves no shared position, and open files are
    not copied.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self.damage: dict[int, str] = {}
        self._counts: dict[int, int] = {}
        self._indices: OrderedDict[int, TarIndex] = OrderedDict()
        self._files: OpenFiles[int, OpenFile] = OpenFiles()

    def __getstate__(self) -> dict[str, Any]:
        # Indices may be large, so another process loads the ones that it needs from the cache.
        return {**self.__dict__, "_indices": OrderedDict()}

    def count(self, shard: int) -> int:
        """Return the number of samples of a shard; raises UserError if none of the shards has a sample."""
        if shard not in self._counts:
            self.index(shard)
        return self._counts[shard]

    def index(self, shard: int) -> TarIndex:
        """Return the index of a shard; a shard that is new on this machine is fetched and scanned first."""
        index = self._indices.get(shard)
        if index is not None:
            self._indices.move_to_end(shard)
            return index
        index = self._indices[shard] = load_index(self.urls[shard])
        self._counts[shard] = len(index)
        if index.damage:
            self.damage[shard] = index.damage
        # The shard that was used longest ago is dropped first.
        while len(self._indices) > 2 and sum(map(len, self._indices.values())) > INDEXED_SAMPLES:
            self._indices.popitem(last=False)
        # A single empty shard is no error. If all shards are empty, there is no sample to go on with.
        if len(self._counts) == len(self.urls) and not any(self._counts.values()):
            reason = index.damage or "it holds no sample"
            raise UserError(f"data.shards: no shard can be read, the last was {shown(self.urls[shard])}: {reason}.")
        return index

    def sample(self, shard: int, number: int) -> Sample:
        """Return one sample of a shard."""
        index = self.index(shard)
        file = self._files.get(shard, lambda: OpenFile(index))
        first, end = index.starts[number : number + 2].tolist()
        names = [index.suffixes[name] for name in index.names[first:end].tolist()]
        places = zip(index.offsets[first:end].tolist(), index.sizes[first:end].tolist(), strict=True)
        return Sample(index.keys[number], dict(zip(names, places, strict=True)), file)


def load_index(shard: str) -> TarIndex:
    """Return the index of a shard, from the cache (``$QATLAB_CACHE/index``) if the file is unchanged by ``fetch.identity``.

    Otherwise one process scans the headers of the tar and stores the index. The index of a tar that was written a
    moment ago is not stored, because the tar may change again without a new time stamp. Samples are grouped by
    open_clip's rule: a new sample begins where the key changes, as in webdataset, and where a suffix is repeated. A
    damaged tar gives the samples before the damage, and ``damage`` says what is wrong. Raises UserError for a file that
    cannot be read.
    """
    try:
        path = local_file(shard)
        status, now = path.stat(), time.time_ns()
        known = identity(path, status)
        # Files in the cache are written once and moved into place whole, so a young file there needs no waiting.
        if is_young(status, now) and not path.resolve().is_relative_to(cache_root().resolve()):
            return _scan(path, known, settled=False)
        stored = cache_dir("index") / f"{digest(f'{VERSION}/{known}')[:32]}.npz"
        # ``whole`` sets a damaged index aside and returns None; the second round then writes the index anew.
        for _ in range(2):
            once(stored, lambda temporary: _save(_scan(path, known), temporary))
            if (index := whole(stored, _load)) is not None:
                return index
        return _scan(path, known)
    except OSError as error:
        raise _lost(shown(shard), error) from error


def _lost(shard: str, error: OSError) -> UserError:
    return UserError(f"data.shards: {shard} cannot be read: {error.strerror or error}.")


def _scan(path: Path, known: str, settled: bool = True) -> TarIndex:
    found: list[tuple[str, dict[str, tuple[int, int]]]] = []
    damage = ""
    try:
        with tarfile.open(path, "r:", tarinfo=_Member) as tar:
            found.extend(_samples(tar, path.stat().st_size))
            # Content behind the end of the tar is damage. It is looked for after all samples were read, which are kept.
            _refuse_more(tar.fileobj)
    except DAMAGE as error:
        damage = str(error.args[0]) if error.args else type(error).__name__
    except OSError as error:
        raise _lost(str(path), error) from error
    keys = [key for key, _ in found]
    samples = [parts for _, parts in found]
    # Few suffixes occur in a tar, so parts store a number instead of a text: an index of 10 000 samples is small.
    suffixes = list(dict.fromkeys(suffix for sample in samples for suffix in sample))
    codes = {suffix: code for code, suffix in enumerate(suffixes)}
    places = np.array([place for sample in samples for place in sample.values()], np.int64).reshape(-1, 2)
    return TarIndex(
        path=str(path),
        identity=known,
        settled=settled,
        damage=damage,
        keys=keys,
        suffixes=suffixes,
        starts=np.cumsum([0, *map(len, samples)], dtype=np.int64),
        names=np.array([codes[suffix] for sample in samples for suffix in sample], np.int64),
        offsets=places[:, 0],
        sizes=places[:, 1],
    )


def _samples(tar: tarfile.TarFile, size: int) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield (key, {suffix: (offset, size)}) of each sample; at damage it raises an error, after the samples before it."""
    key: str | None = None
    parts: dict[str, tuple[int, int]] = {}
    for name, place in _members(tar, size):
        prefix, suffix = base_plus_ext(name)
        if prefix is None:
            continue
        suffix = suffix.lower()
        # A repeated suffix begins a new sample, as in open_clip. webdataset itself would stop with an error.
        if prefix != key or suffix in parts:
            if key is not None:
                yield key, parts
            key, parts = prefix, {}
        parts[suffix] = place
    if key is not None:
        yield key, parts


def _members(tar: tarfile.TarFile, size: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (name, (offset, size)) of the regular files of a tar; raises an error at damage, also where tarfile is silent."""
    for member in tar:
        whole = member.size >= 0 and member.offset_data + (member.size if member.isreg() else 0) <= size
        if member.isreg() and not META.match(member.name):
            # A part that is cut off is yielded before the error is raised, so that its key shows that the sample before
            # it is complete.
            yield member.name, (member.offset_data, member.size)
        if not whole:
            raise tarfile.ReadError(f"it ends inside {member.name}")
        # tarfile keeps a list of all members, which grows to gigabytes in a large tar.
        tar.members = []  # type: ignore[attr-defined]
    file: Any = tar.fileobj
    file.seek(tar.offset)
    # tarfile ends without an error at a damaged header. A tar that ends well has a block of zeros there.
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"neither a file nor the end of the archive at byte {tar.offset}")


def _refuse_more(file: Any) -> None:
    """Raise ReadError if another archive follows the end of the tar, up to which ``file`` was read."""
    # Behind the end of a tar there are only zeros, unless another file was appended (cat a.tar b.tar).
    while block := file.read(tarfile.RECORDSIZE):
        if (rest := block.lstrip(b"\0")) and _is_header(file, file.tell() - len(rest)):
            raise tarfile.ReadError(f"a second archive follows its end at byte {file.tell() - len(rest)}, not read")
        if rest:
            return


def _is_header(file: Any, place: int) -> bool:
    """Return whether there is the header of a tar at ``place``; the position in the file is not changed."""
    before = file.tell()
    file.seek(place)
    try:
        tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    finally:
        file.seek(before)
    return True


class _Member(tarfile.TarInfo):
    """A member of a tar that refuses large extended headers, because tarfile reads such headers into memory whole."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        extended = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if self.type in (*extended, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK) and self.size > HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


def _save(index: TarIndex, path: Path) -> None:
    values = {field.name: getattr(index, field.name) for field in fields(index)}
    arrays: dict[str, Any] = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    texts = {name: value for name, value in values.items() if name not in arrays}
    with path.open("wb") as file:
        # numpy gets the open file, because it would add .npz to a path.
        np.savez(file, texts=np.frombuffer(json.dumps(texts).encode(), np.uint8), **arrays)


def _load(path: Path) -> TarIndex:
    with np.load(path) as stored:
        return TarIndex(**json.loads(stored["texts"].tobytes()), **{k: stored[k] for k in stored.files if k != "texts"})
