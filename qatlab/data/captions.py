"""Image–caption pairs from WebDataset shards: calibration images, and the stream that training reads."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import webdataset as wds
from torch import Tensor

from qatlab.data.shards import expand_shards
from qatlab.data.transforms import BadImage, Preprocess
from qatlab.errors import UserError, nearest

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
SHUFFLE_BUFFER = 1000  # undecoded samples held per worker, about 30 to 100 MB of photographs
PATIENCE = 1000  # unreadable samples in a row after which the shards cannot be what the options say

RawSample = dict[str, Any]


class SkipCounter(Counter[str]):
    """How many samples were skipped, by reason."""

    @classmethod
    def summed(cls, counts: Iterable[Mapping[str, int]]) -> SkipCounter:
        """Return the sum of several counts."""
        total = cls()
        for count in counts:
            total.update(count)
        return total

    def gathered(self) -> SkipCounter:
        """Return the sum over all ranks; every rank must call it."""
        if not (dist.is_available() and dist.is_initialized()):
            return SkipCounter(self)
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, dict(self))
        return SkipCounter.summed(counts)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.most_common())
        return f"samples skipped and replaced: {reasons}" if self else "no sample skipped"


@dataclass(frozen=True, eq=False)
class Captioned:
    """Decoded pairs: ``images`` (n, 3, S, S) uint8, their captions and keys, and what was skipped on the way."""

    images: Tensor
    captions: list[str]
    keys: list[str]
    skipped: dict[str, int]


@dataclass(frozen=True, eq=False)
class Pair:
    """One decoded pair: ``image`` (3, S, S) uint8, the samples skipped since the pair before it by reason, and the class.

    Only rendered images have a ``label``.
    """

    image: Tensor
    caption: str
    key: str
    skipped: dict[str, int]
    label: int | None = None


class UnusableSampleError(Exception):
    """A sample without a readable image or caption; the text is the reason that is counted."""


class CaptionShards:
    """Image–caption pairs of WebDataset shards: ``{key}.jpg|jpeg|png|webp`` with ``.txt`` or ``.json`` (img2dataset).

    ``caption_key`` None reads ``.txt``, or where there is none the field ``caption`` of ``.json``; a name reads that
    field of ``.json``, and of several captions in it takes one by a hash of (seed, key). ``name`` goes into every row
    of results; ``text_bank`` names a table of class embeddings for objectives without a text tower. Nothing is opened
    before ``prepare``, which the readers call themselves. A corrupt image or a missing caption is replaced by the
    next sample and counted.
    """

    def __init__(self, shards: Any, name: str, caption_key: str | None = None, text_bank: str | None = None) -> None:
        self.shards = shards
        self.name = name
        self.caption_key = caption_key
        self.text_bank = text_bank
        self._prepared: list[str] | None = None

    def prepare(self) -> list[str]:
        """Return the shards, expanded and checked at the first call; raises UserError as ``expand_shards`` does."""
        if self._prepared is None:
            self._prepared = expand_shards(self.shards)
        return self._prepared

    def first(self, n: int, preprocess: Preprocess, seed: int = 0) -> Captioned:
        """Return the first ``n`` readable pairs in shard order; raises UserError when the shards hold fewer."""
        skipped = SkipCounter()
        sources: Iterable[RawSample] = ({"url": url} for url in self.prepare())
        raw = _samples(sources, len(self.prepare()), skipped)
        pairs = list(itertools.islice(self._pairs(raw, preprocess, seed, skipped), n))
        counts = SkipCounter.summed(pair.skipped for pair in pairs)
        if len(pairs) < n:
            counts.update(skipped)
            raise UserError(
                f"data={self.name} holds {len(pairs)} readable image–caption pairs, {n} are needed ({counts}); "
                f"name more shards in data.shards or ask for fewer samples.{self._advice() if counts else ''}"
            )
        images = torch.empty(n, 3, preprocess.size, preprocess.size, dtype=torch.uint8)
        for row, pair in zip(images, pairs, strict=True):
            row.copy_(pair.image)
        return Captioned(images, [pair.caption for pair in pairs], [pair.key for pair in pairs], dict(counts))

    def stream(
        self, preprocess: Preprocess, seed: int, rank: int = 0, world: int = 1, start_step: int = 0
    ) -> Iterator[Pair]:
        """Return the endless stream of this rank's and this DataLoader worker's pairs.

        Epoch after epoch the shards follow in a new order drawn from ``seed``, and the readers (ranks × workers) take
        turns in that endless list: each shard is read once per epoch over all of them, and with fewer shards than
        readers none runs dry, several then read the same shard in different orders. Samples are shuffled in a bounded
        buffer. A run resumed at ``start_step`` draws orders of its own, so that it does not begin with the first
        samples again.
        """
        info = torch.utils.data.get_worker_info()
        generator = random.Random(f"{seed}/{start_step}/{rank}/{info.id if info else 0}")
        skipped = SkipCounter()
        shards = self.prepare()
        pipeline = wds.DataPipeline(
            partial(_endless_order, shards, f"{seed}/{start_step}"),
            # rank and world come from the trainer: webdataset's own split_by_node reads them from variables that a
            # DataLoader worker under Slurm does not have
            partial(_every, start=rank, step=world),
            wds.split_by_worker,
            partial(_samples, shards=len(shards), skipped=skipped),
            wds.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER // 4, rng=generator),
            partial(self._pairs, preprocess=preprocess, seed=seed, skipped=skipped),
        )
        return iter(pipeline)

    def _pairs(
        self, raw: Iterable[RawSample], preprocess: Preprocess, seed: int, skipped: SkipCounter
    ) -> Iterator[Pair]:
        in_a_row = 0
        for sample in raw:
            try:
                caption = self._caption(sample, seed)
                image = _image(sample, preprocess)
            except UnusableSampleError as reason:
                skipped[str(reason)] += 1
                in_a_row += 1
                if in_a_row == PATIENCE:
                    raise UserError(
                        f"data={self.name}: {PATIENCE} samples in a row are unusable.{self._advice()}"
                    ) from reason
                continue
            in_a_row = 0
            counts = dict(skipped)
            skipped.clear()
            yield Pair(image, caption, sample["__key__"], counts)

    def _caption(self, sample: RawSample, seed: int) -> str:
        if self.caption_key is None and "txt" in sample:
            found: Any = sample["txt"].decode("utf-8", errors="replace")
        else:
            found = _fields(sample).get(self.caption_key or "caption")
        if isinstance(found, list):
            captions = [text.strip() for text in found if isinstance(text, str) and text.strip()]
            found = captions[_hashed(seed, sample["__key__"]) % len(captions)] if captions else None
        if not isinstance(found, str) or not found.strip():
            raise UnusableSampleError("no caption")
        return found.strip()

    def _advice(self) -> str:
        """What the first sample of the first shard is made of, for whoever named the wrong field."""
        sample = next(_samples([{"url": self.prepare()[0]}], 1, SkipCounter()), {})
        parts = sorted(name for name in sample if not name.startswith("__"))
        text = f" The first sample has the parts: {', '.join(parts) or 'none'}"
        try:
            fields = list(_fields(sample))
        except UnusableSampleError as reason:
            return f"{text}, but {reason}."
        if fields:
            text += f", and the .json fields: {', '.join(fields)}{nearest(self.caption_key or 'caption', fields)}"
        return f"{text}; data.caption_key={'null' if self.caption_key is None else self.caption_key}."


def _samples(sources: Iterable[RawSample], shards: int, skipped: SkipCounter) -> Iterator[RawSample]:
    """The undecoded samples of one shard after the other; what cannot be read of a shard is counted and passed over."""
    failed_in_a_row = 0
    for source in sources:
        try:
            for sample in wds.tariterators.tarfile_samples([source]):
                failed_in_a_row = 0
                yield sample
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            skipped["unreadable shard"] += 1
            failed_in_a_row += 1
            if failed_in_a_row > shards:
                raise UserError(f"data.shards: no shard can be read, the last was {source['url']}: {error}.") from error


def _endless_order(shards: list[str], seed: str) -> Iterator[dict[str, str]]:
    for epoch in itertools.count():
        order = list(shards)
        random.Random(f"{seed}/{epoch}").shuffle(order)
        yield from ({"url": url} for url in order)


def _every(source: Iterable[Any], start: int, step: int) -> Iterator[Any]:
    return itertools.islice(source, start, None, step)


def _image(sample: RawSample, preprocess: Preprocess) -> Tensor:
    data = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
    if data is None:
        raise UnusableSampleError("no image")
    try:
        return preprocess.decode(data)
    except BadImage as error:
        raise UnusableSampleError("corrupt image") from error


def _fields(sample: RawSample) -> dict[str, Any]:
    try:
        fields = json.loads(sample.get("json", b"{}"))
    except ValueError as error:
        raise UnusableSampleError("unreadable json") from error
    return fields if isinstance(fields, dict) else {}


def _hashed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big")
