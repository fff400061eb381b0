"""CLIP_benchmark's WebDatasets: ``test/0.tar`` ..., with class names and prompt templates beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from qatlab.core.contents import HASH, hashes, part
from qatlab.core.errors import UserError
from qatlab.core.files import user_path
from qatlab.core.hashing import sha256
from qatlab.data.images.imageset import Layout
from qatlab.data.preprocess import BadImage, read_rgb
from qatlab.data.storage.tars import OpenFile, OpenFiles, TarIndex, load_index, read_part
from qatlab.data.textfiles import read_lines, read_text

COUNT, NAMES, TEMPLATES = "nshards.txt", "classnames.txt", "zeroshot_classification_templates.txt"
IMAGES = ("jpg", "jpeg", "png", "webp")


class WebDatasetFolder(Layout):
    """The samples in the tars of a CLIP_benchmark folder, or of its split folder, in the order of tars and samples.

    A sample has an image and ``.cls``, the number of its class. ``class_names`` and ``templates`` come from files
    beside the tars; a blank line in the file of names is a class without a name. Raises UserError for a tar that is
    missing or damaged, and for a sample without image or class.
    """

    kind = "webdataset"

    def __init__(self, path: str | Path) -> None:
        self.path = split_folder(user_path(path)) or user_path(path)
        # stat raises FileNotFoundError for a folder that is no WebDataset, which ``open_layout`` turns into a
        # UserError.
        (self.path / COUNT).stat()
        # The file with the number of tars shows whether the last tars are missing.
        count = read_text(self.path / COUNT).strip()
        if not re.fullmatch("0*[1-9][0-9]{0,6}", count):
            raise UserError(f"{self.path / COUNT} says '{count[:40]}', expected the number of tars.")
        self.shards = [_index(self.path / f"{number}.tar", self.path / COUNT) for number in range(int(count))]
        self._files: OpenFiles[int, OpenFile] = OpenFiles()
        # Cumulated numbers of samples, in which a binary search finds the tar of a place.
        self._ends = np.cumsum([len(shard) for shard in self.shards])
        self._parts = [_parts(shard, number) for shard in self.shards for number in range(len(shard))]
        # All labels are read now, so that one that is no number ends the run at its start. A label has only a few
        # bytes.
        self.keys = [self._class(place) for place in range(len(self._parts))]
        self.groups = [""] * len(self.keys)
        self.class_names = _lines(self.path, NAMES)
        templates = _lines(self.path, TEMPLATES)
        # CLIP_benchmark writes the place of the class name as {c}, qatlab as {}.
        self.templates = templates and [template.replace("{c}", "{}") for template in templates if template]

    def name(self, place: int) -> str:
        """Return the name of the tar and the sample's key in it, as in "3.tar:000017"."""
        shard, number = self._place(place)
        return f"{shard}.tar:{self.shards[shard].keys[number]}"

    def hash(self, places: Sequence[int]) -> np.ndarray:
        """Return the sha256 of the bytes of the images at ``places``, (n, 32) uint8; each tar has a table of known hashes."""
        found = np.zeros((len(places), HASH), np.uint8)
        shards = np.searchsorted(self._ends, places, side="right")
        # Tars are handled one after the other, so that the table of each is opened once.
        for shard in dict.fromkeys(shards.tolist()):
            mine = np.flatnonzero(shards == shard).tolist()
            found[mine] = self._hash_members(shard, [self._parts[places[i]]["image"] for i in mine])
        return found

    def _hash_members(self, shard: int, members: list[tuple[int, int]]) -> np.ndarray:
        index = self.shards[shard]
        stamps = [part(index.identity.encode(errors="surrogateescape"), member) for member in members]

        def read(i: int) -> tuple[bytes | None, bytes]:
            file = self._files.get(shard, lambda: OpenFile(index))
            # A tar that was written just now may still change: the hash is computed, but not kept.
            return stamps[i] if index.settled else None, sha256([file.read(*members[i])])

        return hashes(Path(index.path).resolve(), stamps, read)

    def pixels(self, place: int) -> Tensor:
        """Return the decoded image at ``place``, (3, H, W) uint8."""
        return read_rgb(self._read(place, "image"))

    def _place(self, place: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, place, side="right"))
        return shard, place - (int(self._ends[shard - 1]) if shard else 0)

    def _read(self, place: int, part: str) -> bytes:
        shard, _ = self._place(place)
        file = self._files.get(shard, lambda: OpenFile(self.shards[shard]))
        return read_part(file, *self._parts[place][part])

    def _class(self, place: int) -> int:
        try:
            text = self._read(place, "cls")
        except BadImage as error:
            raise UserError(f"{self.path / self.name(place)}.cls is no number of a class: {error}.") from error
        try:
            return int(text)
        except ValueError as error:
            raise UserError(
                f"{self.path / self.name(place)}.cls says '{text[:40]!r}', expected the number of a class."
            ) from error


def split_folder(path: Path) -> Path | None:
    """Return the folder with nshards.txt: ``path`` or its ``test``; None where there is neither."""
    return next((folder for folder in (path, path / "test") if (folder / COUNT).is_file()), None)


def _index(tar: Path, count: Path) -> TarIndex:
    if not tar.is_file():
        raise UserError(f"{tar} is not there, and {count} counts it; download the missing tar.")
    index = load_index(str(tar))
    if index.damage:
        raise UserError(f"{tar} is damaged ({index.damage}); download it again.")
    # A program that is interrupted and started again may append samples to a tar that it has written before.
    if twice := [key for key, count in Counter(index.keys).items() if count > 1]:
        raise UserError(
            f"{tar} holds the sample {twice[0]} more than once ({len(twice)} samples are): it was written to again after it "
            "was whole. An image would count twice; write the tar anew with every sample once."
        )
    return index


def _parts(index: TarIndex, number: int) -> dict[str, tuple[int, int]]:
    """Return {"image": (offset, size), "cls": (offset, size)} of a sample's parts in the tar, in bytes."""
    first, end = index.starts[number : number + 2].tolist()
    places = {
        index.suffixes[int(index.names[part])]: (int(index.offsets[part]), int(index.sizes[part]))
        for part in range(first, end)
    }
    image = next((suffix for suffix in IMAGES if suffix in places), None)
    if image is None or "cls" not in places:
        raise UserError(
            f"{index.path}: the sample {index.keys[number]} has {', '.join(places)}, expected an image ({', '.join(IMAGES)}) "
            "and cls."
        )
    return {"image": places[image], "cls": places["cls"]}


def _lines(folder: Path, name: str) -> list[str] | None:
    # In a folder with splits the file is one folder above the tars.
    file = next((place / name for place in (folder, folder.parent) if (place / name).is_file()), None)
    if file is None:
        return None
    return read_lines(file)
