"""CLIP_benchmark's WebDatasets: ``test/0.tar`` ..., with class names and prompt templates beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from qatlab.data.sets import Layout
from qatlab.data.tars import OpenFile, OpenFiles, TarIndex, load_index
from qatlab.data.transforms import read_rgb
from qatlab.errors import UserError

COUNT, NAMES, TEMPLATES = "nshards.txt", "classnames.txt", "zeroshot_classification_templates.txt"
IMAGES = ("jpg", "jpeg", "png", "webp")


class WebDatasetFolder(Layout):
    """The samples of the tars of a CLIP_benchmark folder, or of its split folder, in the order of shard and sample.

    A sample has an image and ``.cls``, its class as a number; ``class_names`` and ``templates`` come from the files that
    lie beside the tars. Raises UserError for a tar that is missing or damaged and for samples without image or class.
    """

    kind = "webdataset"

    def __init__(self, path: str | Path) -> None:
        self.path = split_folder(Path(path).expanduser()) or Path(path).expanduser()
        count = (self.path / COUNT).read_text().strip()
        if not count.isdigit():
            raise UserError(f"{self.path / COUNT} says '{count[:40]}', expected the number of tars.")
        self.shards = [_index(self.path / f"{number}.tar", self.path / COUNT) for number in range(int(count))]
        self._files: OpenFiles[int, OpenFile] = OpenFiles()
        self._ends = np.cumsum([len(shard) for shard in self.shards])
        self._parts = [_parts(shard, number) for shard in self.shards for number in range(len(shard))]
        self.keys = [self._class(place) for place in range(len(self._parts))]
        self.groups = [""] * len(self.keys)
        self.class_names = _lines(self.path, NAMES)
        templates = _lines(self.path, TEMPLATES)
        self.templates = templates and [template.replace("{c}", "{}") for template in templates]

    def name(self, place: int) -> str:
        """Return the tar, and the sample's key in it."""
        shard, number = self._place(place)
        return f"{shard}.tar:{self.shards[shard].keys[number]}"

    def identity(self, place: int) -> str:
        """Return the sample's key and its image's place and size in the tar."""
        return f"{self.name(place)}/{self._parts[place]['image']}"

    def pixels(self, place: int) -> Tensor:
        """Return the decoded image."""
        return read_rgb(self._read(place, "image"))

    def _place(self, place: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, place, side="right"))
        return shard, place - (int(self._ends[shard - 1]) if shard else 0)

    def _read(self, place: int, part: str) -> bytes:
        shard, _ = self._place(place)
        file = self._files.get(shard, lambda: OpenFile(self.shards[shard]))
        return file.read(*self._parts[place][part])

    def _class(self, place: int) -> int:
        text = self._read(place, "cls")
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
    return index


def _parts(index: TarIndex, number: int) -> dict[str, tuple[int, int]]:
    """{"image" | "cls": (offset, size)} of a sample."""
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
    file = next((place / name for place in (folder, folder.parent) if (place / name).is_file()), None)
    if file is None:
        return None
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
