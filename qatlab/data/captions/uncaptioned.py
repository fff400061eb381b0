"""A folder of images without captions as data: it serves for calibration, and for training that imitates a teacher."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from qatlab.core.errors import UserError
from qatlab.core.files import user_path
from qatlab.core.hashing import digest
from qatlab.data.captions.order import Order
from qatlab.data.captions.samples import Captioned, SkipCounter
from qatlab.data.captions.source import PATIENCE
from qatlab.data.images.folders import Folders
from qatlab.data.preprocess import BadImage, Preprocess


class ImageFolder:
    """The images below a folder, at any depth and of any names, without captions.

    ``name``, by default the name of the folder, is stored in every row of results. ``text_bank`` names a table of class
    embeddings for objectives that need texts. Nothing is opened before ``prepare``, which the reading methods call
    themselves. An image that cannot be read is counted and replaced by another image.
    """

    captioned = False

    def __init__(self, path: str | None, name: str | None = None, text_bank: str | None = None) -> None:
        self.path = path
        self.name = name or Path(path or "images").name
        self.text_bank = text_bank
        self._order: Order | None = None

    def prepare(self) -> list[str]:
        """Return the names of the images, listed at the first call; raises UserError for a folder without any."""
        return self.urls

    def fingerprint(self) -> str:
        """Return 16 hex digits, a hash of the contents of the images in the order of their names."""
        return digest(self._images.contents(range(len(self._images))).tobytes())[:16]

    def first(self, n: int, preprocess: Preprocess, seed: int = 0) -> Captioned:
        """Return ``n`` readable images, always the same ones of a folder; raises UserError where the folder holds fewer.

        They are drawn at random from all images, and ``seed`` has no effect. The first images by name would not do:
        where each class has a folder, they would all be of one class.
        """
        drawn = Order(self, seed=0)
        reading = _Reading(self._images, n, preprocess)
        row = 0
        for position in range(len(self._images)):
            row += reading.read(row, drawn.locate(position)[0])
            if row == n:
                return reading.result()
        raise UserError(
            f"data.path={self.path} holds {row} readable images, {n} are needed ({reading.skipped}): add some, or ask for "
            "fewer (quant.calibration_images, fit.unique_samples)."
        )

    def require(self, n: int) -> None:
        """Raise UserError where the folder holds fewer than ``n`` images; none is opened."""
        if (held := len(self.urls)) < n:
            raise UserError(
                f"fit.unique_samples={n}: data.path={self.path} holds {held} images; add some, or ask for fewer."
            )

    def batch(self, step: int, batch_size: int, rank: int, world: int, preprocess: Preprocess, seed: int) -> Captioned:
        """Return the rows ``rank::world`` of global batch ``step``: a pure function of the arguments and the images.

        An image that cannot be read is replaced by the one at the same place in the next batch. Raises UserError after
        PATIENCE unreadable images in a row.
        """
        if self._order is None or self._order.seed != seed:
            self._order = Order(self, seed)
        places = list(enumerate(range(step * batch_size + rank, (step + 1) * batch_size, world)))
        reading = _Reading(self._images, len(places), preprocess)
        while places:
            unusable = [place for place in places if not reading.read(place[0], self._order.locate(place[1])[0])]
            places = [(row, position + batch_size) for row, position in unusable]
        return reading.result()

    # ``Order`` needs shards. Every image is given to it as a shard with one sample.
    @cached_property
    def urls(self) -> list[str]:
        """Return the names of the images below the folder, sorted."""
        return [self._images.name(place) for place in range(len(self._images))]

    def count(self, shard: int) -> int:
        """Return 1, because for ``Order`` every image is a shard of its own."""
        return 1

    @cached_property
    def _images(self) -> Folders:
        if not self.path:
            raise UserError("data.path is missing: say which folder of images to calibrate on, data.path=FOLDER.")
        if not user_path(self.path).is_dir():
            raise UserError(f"data.path={self.path} is no folder: give one that holds images, at any depth.")
        return Folders(self.path)


class _Reading:
    """A buffer of rows that is filled with images one by one, with counts of the images that were skipped."""

    def __init__(self, images: Folders, rows: int, preprocess: Preprocess) -> None:
        self.source, self.preprocess = images, preprocess
        self.images = torch.empty(rows, 3, preprocess.size, preprocess.size, dtype=torch.uint8)
        self.places = [0] * rows
        self.skipped = SkipCounter()
        self.in_a_row = 0

    def read(self, row: int, place: int) -> bool:
        """Return whether the image could be read and has filled ``row``; else it is counted.

        Raises UserError after PATIENCE unreadable images in a row.
        """
        try:
            self.images[row] = self.preprocess.fit(self.source.pixels(place))
        except (BadImage, OSError) as error:
            self.skipped["corrupt image"] += 1
            self.in_a_row += 1
            if self.in_a_row == PATIENCE:
                raise UserError(
                    f"{PATIENCE} images in a row below {self.source.path} cannot be read, the last is {self.source.name(place)} "
                    f"({error})."
                ) from error
            return False
        self.places[row] = place
        self.in_a_row = 0
        return True

    def result(self) -> Captioned:
        """Return the filled rows."""
        return Captioned(self.images, [], [self.source.name(place) for place in self.places], dict(self.skipped))
