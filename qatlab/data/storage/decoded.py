"""A cache of decoded images on disk, so that an image that is read twice is decoded once."""

from __future__ import annotations

import errno
import os
import stat
import zlib
from pathlib import Path

import PIL
import torch
import torchvision

from qatlab.core.files import cache_dir, unwritable
from qatlab.core.hashing import digest
from qatlab.core.limits import Limits, limits
from qatlab.data.preprocess import Preprocess
from qatlab.data.storage.tars import OpenFiles

VERSION = 2  # raise this number when images are decoded or stored in another way than before
# The folder "decoded" of earlier releases is not read any more, because its records do not say which image they hold.
FOLDER = "decoded-2"
MARK = 16  # bytes behind the pixels of a record: 8 for the checksum, 8 for the image's id
# This number is added to the 32-bit checksum, so that no stored checksum is zero: a hole in the sparse file reads as
# zeros.
WRITTEN = 1 << 32


class DecodedImages:
    """Images as (3, S, S) uint8, one file per shard or pool of a suite in ``$QATLAB_CACHE/decoded-2``.

    Each image has a record at a fixed place of the file: the pixels, then a mark of 8 bytes for their CRC-32 and 8
    bytes for the image's id, written last. A record with a wrong checksum was not written to its end, and a record with
    another id is of an image that was at this place before: such records count as absent. Files are sparse and grow as
    images are added. Any number of processes may read and write at once, because two that write the same image write
    the same bytes.

    Everything that decides the pixels is part of the path: the shard (``fetch.identity``) or the pool of images (its
    folder and corruption), the preprocessing, and the versions of the libraries that decode and resize.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess
        pixels = (preprocess.size, preprocess.interpolation, preprocess.resize_mode, preprocess.fill_color)
        versions: tuple[object, ...] = (VERSION, torch.__version__, torchvision.__version__, PIL.__version__)
        if preprocess.resize_mode == "squash":  # in earlier releases squashed images had other pixels
            versions += ("as Pillow 13",)
        # Limits are part of the name, because an image that was decoded under other limits may be refused under these.
        # The default limits are left out, so that their folder has the same name as in earlier releases.
        if limits() != Limits():
            versions += (limits(),)
        self.folder = cache_dir(FOLDER, digest(repr((pixels, versions)))[:16])
        self.size = 3 * preprocess.size**2
        self._files: OpenFiles[str, CacheFile] = OpenFiles()

    def read(self, of: str, number: int, pixels: memoryview, image: int = 0) -> bool:
        """Return whether the cache has the image; if so, ``pixels``, 3 · S · S bytes, are filled with it.

        ``of`` names the shard or pool of the file, ``number`` is the image's place in it. ``image`` is the image's id,
        which is needed where another image may have been at this place before.
        """
        mark = bytearray(MARK)
        try:
            # One call reads pixels and mark, straight into the memory of the batch.
            read = os.preadv(self._file(of).number, [pixels, mark], number * (self.size + MARK))
        # The caller then decodes the image. If the folder cannot be used at all, ``write`` raises an error.
        except OSError:
            return False
        return read == self.size + MARK and mark == _mark(pixels, image)

    def write(self, of: str, number: int, pixels: memoryview, image: int = 0) -> None:
        """Store an image, with the arguments of ``read``; raises UserError if the disk is full or cannot be written to."""
        mark = _mark(pixels, image)
        place = number * (self.size + MARK)
        try:
            file = self._file(of)
            if not file.writable:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            _write(file.number, pixels, place)
            # The mark is written last, so that pixels of a process that died in between have no mark and count as
            # absent.
            _write(file.number, mark, place + self.size)
        except OSError as error:
            raise unwritable(self.folder, error, ", or set data.cache=false and suite.cache=false") from error

    def lacks(self, of: str, number: int, image: int) -> bool:
        """Return whether an image is missing, by its mark only; ``read`` checks the pixels too."""
        try:
            mark = os.pread(self._file(of).number, MARK, number * (self.size + MARK) + self.size)
        except OSError:
            return True
        return not any(mark[:8]) or mark[8:] != image.to_bytes(8, "little")

    def _path(self, of: str) -> Path:
        return self.folder / f"{digest(of)[:32]}.u8"

    def _file(self, of: str) -> CacheFile:
        return self._files.get(of, lambda: CacheFile(self._path(of)))


class CacheFile:
    """A file that is open for reading and writing at any place; it is made if missing, and closed by its last user."""

    def __init__(self, path: Path) -> None:
        self.writable = True
        try:
            self.number = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            # The folder may have been removed since the last file was written, because users empty caches during runs.
            path.parent.mkdir(parents=True, exist_ok=True)
            self.number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            # Users may share a cache: whoever may make files in the folder may also write to this one, whatever the
            # umask.
            os.fchmod(self.number, 0o644 | stat.S_IMODE(path.parent.stat().st_mode) & 0o022)
        # The file of another user, or a file on a read-only disk, can still be read.
        except OSError:
            self.number, self.writable = os.open(path, os.O_RDONLY), False

    def __del__(self) -> None:
        # __del__ is also called after an error in __init__, and then there is no number.
        if hasattr(self, "number"):
            os.close(self.number)


def _mark(pixels: memoryview, image: int) -> bytes:
    return (WRITTEN + zlib.crc32(pixels)).to_bytes(8, "little") + image.to_bytes(8, "little")


def _write(file: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of ``data`` at ``offset``; raises OSError when the disk is full."""
    # On a nearly full disk pwrite writes only a part and reports success. The next call then raises the error.
    rest = memoryview(data)
    while rest:
        done = os.pwrite(file, rest, offset)
        rest, offset = rest[done:], offset + done
