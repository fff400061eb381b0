"""Pools of images: sets that use the same images on disk share one pool, so that each image is decoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qatlab.core.errors import UserError
from qatlab.core.signals import leave_to_parent
from qatlab.data.images.imageset import ImageSet
from qatlab.data.storage.decoded import DecodedImages
from qatlab.suites.suite import EvaluationSet


@dataclass(frozen=True, eq=False)
class Pool:
    """The images of one layout on disk under one corruption, or the images of one rendered set.

    ``key`` identifies the pool on this machine: its paths and how images are prepared. ``folder`` is the folder of its
    features in a store. There features are found by ``ids``; equal images of several pools have the same id.
    """

    key: str
    folder: str
    images: Any
    rendered: bool

    def ids(self, places: Sequence[int]) -> list[int]:
        """Return the ids of the images at some places; a store finds features by these ids."""
        ids: list[int] = self.images.ids(places)
        return ids

    def batch(self, places: list[int]) -> Tensor:
        """Return the images (B, 3, S, S) uint8 at some places; a rendered set draws them together."""
        if self.rendered:
            return torch.stack([image for image, _ in self.images.__getitems__(places)])
        return torch.stack([self.images.at(place) for place in places])

    def kept_batch(self, places: list[int], kept: DecodedImages | None) -> tuple[Tensor, int]:
        """Return the images (B, 3, S, S) uint8 at some places, and how many were decoded; the others were read from ``kept``."""
        if kept is None:
            return self.batch(places), len(places)
        images = torch.empty(len(places), 3, kept.preprocess.size, kept.preprocess.size, dtype=torch.uint8)
        # Each buffer is a view of the batch, so that a kept image is read from disk without a copy.
        buffers = [memoryview(image.numpy().reshape(-1)) for image in images]
        ids = self.ids(places)
        lacking = [i for i, place in enumerate(places) if not kept.read(self.key, place, buffers[i], ids[i])]
        if lacking:
            images[lacking] = self.batch([places[i] for i in lacking])
        for i in lacking:
            kept.write(self.key, places[i], buffers[i], ids[i])
        return images, len(lacking)

    def loader(self, batches: Sequence[list[int]], workers: int, kept: DecodedImages | None) -> DataLoader[Any]:
        """Return the loader of (images (B, 3, S, S) uint8, places (B,) int64, how many were decoded) for ``batches``."""
        return DataLoader(
            _Batches(self, batches, kept),
            batch_size=None,  # items are whole batches, because Lightning would replace a batch sampler before it predicts
            num_workers=0 if self.rendered else workers,  # rendered images are cheaper without loader processes
            worker_init_fn=leave_to_parent,
        )


class _Batches(Dataset[Any]):
    def __init__(self, pool: Pool, batches: Sequence[list[int]], kept: DecodedImages | None) -> None:
        self.pool, self.batches, self.kept = pool, batches, kept

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int] | dict[str, str]:
        places = self.batches[index]
        try:
            images, decoded = self.pool.kept_batch(places, self.kept)
            return images, torch.tensor(places), decoded
        except UserError as error:
            # The sentence is returned, because an error that is raised in a loader process gets a traceback in its
            # text.
            return {"mistake": str(error)}


def pooled(sets: Sequence[EvaluationSet]) -> dict[Pool, list[int]]:
    """Return {pool: places} of ``sets``; the places are those of the images that any of the sets has, sorted."""
    pools: dict[str, Pool] = {}
    places: dict[str, set[int]] = {}
    for entry in sets:
        pool = pool_of(entry)
        known = pools.setdefault(pool.key, pool)
        # Rendered sets of one kind are beginnings of the same endless set, so the longest of them holds all images.
        if pool.rendered and len(pool.images) > len(known.images):
            pools[pool.key] = pool
        places.setdefault(pool.key, set()).update(places_of(entry))
    return {pool: sorted(places[key]) for key, pool in pools.items()}


def distinct(sets: Sequence[EvaluationSet]) -> int:
    """Return how many different images ``sets`` have together."""
    return sum(map(len, pooled(sets).values()))


def pool_of(entry: EvaluationSet) -> Pool:
    """Return the pool that the images of a set belong to."""
    images = entry.images.images
    if isinstance(images, ImageSet):
        layout = images.layout
        # The list and the folder are both in the key, because several lists may name files of one folder, and one list
        # may be used with several folders.
        places = dict.fromkeys((layout.source.resolve(), layout.path.resolve()))
        return Pool(" ".join(map(str, (layout.kind, *places, images.pool))), images.pool, images, rendered=False)
    return Pool(images.pool, images.pool, images, rendered=True)


def places_of(entry: EvaluationSet) -> list[int]:
    """Return the place in the pool of each image of a set, in the order of the set."""
    # Two lookups are needed: a probe takes some images of a set, and the set takes some images of its layout.
    places = entry.images.images.places
    return [places[position] for position in entry.images.places]
