"""Image–caption pairs from WebDataset shards: calibration images, and the batches that training reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qatlab.cache import digest
from qatlab.data.decoded import DecodedImages
from qatlab.data.fetch import is_local, shown
from qatlab.data.order import Order
from qatlab.data.samples import UNREADABLE, Captioned, SkipCounter
from qatlab.data.shards import expand_shards
from qatlab.data.tars import Sample, Shards
from qatlab.data.transforms import BadImage, Preprocess
from qatlab.errors import UserError, nearest

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
PATIENCE = 1000  # unreadable samples in a row after which the shards cannot be what the options say


class UnusableSampleError(Exception):
    """A sample without a readable image or caption; the text is the reason that is counted."""


class CaptionShards:
    """Image–caption pairs of WebDataset shards: ``{key}.jpg|jpeg|png|webp`` with ``.txt`` or ``.json`` (img2dataset).

    ``caption_key`` None reads ``.txt``, or where there is none the field ``caption`` of ``.json``; a name reads that
    field of ``.json``, and of several captions in it takes one by a hash of (seed, key). ``name`` goes into every row
    of results; ``text_bank`` names a table of class embeddings for objectives without a text tower; ``cache`` keeps
    decoded images on disk, which changes no pixel. Nothing is opened before ``prepare``, which the readers call
    themselves; a shard is opened, and a remote one fetched into the cache (``fetch.local_file``), when a sample of it
    is first needed. A corrupt image or a missing caption is replaced by another sample and counted; a damaged shard
    gives the samples before the damage and is counted under its name.
    """

    def __init__(
        self,
        shards: Any,
        name: str,
        caption_key: str | None = None,
        text_bank: str | None = None,
        cache: bool = False,
    ) -> None:
        self.shards = shards
        self.name = name
        self.caption_key = caption_key
        self.text_bank = text_bank
        self.cache = cache
        self._tars: Shards | None = None
        self._order: Order | None = None
        self._decoded: DecodedImages | None = None

    def prepare(self) -> list[str]:
        """Return the shards, expanded and checked at the first call; raises UserError as ``expand_shards`` does."""
        return self.tars.urls

    def fingerprint(self) -> str:
        """Return 16 hex digits that tell which shards these are: their URLs, or names and sizes of files, in order."""
        urls = self.prepare()
        sized = [f"{Path(url).name}/{Path(url).stat().st_size}" if is_local(url) else url for url in urls]
        return digest("\n".join(sized))[:16]

    def first(self, n: int, preprocess: Preprocess, seed: int = 0) -> Captioned:
        """Return the first ``n`` readable pairs in shard order.

        Raises UserError when the shards hold fewer, or the memory does not hold so many images.
        """
        try:
            reading = Reading(self, n, preprocess, seed)
        except RuntimeError as error:
            size = n * 3 * preprocess.size**2 / 2**30
            raise UserError(f"{n} decoded images take {size:.0f} GiB of memory; ask for fewer samples.") from error
        row = 0
        for shard, number in self._places(reading.skipped):
            row += reading.read(row, shard, number)
            if row == n:
                return reading.result()
        raise UserError(
            f"data={self.name} holds {row} readable image–caption pairs, {n} are needed ({reading.skipped}); "
            f"name more shards in data.shards or ask for fewer samples.{self.advice() if reading.skipped else ''}"
        )

    def batch(self, step: int, batch_size: int, rank: int, world: int, preprocess: Preprocess, seed: int) -> Captioned:
        """Return the rows ``rank::world`` of global batch ``step``: a pure function of the arguments and the shards.

        The batch covers the positions ``step * batch_size`` … of ``Order``. An unusable sample at position p is
        replaced by the one at p + ``batch_size``, the same place in the next batch, or the next of those that can be
        read. Damaged shards are counted by rank 0, in the batch that reaches them. Raises UserError after PATIENCE
        unusable samples in a row.
        """
        if self._order is None or self._order.seed != seed:
            self._order = Order(self.tars, seed)
        first, stop = step * batch_size, (step + 1) * batch_size
        places = list(enumerate(range(first + rank, stop, world)))
        reading = Reading(self, len(places), preprocess, seed)
        while places:
            unusable = [place for place in places if not reading.read(place[0], *self._order.locate(place[1]))]
            places = [(row, position + batch_size) for row, position in unusable]
        if rank == 0:
            begun = self._order.beginning(first, stop)
            reading.skipped.update(
                UNREADABLE + shown(self.tars.urls[shard]) for shard in begun if shard in self.tars.damage
            )
        return reading.result()

    def caption(self, sample: Sample, seed: int) -> str:
        """Return the caption of a sample; raises UnusableSampleError when it has none."""
        if self.caption_key is None and "txt" in sample.parts:
            found: Any = sample.read("txt").decode("utf-8", errors="replace")
        else:
            found = _fields(sample).get(self.caption_key or "caption")
        if isinstance(found, list):
            captions = [text.strip() for text in found if isinstance(text, str) and text.strip()]
            found = captions[_hashed(seed, sample.key) % len(captions)] if captions else None
        if not isinstance(found, str) or not found.strip():
            raise UnusableSampleError("no caption")
        return found.strip()

    def advice(self) -> str:
        """Return what the first sample is made of, for whoever named the wrong field."""
        shard = next(shard for shard in range(len(self.tars.urls)) if self.tars.count(shard))
        sample = self.tars.sample(shard, 0)
        text = f" The first sample has the parts: {', '.join(sorted(sample.parts)) or 'none'}"
        try:
            fields = list(_fields(sample))
        except UnusableSampleError as reason:
            return f"{text}, but {reason}."
        if fields:
            text += f", and the .json fields: {', '.join(fields)}{nearest(self.caption_key or 'caption', fields)}"
        return f"{text}; data.caption_key={'null' if self.caption_key is None else self.caption_key}."

    @property
    def tars(self) -> Shards:
        """Return the shards as tables of samples."""
        if self._tars is None:
            self._tars = Shards(self._expanded())
        return self._tars

    def decoded(self, preprocess: Preprocess) -> DecodedImages | None:
        """Return the cache of decoded images, or None without ``cache``."""
        if self.cache and (self._decoded is None or self._decoded.preprocess != preprocess):
            self._decoded = DecodedImages(preprocess)
        return self._decoded

    def _expanded(self) -> list[str]:
        return expand_shards(self.shards)

    def _places(self, skipped: SkipCounter) -> Iterator[tuple[int, int]]:
        """(shard, number) of every sample, one shard after the other; damaged shards are counted."""
        for shard, url in enumerate(self.tars.urls):
            count = self.tars.count(shard)
            if shard in self.tars.damage:
                skipped[UNREADABLE + shown(url)] += 1
            yield from ((shard, number) for number in range(count))


class Reading:
    """Rows that are being filled from samples, and what was skipped on the way."""

    def __init__(self, source: CaptionShards, rows: int, preprocess: Preprocess, seed: int) -> None:
        self.source = source
        self.preprocess = preprocess
        self.seed = seed
        self.skipped = SkipCounter()
        self.images = torch.empty(rows, 3, preprocess.size, preprocess.size, dtype=torch.uint8)
        self.pixels = self.images.view(-1).numpy().data
        self.captions = [""] * rows
        self.keys = [""] * rows
        self.in_a_row = 0

    def read(self, row: int, shard: int, number: int) -> bool:
        """Fill a row and return True, or count why the sample cannot be used; raises UserError after PATIENCE of them."""
        sample = self.source.tars.sample(shard, number)
        try:
            self.captions[row], self.keys[row] = self.source.caption(sample, self.seed), sample.key
            self._image(row, shard, number, sample)
        except UnusableSampleError as reason:
            self.skipped[str(reason)] += 1
            self.in_a_row += 1
            if self.in_a_row == PATIENCE:
                raise UserError(
                    f"data={self.source.name}: {PATIENCE} samples in a row are unusable.{self.source.advice()}"
                ) from reason
            return False
        self.in_a_row = 0
        return True

    def result(self) -> Captioned:
        """Return the filled rows."""
        return Captioned(self.images, self.captions, self.keys, dict(self.skipped))

    def _image(self, row: int, shard: int, number: int, sample: Sample) -> None:
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample.parts), None)
        if suffix is None:
            raise UnusableSampleError("no image")
        decoded, index = self.source.decoded(self.preprocess), self.source.tars.index(shard)
        size = self.images[row].numel()
        pixels = self.pixels[row * size : (row + 1) * size]
        if decoded and decoded.read(index.identity, number, pixels):
            return
        try:
            self.images[row] = self.preprocess.decode(sample.read(suffix))
        except BadImage as error:
            raise UnusableSampleError("corrupt image") from error
        if decoded:
            decoded.write(index.identity, number, pixels)


def _fields(sample: Sample) -> dict[str, Any]:
    try:
        fields = json.loads(sample.read("json")) if "json" in sample.parts else {}
    except ValueError as error:
        raise UnusableSampleError("unreadable json") from error
    return fields if isinstance(fields, dict) else {}


def _hashed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode(errors="surrogateescape")).digest()[:8], "big")
