"""Image–caption pairs from WebDataset shards: calibration images, and the batches that training reads."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch

from qatlab.core.domains import Kind, Some, Takes
from qatlab.core.errors import UserError, nearest
from qatlab.core.hashing import Part, digest, sha256
from qatlab.core.secrets import shown
from qatlab.data.captions.locate import expand_shards
from qatlab.data.captions.order import Order
from qatlab.data.captions.samples import UNREADABLE, Captioned, SkipCounter
from qatlab.data.preprocess import BadImage, Preprocess
from qatlab.data.storage.decoded import DecodedImages
from qatlab.data.storage.fetch import is_local
from qatlab.data.storage.tars import Sample, Shards

# Characters that show nothing although Unicode counts them as letters or symbols: Hangul fillers, the empty braille
# cell.
BLANK = "\u115f\u1160\u2800\u3164\uffa0"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# ``sampled`` reads EDGE bytes at each end of a shard, and BLOCK bytes at each of SAMPLES places between them.
EDGE, BLOCK, SAMPLES = 2**16, 2**12, 16
# After this many unusable samples in a row qatlab stops: most likely an option is wrong, such as caption_key.
PATIENCE = 1000


class UnusableSampleError(Exception):
    """A sample without a readable image or caption; its text is the reason under which the sample is counted."""


class CaptionShards:
    """Image–caption pairs of WebDataset shards: ``{key}.jpg|jpeg|png|webp`` with ``.txt`` or ``.json`` (img2dataset).

    Without a ``caption_key`` the caption is the ``.txt`` part, or if that is missing the field ``caption`` of
    ``.json``. With a ``caption_key`` it is this field of ``.json``; from a list of captions one is chosen by a hash of
    (seed, key). ``name`` is stored in every row of results. ``text_bank`` names a table of class embeddings for
    objectives without a text tower. ``cache`` keeps decoded images on disk, which changes no pixel.

    Nothing is opened before ``prepare``, which the reading methods call themselves. A shard is opened, and a remote
    shard is fetched into the cache (``fetch.local_file``), when one of its samples is first needed. A sample with a
    corrupt image, or with a caption that is missing, invisible or no UTF-8, is counted and replaced by another sample.
    A damaged shard gives the samples before the damage, and is counted under its name.
    """

    captioned = True

    def __init__(
        self,
        shards: Annotated[Any, Takes(str | Annotated[list[str], Some()] | None)],
        name: str,
        caption_key: str | None = None,
        text_bank: Annotated[str, Kind("FILE.safetensors:TABLE")] | None = None,
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
        """Return 16 hex digits, a hash of what the shards hold, in order.

        A local shard is hashed by parts of its content (``sampled``), so that its name and folder do not matter. A
        remote shard is hashed by its URL without secrets, because it is not fetched before a sample of it is needed.
        """
        told = [sampled(Path(url)) if is_local(url) else shown(url) for url in self.prepare()]
        return digest("\n".join(told))[:16]

    def first(self, n: int, preprocess: Preprocess, seed: int = 0) -> Captioned:
        """Return the first ``n`` readable pairs in shard order.

        Raises UserError when the shards hold fewer pairs, or when the images do not fit into memory.
        """
        try:
            reading = Reading(self, n, preprocess, seed)
        except RuntimeError as error:
            size = n * 3 * preprocess.size**2 / 2**30
            raise UserError(f"{n} decoded images take {size:.0f} GiB of memory; ask for fewer samples.") from error
        # A sample that cannot be used fills no row, so the next sample gets this row and the result has no gaps.
        row = 0
        for shard, number in self._places(reading.skipped):
            row += reading.read(row, shard, number)
            if row == n:
                return reading.result()
        raise UserError(
            f"data={self.name} holds {row} readable image–caption pairs, {n} are needed ({reading.skipped}); "
            f"name more shards in data.shards or ask for fewer samples.{self.advice() if reading.skipped else ''}"
        )

    def require(self, n: int) -> None:
        """Raise UserError where the shards hold fewer than ``n`` pairs; pairs are counted and not decoded."""
        held = sum(1 for _ in islice(self._places(SkipCounter()), n))
        if held < n:
            raise UserError(
                f"fit.unique_samples={n}: data={self.name} holds {held} image–caption pairs; ask for fewer, or name more "
                "shards in data.shards."
            )

    def batch(self, step: int, batch_size: int, rank: int, world: int, preprocess: Preprocess, seed: int) -> Captioned:
        """Return the rows ``rank::world`` of global batch ``step``: a pure function of the arguments and the shards.

        The batch covers the positions from ``step * batch_size`` on of ``Order``. An unusable sample at position p is
        replaced by the sample at p + ``batch_size``, the same place in the next batch; if that is unusable too, by the
        one at p + 2 · ``batch_size``, and so on. Rank 0 counts a damaged shard in the batch that reaches it. Raises
        UserError after PATIENCE unusable samples in a row.
        """
        if self._order is None or self._order.seed != seed:
            self._order = Order(self.tars, seed)
        first, stop = step * batch_size, (step + 1) * batch_size
        # Row i of the global batch is position first + i, for any number of ranks.
        places = list(enumerate(range(first + rank, stop, world)))
        reading = Reading(self, len(places), preprocess, seed)
        while places:
            # Each round tries the rows that are still empty, because a replacement may be unusable too.
            unusable = [place for place in places if not reading.read(place[0], *self._order.locate(place[1]))]
            places = [(row, position + batch_size) for row, position in unusable]
        # Every rank may read a damaged shard, but only rank 0 counts it: the counts are added over the ranks later.
        if rank == 0:
            begun = self._order.beginning(first, stop)
            reading.skipped.update(
                UNREADABLE + shown(self.tars.urls[shard]) for shard in begun if shard in self.tars.damage
            )
        return reading.result()

    def caption(self, sample: Sample, seed: int) -> str:
        """Return the caption of a sample; raises UnusableSampleError when it has none."""
        try:
            if self.caption_key is None and "txt" in sample.parts:
                found: Any = sample.read("txt").decode("utf-8")
            else:
                found = _fields(sample).get(self.caption_key or "caption")
        # UnicodeDecodeError: the caption is no UTF-8. BadImage: the part is larger than limits.member_bytes.
        except (UnicodeDecodeError, BadImage) as error:
            raise UnusableSampleError("unreadable caption") from error
        given = found if isinstance(found, list) else [found]
        texts = [_stripped(text) for text in given if isinstance(text, str)]
        captions = [text for text in texts if _visible(text) and not _garbled(text)]
        if not captions:
            raise UnusableSampleError("unreadable caption" if any(map(_garbled, texts)) else "no caption")
        # The hash of seed and key gives a sample the same caption in every epoch, worker and resumed run.
        return captions[_hashed(seed, sample.key) % len(captions)] if len(captions) > 1 else captions[0]

    def advice(self) -> str:
        """Return a text on the parts and fields of the first sample, which helps a user who named the wrong field."""
        shard = next(shard for shard in range(len(self.tars.urls)) if self.tars.count(shard))
        sample = self.tars.sample(shard, 0)
        text = f" The first sample has the parts: {', '.join(sorted(sample.parts)) or 'none'}"
        try:
            fields = _fields(sample)
        except (UnusableSampleError, BadImage) as reason:
            return f"{text}, but {reason}."
        if fields:
            text += f", and the .json fields: {', '.join(fields)}"
            wanted = self.caption_key or "caption"
            text += nearest(wanted, fields) if wanted not in fields else f" ({wanted} holds {_kind(fields[wanted])})"
        return f"{text}; data.caption_key={'null' if self.caption_key is None else self.caption_key}."

    @property
    def tars(self) -> Shards:
        """Return the shards as tables of samples."""
        if self._tars is None:
            self._tars = Shards(self._expanded())
        return self._tars

    def decoded(self, preprocess: Preprocess) -> DecodedImages | None:
        """Return the cache of decoded images, or None without ``cache``."""
        # A second model in the same process may have another preprocessing, and then needs another cache.
        if self.cache and (self._decoded is None or self._decoded.preprocess != preprocess):
            self._decoded = DecodedImages(preprocess)
        return self._decoded

    def _expanded(self) -> list[str]:
        return expand_shards(self.shards)

    def _places(self, skipped: SkipCounter) -> Iterator[tuple[int, int]]:
        """Yield (shard, number) of every sample, one shard after the other; damaged shards are counted in ``skipped``."""
        for shard, url in enumerate(self.tars.urls):
            count = self.tars.count(shard)
            if shard in self.tars.damage:
                skipped[UNREADABLE + shown(url)] += 1
            yield from ((shard, number) for number in range(count))


class Reading:
    """A buffer of rows that is filled from samples one by one, with counts of the samples that were skipped."""

    def __init__(self, source: CaptionShards, rows: int, preprocess: Preprocess, seed: int) -> None:
        self.source = source
        self.preprocess = preprocess
        self.seed = seed
        self.skipped = SkipCounter()
        self.images = torch.empty(rows, 3, preprocess.size, preprocess.size, dtype=torch.uint8)
        # A flat view of the memory of the images: the cache of decoded images reads straight into it.
        self.pixels = self.images.view(-1).numpy().data
        self.captions = [""] * rows
        self.keys = [""] * rows
        self.in_a_row = 0

    def read(self, row: int, shard: int, number: int) -> bool:
        """Return whether the sample could be used and has filled ``row``; the reason why not is counted.

        Raises UserError after PATIENCE unusable samples in a row.
        """
        sample = self.source.tars.sample(shard, number)
        try:
            self.captions[row], self.keys[row] = self.source.caption(sample, self.seed), sample.key
            self._image(row, shard, number, sample)
        except UnusableSampleError as reason:
            self.skipped[str(reason)] += 1
            self.in_a_row += 1
            # A wrong caption_key makes every sample unusable, and the search for a usable one would never end.
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
        index = self.source.tars.index(shard)
        # Images of a tar that was written just now are not cached: the tar may change without a change of its times.
        decoded = self.source.decoded(self.preprocess) if index.settled else None
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


def sampled(file: Path) -> str:
    """Return a hash of a file's size, its first and last 64 KiB and SAMPLES blocks of 4 KiB between them.

    Only 192 KiB are read of a file of any size: the first and last samples, and parts of images in between. The hash
    differs for a file that was made again with other content, but it misses a change of single bytes elsewhere.
    """
    with file.open("rb") as shard:
        size = os.fstat(shard.fileno()).st_size
        parts: list[Part] = [str(size)]
        between = [(size * i // (SAMPLES + 1), BLOCK) for i in range(1, SAMPLES + 1)]
        # The end is read because two downloads of different length differ in their last samples.
        for place, length in [(0, EDGE), *between, (max(0, size - EDGE), EDGE)]:
            shard.seek(place)
            parts.append(shard.read(length))
    return digest(*parts)


def _fields(sample: Sample) -> dict[str, Any]:
    try:
        fields = json.loads(sample.read("json")) if "json" in sample.parts else {}
    except (ValueError, RecursionError) as error:
        raise UnusableSampleError("unreadable json") from error
    return fields if isinstance(fields, dict) else {}


def _stripped(text: str) -> str:
    """Return a text without the spaces around it and without a byte order mark before it."""
    # The mark may stand between spaces, so spaces are removed before and after.
    return text.strip().removeprefix("\ufeff").strip()


def _visible(text: str) -> bool:
    """Return whether a text shows anything: one letter that is no space, no control and no invisible joiner."""
    return any(
        unicodedata.category(letter) not in ("Cc", "Cf", "Zs", "Zl", "Zp") and letter not in BLANK for letter in text
    )


def _garbled(text: str) -> bool:
    """Return whether a text was damaged: it holds a NUL, or half of a surrogate pair."""
    # UTF-16 that is read as UTF-8 has a NUL for every other letter, and JSON may hold half of a pair, such as \ud83d.
    return _visible(text) and ("\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text))


def _kind(value: Any) -> str:
    """Return in words the kind of a value that was found instead of a caption."""
    if isinstance(value, str):
        return "text that can be read" if value.strip() else "empty text"
    if isinstance(value, list):
        return f"a list of {type(value[0]).__name__}" if value else "an empty list"
    return type(value).__name__


def _hashed(seed: int, key: str) -> int:
    return int.from_bytes(sha256([f"{seed}/{key}"])[:8], "big")
