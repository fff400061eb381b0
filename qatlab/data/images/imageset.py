"""Image sets: the layout of a dataset on disk, and the torch dataset made of some of its images."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from qatlab.core.contents import HASH, file_hashes, file_stamp, is_young
from qatlab.core.errors import UserError, nearest
from qatlab.core.hashing import digest, sha256
from qatlab.data.corruptions import Corrupt
from qatlab.data.images.classlists import Key
from qatlab.data.images.walk import NOTHING, LeftOut
from qatlab.data.preprocess import BadImage, Preprocess, read_file, read_rgb

PICK = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?")


class Layout:
    """The images of a dataset on disk, in a fixed order; each format of datasets has a subclass.

    ``keys`` has the class of each image (folder, name or number; None without a class). ``groups`` has the part of the
    set that an image belongs to (a background, a severity; "" for none). ``also`` has a second name of each image's
    class, for a list with two columns. Some datasets come with ``class_names``, the names of numbered classes, and with
    prompt ``templates`` ("a photo of a {}"). ``empty`` are class folders without an image, and ``left_out`` counts by
    reason the files in the dataset that are no image of the set.
    """

    kind: ClassVar[str]
    path: Path
    keys: Sequence[Key | None]
    groups: Sequence[str]
    also: Sequence[str] = ()
    class_names: list[str] | None = None
    templates: list[str] | None = None
    empty: Sequence[str] = ()
    left_out: LeftOut = NOTHING
    # ``_contents`` has a hash per image, and ``_hashed`` says which of them are computed. Hashing an image means
    # reading it, so only the images that are asked for are hashed.
    _contents: np.ndarray | None = None
    _hashed: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, place: int) -> str:
        """Return the name of the image at ``place``, the same on every machine: a path below the set, or file and number."""
        raise NotImplementedError

    @property
    def source(self) -> Path:
        """Return the file or folder that lists the images."""
        return self.path

    def contents(self, places: Sequence[int]) -> np.ndarray:
        """Return the sha256 of the stored bytes or pixels of some images, (n, 32) uint8, equal in any folder.

        Hashes are kept, because several sets of a suite may share one layout. Raises OSError or UserError for an image
        that cannot be read.
        """
        if self._contents is None or self._hashed is None:
            self._contents, self._hashed = np.zeros((len(self), HASH), np.uint8), np.zeros(len(self), bool)
        asked = np.asarray(places, np.int64)
        lacking = asked[~self._hashed[asked]]
        if len(lacking):
            self._contents[lacking] = self.hash(lacking.tolist())
            self._hashed[lacking] = True
        found: np.ndarray = self._contents[asked]
        return found

    def hash(self, places: Sequence[int]) -> np.ndarray:
        """Return the sha256 of some images as ``contents`` does; a subclass looks hashes up or computes them here."""
        raise NotImplementedError

    def pixels(self, place: int) -> Tensor:
        """Return an image as (3, H, W) uint8, neither resized nor cropped; raises BadImage or OSError."""
        raise NotImplementedError

    def without_class(self, place: int) -> str:
        """Return the error message for an image without a class in a set that needs classes."""
        return (
            f"{self.path / self.name(place)} lies in no class folder, yet {self.path} is a labelled set; expected "
            "<class>/<file>."
        )

    def parts(self, place: int) -> tuple[str, ...]:
        """Return the names by which ``exclude`` can leave an image out: the folders of its path and its class."""
        key = self.keys[place]
        named = self.class_names[key] if self.class_names and isinstance(key, int) else key
        return (*self.name(place).split("/")[:-1], str(named))


class Files(Layout):
    """A layout in which each image is a file: ``files`` are the paths below ``path``."""

    files: Sequence[str | Path]
    _looked = 0  # time of the first hash of any file of the layout, in ns since 1970; 0 before that

    def name(self, place: int) -> str:
        """Return the path below the folder."""
        return Path(self.files[place]).as_posix()

    def file(self, place: int) -> str:
        """Return the absolute path."""
        return os.path.join(self._tree, self.files[place])

    def hash(self, places: Sequence[int]) -> np.ndarray:
        """Return the sha256 of the bytes of the files at ``places``, (n, 32) uint8."""
        # The time of the first hash is kept: ``pixels`` compares it with the file's time, and so finds a later change.
        self._looked = self._looked or time.time_ns()
        return file_hashes(self._tree, [self.file(place) for place in places], self.stamps(places))

    def stamps(self, places: Sequence[int]) -> list[bytes]:
        """Return the stamp of each file: 16 bytes that differ after a change of path, size, times or inode; OSError."""
        return [file_stamp(self.file(place)) for place in places]

    def pixels(self, place: int) -> Tensor:
        """Return the decoded file at ``place``, (3, H, W) uint8.

        Raises UserError where the file was changed after its content was hashed, BadImage and OSError.
        """
        data = read_file(Path(self.file(place)))
        # The time of the file is read after its content, because otherwise a change between the two would be missed.
        changed = is_young(os.stat(self.file(place)), self._looked)
        if changed and self._looked and sha256([data]) != self.contents([place])[0].tobytes():
            raise UserError(
                f"{self.path / self.files[place]} was changed while the set was being read: give the same command again, "
                "with files that stay."
            )
        return read_rgb(data)

    @cached_property
    def _tree(self) -> Path:
        return self.path.resolve()


class ImageSet(Dataset[tuple[Tensor, int]]):
    """A dataset of some images of a layout; items are (image (3, S, S) uint8, label).

    ``rows`` {key: label, or None for a class that is left out} gives the labels; without it every label is -1.
    ``exclude`` names folders or classes to leave out, and ``keep(place)`` says whether an image belongs to the set.
    ``pick`` is a Python slice as text ("0::2", ":500"), applied to the images that remain; ``total`` is their number
    before it. ``corruption`` is applied to every image, with the image's name as key. Raises UserError for a set
    without images, an image without a class, a class folder without images, a wrong slice or exclusion, and an image
    that cannot be read.
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
        # Excluded images need no class, so classes are checked on the rest only.
        if rows is not None:
            _check(layout, places, rows, exclude)
            places = [place for place in places if rows[layout.keys[place]] is not None]
        self.total = len(places)
        if not places:
            raise UserError(
                f"None of the {len(layout)} images of {self.path} is of the set: its classes, exclude or its role leave all out."
                if len(layout)
                else f"{self.path} holds no image; check that all was downloaded and unpacked."
            )
        # The slice is the last step, so that "0::2" and "1::2" are equal halves of the images that are really used.
        self.places = places[chosen]
        if not self.places:
            raise UserError(f"pick='{pick}' leaves none of the {self.total} images under {self.path}; widen the slice.")
        # No label is None here, because such places were removed above. The second line is for mypy.
        labels = [-1 if rows is None else rows[layout.keys[place]] for place in self.places]
        self.labels = [label for label in labels if label is not None]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def names(self) -> list[str]:
        """Return the name of each image."""
        return [self.layout.name(place) for place in self.places]

    @property
    def groups(self) -> list[str]:
        """Return the part of the set that each image belongs to."""
        return [self.layout.groups[place] for place in self.places]

    def fingerprint(self) -> str:
        """Return a hash of the images, their order and their labels."""
        return self._hash(labelled=True)

    def content(self) -> str:
        """Return a hash of the images and their order, without labels: equal for the same images in another role."""
        return self._hash(labelled=False)

    @cached_property
    def pool(self) -> str:
        """Return the name of the folder for stored features: a hash of preprocessing and corruption.

        In this folder ``ids`` identify the images. Paths and names do not count, so that the same images on another
        machine find the same features.
        """
        # mean and std are left out, because normalising is a part of the model and changes no stored pixel.
        pixels = replace(self.preprocess, mean=(0.0,) * 3, std=(1.0,) * 3)
        corruption = self.corruption.fingerprint() if self.corruption else ""
        done = digest("\n".join([repr(pixels), corruption]))[:16]
        shown = f"{self.corruption.name}-{self.corruption.severity}" if self.corruption else "images"
        return f"{shown}-{self.preprocess.size}-{done}"

    def ids(self, places: Sequence[int]) -> list[int]:
        """Return an id of each image at ``places`` of the layout: 63 bits of a sha256 of its content."""
        # Ids are stored as int64, so they have 63 bits. Among a million images two have the same id with probability <
        # 1e-7.
        return [int.from_bytes(identity[:8], "big") >> 1 for identity in self._identities(places)]

    def raw(self, index: int) -> Tensor:
        """Return an image as (3, H, W) uint8, neither resized nor corrupted; raises UserError if it cannot be read."""
        return self._raw(self.places[index])

    def at(self, place: int) -> Tensor:
        """Return the image at a place of the layout, (3, S, S) uint8; the set need not contain this place."""
        image = self._raw(place)
        try:
            if self.corruption is not None:
                return self.corruption.fit(self.preprocess, image, self.layout.name(place))
            return self.preprocess.fit(image).contiguous()
        except BadImage as error:
            raise _unreadable(self.path / self.layout.name(place), error) from error

    def _raw(self, place: int) -> Tensor:
        try:
            return self.layout.pixels(place)
        except (BadImage, OSError) as error:
            raise _unreadable(self.path / self.layout.name(place), error) from error

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.at(self.places[index]), self.labels[index]

    def _hash(self, labelled: bool) -> str:
        pairs = zip(self._identities(self.places), self.labels, strict=True)
        # A line per image. The order is part of the hash, because predictions are stored in this order.
        lines = (f"{identity.hex()}{f'/{label}' if labelled else ''}\n" for identity, label in pairs)
        return digest(self.corruption.fingerprint() if self.corruption else "", *lines)

    def _identities(self, places: Sequence[int]) -> list[bytes]:
        try:
            found = [row.tobytes() for row in self.layout.contents(places)]
        except OSError as error:
            raise _unreadable(error.filename or self.path, error.strerror or error) from error
        if self.corruption is None:
            return found
        names = [self.layout.name(place).encode(errors="surrogateescape") for place in places]
        # The noise of a corruption depends on the image's name, so equal images with two names become different ones.
        return [sha256([content, name]) for content, name in zip(found, names, strict=True)]


def _unreadable(file: str | Path, reason: object) -> UserError:
    return UserError(f"{file} cannot be read as an image: {reason}. Replace it or delete it.")


def _without(layout: Layout, exclude: Sequence[str]) -> list[int]:
    if not exclude:
        return list(range(len(layout)))
    out = set(exclude)
    parts = [layout.parts(place) for place in range(len(layout))]
    # Empty class folders can be excluded too, because the error for such a folder advises that.
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
            raise UserError(layout.without_class(place))
        if key not in rows:
            close = nearest(str(key), map(str, rows))
            raise UserError(
                f"The class folder {layout.path / str(key)} matches no class name{close}; exclude or rename it."
            )
    for folder in layout.empty:
        if rows.get(folder) is not None and folder not in exclude:
            again = (
                " of its own (it leads to a folder that counts already)" if (layout.path / folder).is_symlink() else ""
            )
            raise UserError(
                f"The class folder {layout.path / folder} holds no image{again}; put its images back, delete it or exclude it."
            )


def _slice(text: str) -> slice:
    match = PICK.fullmatch(str(text).replace(" ", ""))
    if match is None or match[3] == "0":
        raise UserError(f"pick='{text}' is no slice; write start:stop:step like Python, for example '0::2' or ':500'.")
    return slice(*[int(part) if part else None for part in match.groups()])
