"""Decoded images kept on disk, so that a sample read twice is decoded once."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import PIL
import torch
import torchvision

from qatlab.cache import cache_dir, digest, unwritable
from qatlab.data.tars import OpenFiles
from qatlab.data.transforms import Preprocess

VERSION = 1  # counts changes of how images are decoded and stored
WRITTEN = 1 << 32  # added to the checksum, so that the zeros of a hole in the file are no checksum


class DecodedImages:
    """Images as (3, S, S) uint8, one file per shard or pool of a suite in ``$QATLAB_CACHE/decoded``.

    Each image has a record of its own at a fixed place: the pixels, then 8 bytes with the CRC-32 of them and of what the
    image is, written last; a record without a right checksum was never written whole, or is of an image that lay there
    before, and counts as absent. Files are sparse and grow as images are added. Any number of processes may read and
    write at once: two that write the same image write the same bytes.
    What decides the pixels is in the path: what the file is of (a shard's path, size and time; a pool's layout and
    corruption), the preprocessing, and the versions of the libraries that decode and resize.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess
        pixels = (preprocess.size, preprocess.interpolation, preprocess.resize_mode, preprocess.fill_color)
        versions = (VERSION, torch.__version__, torchvision.__version__, PIL.__version__)
        self.folder = cache_dir("decoded", digest(repr((pixels, versions)))[:16])
        self.size = 3 * preprocess.size**2
        self._files: OpenFiles[str, CacheFile] = OpenFiles()

    def read(self, of: str, number: int, pixels: memoryview, image: int = 0) -> bool:
        """Fill ``pixels``, 3 S S bytes, with an image and return True, or return False when the cache has it not.

        ``of`` is what the file is of, ``number`` the image's place in it, and ``image`` what tells it from others there.
        """
        mark = bytearray(8)
        try:
            os.preadv(self._file(of).number, [pixels, mark], number * (self.size + 8))
        except OSError:  # decoded anew; if the folder itself is at fault, writing says so
            return False
        return int.from_bytes(mark, "little") == _mark(pixels, image)

    def write(self, of: str, number: int, pixels: memoryview, image: int = 0) -> None:
        """Store an image; raises UserError when the disk is full."""
        mark = _mark(pixels, image).to_bytes(8, "little")
        place = number * (self.size + 8)
        try:
            file = self._file(of).number
            _write(file, pixels, place)
            _write(file, mark, place + self.size)
        except OSError as error:
            raise unwritable(self.folder, error, ", or set data.cache=false and suite.cache=false") from error

    def lacks(self, of: str, number: int) -> bool:
        """Return whether an image was never written, told from its mark alone."""
        try:
            return not any(os.pread(self._file(of).number, 8, number * (self.size + 8) + self.size))
        except OSError:
            return True

    def _path(self, of: str) -> Path:
        return self.folder / f"{digest(of)}.u8"

    def _file(self, of: str) -> CacheFile:
        return self._files.get(of, lambda: CacheFile(self._path(of)))


class CacheFile:
    """A file open for reading and writing at any place, made if absent; closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _mark(pixels: memoryview, image: int) -> int:
    return WRITTEN + zlib.crc32(pixels, image & 0xFFFFFFFF)


def _write(file: int, data: memoryview | bytes, offset: int) -> None:
    """Write everything: the last bytes before a disk is full are taken without an error."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(file, rest, offset)
        rest, offset = rest[done:], offset + done
