"""Labelled image sets: what a layout on disk says of its images, and the dataset made of some of them."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import Dataset

from qatlab.data.classlists import Key
from qatlab.data.corruptions import Corrupt
from qatlab.data.transforms import BadImage, Preprocess
from qatlab.errors import UserError, nearest

PICK = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?")


UNCOMPRESSED = {".bmp", ".ppm", ".pgm", ".tif", ".tiff"}  # as long whatever they show


def size_or_checksum(file: Path) -> str:
    """Return the size of an image file in bytes, with a checksum where the format does not compress."""
    told = f"{file.stat().st_size}"
    return f"{told}/{zlib.crc32(file.read_bytes()):08x}" if file.suffix.lower() in UNCOMPRESSED else told


class Layout:
    """The images of a dataset as they lie on disk, in a fixed order; a subclass for each way that datasets come in.

    ``keys`` says the class of each image (folder, name or number; None where it has none) and ``groups`` a part of the
    set that it belongs to (a background, a severity; "" for none). ``class_names`` are the names of the numbers and
    ``templates`` the prompts ("a photo of a {}") where the dataset comes with them; ``empty`` are class folders without
    an image.
    """

    kind: ClassVar[str]
    path: Path
    keys: Sequence[Key | None]
    groups: Sequence[str]
    class_names: list[str] | None = None
    templates: list[str] | None = None
    empty: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, place: int) -> str:
        """Return what an image is called: a path below the set, or a file and a number; the same on every machine."""
        raise NotImplementedError

    def identity(self, place: int) -> str:
        """Return the name with what changes when the image does, its size or a checksum."""
        raise NotImplementedError

    def pixels(self, place: int) -> Tensor:
        """Return an image as (3, H, W) uint8, neither resized nor cropped; raises BadImage or OSError."""
        raise NotImplementedError

    def parts(self, place: int) -> tuple[str, ...]:
        """Return the folders and the class name by which ``exclude`` knows an image."""
        key = self.keys[place]
        named = self.class_names[key] if self.class_names and isinstance(key, int) else key
        return (*self.name(place).split("/")[:-1], str(named))


class ImageSet(Dataset[tuple[Tensor, int]]):
    """The images of a layout as (image (3, S, S) uint8, label).

    ``rows`` {key: label, or None for a class that is left out} gives the labels; without it every label is -1.
    ``exclude`` names folders or classes to leave out, ``keep`` says whether an image belongs to the set, and ``pick`` is
    a Python slice in text ("0::2", ":500") on what remains; ``total`` counts the images before it. ``corruption`` is
    applied to every image, whose name is its key. Raises UserError for
    a set without images, an image or class folder that is out of place, a slice or an exclusion that does not fit, and
    for an image that cannot be read, with its file.
    """

    def __init__(
        self,
        layout: Layout,
        preprocess: Preprocess,
        rows: Mapping[Any, int | None] | None,
        pick: str = "0::1",
        exclude: Sequence[str] = (),
        keep: Callable[[int], bool] | None = None,
        corruption: Corrupt | None = None,
    ) -> None:
        self.layout = layout
        self.corruption = corruption
        self.path = layout.path
        self.preprocess = preprocess
        chosen = _slice(pick)
        places = [place for place in _without(layout, exclude) if keep is None or keep(place)]
        if rows is not None:
            _check(layout, places, rows, exclude)
            places = [place for place in places if rows[layout.keys[place]] is not None]
        self.total = len(places)
        self.places = places[chosen]
        if not self.places:
            raise UserError(f"pick='{pick}' leaves none of the {self.total} images under {self.path}; widen the slice.")
        labels = [-1 if rows is None else rows[layout.keys[place]] for place in self.places]
        self.labels = [label for label in labels if label is not None]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def names(self) -> list[str]:
        """Return what each image is called."""
        return [self.layout.name(place) for place in self.places]

    @property
    def groups(self) -> list[str]:
        """Return the part of the set that each image belongs to."""
        return [self.layout.groups[place] for place in self.places]

    def fingerprint(self) -> str:
        """Return a hash of which images these are and of their labels."""
        return self._hash(labelled=True)

    def content(self) -> str:
        """Return a hash of which images these are, whatever their labels: equal for the same images in another role."""
        return self._hash(labelled=False)

    @cached_property
    def pool(self) -> str:
        """Return what stored features of these images go under, with their ``ids``: the last folders and the transform.

        Not where the folders lie: the same dataset on another machine has the same features.
        """
        pixels = replace(self.preprocess, mean=(0.0,) * 3, std=(1.0,) * 3)  # normalising is the model's part
        corruption = self.corruption.fingerprint() if self.corruption else ""
        folders = self.path.resolve().parts[-2:]
        digest = hashlib.sha256("\n".join([*folders, self.layout.kind, repr(pixels), corruption]).encode())
        return f"{folders[-1]}-{digest.hexdigest()[:8]}"

    def ids(self, places: Sequence[int]) -> list[int]:
        """Return what tells the images at some places of the layout from others: 63 bits of a hash of their identity."""
        digests = (hashlib.sha256(self.layout.identity(place).encode()).digest() for place in places)
        return [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]

    def raw(self, index: int) -> Tensor:
        """Return the original of an image as (3, H, W) uint8; raises UserError when it cannot be read."""
        return self._raw(self.places[index])

    def at(self, place: int) -> Tensor:
        """Return the image at a place of the layout, (3, S, S) uint8, whether the set picks it or not."""
        image = self._raw(place)
        try:
            if self.corruption is not None:
                return self.corruption.fit(self.preprocess, image, self.layout.name(place))
            return self.preprocess.fit(image).contiguous()
        except BadImage as error:
            raise self._unreadable(place, error) from error

    def _raw(self, place: int) -> Tensor:
        try:
            return self.layout.pixels(place)
        except (BadImage, OSError) as error:
            raise self._unreadable(place, error) from error

    def _unreadable(self, place: int, error: Exception) -> UserError:
        file = self.path / self.layout.name(place)
        return UserError(f"{file} cannot be read as an image: {error}. Replace it or delete it.")

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.at(self.places[index]), self.labels[index]

    def _hash(self, labelled: bool) -> str:
        digest = hashlib.sha256(self.corruption.fingerprint().encode() if self.corruption else b"")
        for place, label in zip(self.places, self.labels, strict=True):
            digest.update(f"{self.layout.identity(place)}{f'/{label}' if labelled else ''}\n".encode())
        return digest.hexdigest()


def _without(layout: Layout, exclude: Sequence[str]) -> list[int]:
    if not exclude:
        return list(range(len(layout)))
    out = set(exclude)
    parts = [layout.parts(place) for place in range(len(layout))]
    present = {part for group in parts for part in group} | {*layout.empty}
    for name in exclude:
        if name not in present:
            raise UserError(
                f"exclude names '{name}', but {layout.path} has no such folder of images{nearest(name, present)}."
            )
    return [place for place, group in enumerate(parts) if out.isdisjoint(group)]


def _check(layout: Layout, places: list[int], rows: Mapping[Any, int | None], exclude: Sequence[str]) -> None:
    """Raise UserError for an image without a class, a class without a row and a class folder without an image."""
    for place in places:
        key = layout.keys[place]
        if key is None:
            raise UserError(
                f"{layout.path / layout.name(place)} lies in no class folder, yet {layout.path} is a labelled set; "
                "expected <class>/<file>."
            )
        if key not in rows:
            close = nearest(str(key), map(str, rows))
            raise UserError(
                f"The class folder {layout.path / str(key)} matches no class name{close}; exclude or rename it."
            )
    for folder in layout.empty:
        if rows.get(folder) is not None and folder not in exclude:
            raise UserError(
                f"The class folder {layout.path / folder} holds no image; put its images back, delete it or exclude it."
            )


def _slice(text: str) -> slice:
    match = PICK.fullmatch(str(text).replace(" ", ""))
    if match is None or match[3] == "0":
        raise UserError(f"pick='{text}' is no slice; write start:stop:step like Python, for example '0::2' or ':500'.")
    return slice(*[int(part) if part else None for part in match.groups()])
