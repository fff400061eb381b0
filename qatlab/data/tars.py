"""Tars as tables: where the parts of each sample lie, looked up once per file, and reading them there."""

from __future__ import annotations

import json
import os
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from webdataset.tariterators import group_by_keys

from qatlab.cache import cache_dir, digest, once
from qatlab.data.fetch import identity, local_file, shown
from qatlab.errors import UserError

VERSION = 1  # counts changes of what an index says: cached ones carry it
OPEN_FILES = 32
INDEXED_SAMPLES = 40_000  # of the shards whose indices are kept in memory; two are kept in any case
META = re.compile(r"__[^/]*__($|/)")  # members that webdataset's readers pass over
# What tarfile raises on damaged headers; an OSError is the disk's, not the tar's.
DAMAGE = (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError)


@dataclass(frozen=True, eq=False)
class TarIndex:
    """Where the samples of one tar lie.

    Sample i has the parts ``starts[i]`` .. ``starts[i + 1]`` - 1; part j is named ``suffixes[names[j]]`` and has
    ``sizes[j]`` bytes from ``offsets[j]`` on (all int64). ``damage`` says why the tar could not be read to its end, or
    is empty.
    """

    path: str
    identity: str
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
    """A file open for reading at any place; closed when nobody holds it any more."""

    def __init__(self, index: TarIndex) -> None:
        self.path = index.path
        self.number = os.open(index.path, os.O_RDONLY)
        if identity(index.path, os.fstat(self.number)) != index.identity:
            raise UserError(
                f"data.shards: {index.path} was changed while it was being read; start again with files that stay."
            )

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on; raises UserError when the disk does not give them."""
        try:
            data = os.pread(self.number, size, offset)
        except OSError as error:
            raise _lost(self.path, error) from error
        if len(data) < size:
            raise UserError(f"data.shards: {self.path} was cut off while it was being read; put the whole file back.")
        return data


Key = TypeVar("Key")
File = TypeVar("File")


class OpenFiles(Generic[Key, File]):
    """Up to OPEN_FILES open files, the ones used last; none of them travels into another process."""

    def __init__(self) -> None:
        self._files: OrderedDict[Key, File] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": OrderedDict()}

    def get(self, key: Key, opened: Callable[[], File]) -> File:
        """Return the file of ``key``, opened now if it is not open."""
        if key not in self._files:
            self._files[key] = opened()
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(key)
        return self._files[key]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: its key, and its parts by suffix, which are read when they are asked for."""

    key: str
    parts: dict[str, tuple[int, int]]
    file: OpenFile

    def read(self, suffix: str) -> bytes:
        """Return the content of one part."""
        return self.file.read(*self.parts[suffix])


class Shards:
    """The samples of a list of shards, by number of shard and sample; each shard is opened when it is reached.

    Safe to be carried into other processes, forked or spawned: reading moves no shared position, and open files do not
    travel.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self.damage: dict[int, str] = {}
        self._counts: dict[int, int] = {}
        self._indices: OrderedDict[int, TarIndex] = OrderedDict()
        self._files: OpenFiles[int, OpenFile] = OpenFiles()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": OrderedDict()}

    def count(self, shard: int) -> int:
        """Return how many samples the shard holds; raises UserError when no shard of all holds one."""
        if shard not in self._counts:
            self.index(shard)
        return self._counts[shard]

    def index(self, shard: int) -> TarIndex:
        """Return the index of a shard, fetched and scanned if this machine never did."""
        index = self._indices.get(shard)
        if index is not None:
            self._indices.move_to_end(shard)
            return index
        index = self._indices[shard] = load_index(self.urls[shard])
        self._counts[shard] = len(index)
        if index.damage:
            self.damage[shard] = index.damage
        while len(self._indices) > 2 and sum(map(len, self._indices.values())) > INDEXED_SAMPLES:
            self._indices.popitem(last=False)
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
    """Return the index of a shard, from the cache (``$QATLAB_CACHE/index``) while its path, size and time are the same.

    Otherwise the headers of the tar are scanned, by one process. Samples are grouped by webdataset's own rule. Raises
    UserError when the file cannot be had; a damaged tar gives the samples before the damage, and ``damage`` says what
    is wrong.
    """
    try:
        path = local_file(shard)
        known = identity(path, path.stat())
        stored = cache_dir("index") / f"{digest(f'{VERSION}/{known}')}.npz"
        for _ in range(2):
            once(stored, lambda temporary: _save(_scan(path, known), temporary))
            try:
                return _load(stored)
            except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
                stored.unlink(missing_ok=True)  # half of it reached the disk: it is made anew
        return _scan(path, known)
    except OSError as error:
        raise _lost(shown(shard), error) from error


def _lost(shard: str, error: OSError) -> UserError:
    return UserError(f"data.shards: {shard} cannot be read: {error.strerror or error}.")


def _scan(path: Path, known: str) -> TarIndex:
    samples: list[dict[str, Any]] = []
    damage = ""
    try:
        with tarfile.open(path, "r:") as tar:
            samples.extend(group_by_keys(_members(tar, path.stat().st_size)))
    except DAMAGE as error:
        damage = str(error.args[0]) if error.args else type(error).__name__
    except OSError as error:
        raise _lost(str(path), error) from error
    keys = [sample.pop("__key__") for sample in samples]
    for sample in samples:
        del sample["__url__"]
    suffixes = list(dict.fromkeys(suffix for sample in samples for suffix in sample))
    codes = {suffix: code for code, suffix in enumerate(suffixes)}
    places = np.array([place for sample in samples for place in sample.values()], np.int64).reshape(-1, 2)
    return TarIndex(
        path=str(path),
        identity=known,
        damage=damage,
        keys=keys,
        suffixes=suffixes,
        starts=np.cumsum([0, *map(len, samples)], dtype=np.int64),
        names=np.array([codes[suffix] for sample in samples for suffix in sample], np.int64),
        offsets=places[:, 0],
        sizes=places[:, 1],
    )


def _members(tar: tarfile.TarFile, size: int) -> Iterator[dict[str, Any]]:
    """The regular files of a tar as ``group_by_keys`` takes them; raises at the first damage, which tarfile may hide."""
    for member in tar:
        whole = member.size >= 0 and member.offset_data + (member.size if member.isreg() else 0) <= size
        if member.isreg() and not META.match(member.name):
            # A part that is cut off is handed on first: the sample before it is then known to be whole.
            yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": ""}
        if not whole:
            raise tarfile.ReadError(f"it ends inside {member.name}")
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them all
    tar.fileobj.seek(tar.offset)  # type: ignore[union-attr]
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # type: ignore[union-attr]
        raise tarfile.ReadError(f"neither a file nor the end of the archive at byte {tar.offset}")


def _save(index: TarIndex, path: Path) -> None:
    values = {field.name: getattr(index, field.name) for field in fields(index)}
    arrays: dict[str, Any] = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    texts = {name: value for name, value in values.items() if name not in arrays}
    with path.open("wb") as file:
        np.savez(file, texts=np.frombuffer(json.dumps(texts).encode(), np.uint8), **arrays)


def _load(path: Path) -> TarIndex:
    with np.load(path) as stored:
        return TarIndex(**json.loads(stored["texts"].tobytes()), **{k: stored[k] for k in stored.files if k != "texts"})
