"""Which images a suite decodes: sets that share images on disk share them here, whatever their roles and picks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qatlab.data.decoded import DecodedImages
from qatlab.data.sets import ImageSet
from qatlab.data.suites import EvaluationSet
from qatlab.errors import UserError
from qatlab.stopping import leave_to_parent


@dataclass(frozen=True, eq=False)
class Pool:
    """The images of one layout on disk under one corruption, or of one rendered set.

    ``key`` tells pools of a suite apart, ``folder`` is where their features go in a store, under ``ids``.
    """

    key: str
    folder: str
    images: Any
    rendered: bool

    def ids(self, places: Sequence[int]) -> list[int]:
        """Return what the images at some places go by in a store."""
        ids: list[int] = self.images.ids(places)
        return ids

    def batch(self, places: list[int]) -> Tensor:
        """Return the images (B, 3, S, S) uint8 at some places; a rendered set draws them together."""
        if self.rendered:
            return torch.stack([image for image, _ in self.images.__getitems__(places)])
        return torch.stack([self.images.at(place) for place in places])

    def kept_batch(self, places: list[int], kept: DecodedImages | None) -> tuple[Tensor, int]:
        """Return the images at some places and how many of them were decoded; the others were ``kept`` from before."""
        if kept is None:
            return self.batch(places), len(places)
        images = torch.empty(len(places), 3, kept.preprocess.size, kept.preprocess.size, dtype=torch.uint8)
        rows = [memoryview(image.numpy().reshape(-1)) for image in images]
        ids = self.ids(places)
        lacking = [i for i, place in enumerate(places) if not kept.read(self.folder, place, rows[i], ids[i])]
        if lacking:
            images[lacking] = self.batch([places[i] for i in lacking])
        for i in lacking:
            kept.write(self.folder, places[i], rows[i], ids[i])
        return images, len(lacking)

    def loader(self, batches: Sequence[list[int]], workers: int, kept: DecodedImages | None) -> DataLoader[Any]:
        """Return the loader of (images (B, 3, S, S) uint8, places (B,) int64, how many were decoded) for ``batches``."""
        return DataLoader(
            _Batches(self, batches, kept),
            batch_size=None,  # an item is a batch: Lightning takes a batch sampler apart before it predicts
            num_workers=0 if self.rendered else workers,
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
            return {"mistake": str(error)}  # raised through a worker it would carry the worker's traceback in its text


def pooled(sets: Sequence[EvaluationSet]) -> dict[Pool, list[int]]:
    """Return the pools of ``sets`` with the places that some set has, each once, in order."""
    pools: dict[str, Pool] = {}
    places: dict[str, set[int]] = {}
    for entry in sets:
        pool = pool_of(entry)
        known = pools.setdefault(pool.key, pool)
        if pool.rendered and len(pool.images) > len(known.images):
            pools[pool.key] = pool  # the longer beginning of the endless set
        places.setdefault(pool.key, set()).update(places_of(entry))
    return {pool: sorted(places[key]) for key, pool in pools.items()}


def distinct(sets: Sequence[EvaluationSet]) -> int:
    """Return how many images ``sets`` have, those that several share counted once."""
    return sum(map(len, pooled(sets).values()))


def pool_of(entry: EvaluationSet) -> Pool:
    """Return the pool that the images of a set belong to."""
    images = entry.images.images
    if isinstance(images, ImageSet):
        return Pool(f"{images.path.resolve()} {images.pool}", images.pool, images, rendered=False)
    return Pool(images.pool, images.pool, images, rendered=True)


def places_of(entry: EvaluationSet) -> list[int]:
    """Return where in its pool each image of a set stands, in the set's order."""
    places = entry.images.images.places
    return [places[position] for position in entry.images.places]
