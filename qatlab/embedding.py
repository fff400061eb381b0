"""The pass over the images of a suite: each is decoded once and seen once by every encoder that has not seen it yet."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from qatlab.cache import cache_dir
from qatlab.data.decoded import DecodedImages
from qatlab.data.pools import Pool, places_of, pool_of, pooled
from qatlab.data.suites import EvaluationSet
from qatlab.data.transforms import Preprocess
from qatlab.errors import UserError
from qatlab.metrics.glmcm import local_mcm, with_patches
from qatlab.store import SHARD, FeatureStore


class Local(NamedTuple):
    """What ``local_mcm`` compares patches with, for the sets of an ID reference: class embeddings (C, D), and its temperature."""

    reference: str
    classes: Tensor
    temperature: float


@dataclass
class Encoder:
    """An encoder that a pass feeds with ``sets``: ``key`` is the ``fingerprint`` of it and of how it is run.

    ``local`` {key of its own: Local} asks for ``local_mcm`` too, from the patches of the same forward.
    """

    key: str
    visual: nn.Module
    preprocess: Preprocess
    sets: Sequence[EvaluationSet]
    local: dict[str, Local] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """Return the key of the features and those of the patch scores."""
        return [self.key, *self.local]

    def sets_of(self, key: str) -> list[EvaluationSet]:
        """Return the sets whose images are to be seen for a key."""
        local = self.local.get(key)
        return [entry for entry in self.sets if local is None or entry.source.reference == local.reference]

    def __call__(self, images: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        """Return {key: (B, D) features or (B, 1) patch scores} of uint8 ``images`` for ``keys``, and the features, one forward."""
        normalised = self.preprocess.normalize(images)
        if not any(key in self.local for key in keys):
            return {self.key: normalize(self.visual(normalised).float(), dim=-1)}
        features, patches = with_patches(self.visual, normalised)
        found = {self.key: normalize(features.float(), dim=-1)}
        with torch.autocast(images.device.type, enabled=False):
            for key in keys:
                if key in self.local:
                    _, classes, temperature = self.local[key]
                    found[key] = local_mcm(patches.float(), classes.to(patches.device), temperature)[:, None]
        return found


@dataclass
class Counts:
    """What passes took, summed over the processes: images ``decoded`` and ``encoded`` by encoder, and bytes ``written``."""

    decoded: int = 0
    encoded: dict[str, int] = field(default_factory=dict)
    written: int = field(default=0, compare=False)

    def __add__(self, other: Counts) -> Counts:
        """Return both together."""
        keys = {**self.encoded, **other.encoded}
        encoded = {key: self.encoded.get(key, 0) + other.encoded.get(key, 0) for key in keys}
        return Counts(self.decoded + other.decoded, encoded, self.written + other.written)


class Embedder(L.LightningModule):
    """Fills the feature stores of several encoders: a module for ``trainer.predict`` over ``loaders()``.

    The features lie in ``root``/<key>/<pool>. An image that any encoder lacks is decoded; those that have it skip it.
    Batches are the same on any number of processes, which take turns with them; what a process has is written every
    SHARD images, so that one which is killed loses no more of it, and when the pass ends early. ``agree`` gives every
    process what the first one found missing: another job may be filling the same stores. With ``keep`` decoded images
    stay on disk, where the next pass, of another process with another encoder, finds them.
    """

    def __init__(
        self,
        encoders: Iterable[Encoder],
        root: Path,
        agree: Callable[[Any], Any] = lambda value: value,
        keep: bool = False,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a small set may have no batch for some process
        self.encoders, self.root = _merged(encoders), root
        self.counts = Counts(encoded={encoder.key: 0 for encoder in self.encoders})
        pools = {pool.key: pool for pool in pooled([entry for encoder in self.encoders for entry in encoder.sets])}
        self.damaged: list[Path] = []
        preprocess: dict[str, Preprocess] = {}
        found: dict[tuple[str, str], list[int]] = {}
        for encoder in self.encoders:
            for key in encoder.keys:
                for pool, places in pooled(encoder.sets_of(key)).items():
                    preprocess[pool.key] = encoder.preprocess
                    store = self._store(key, pool)
                    ids = pool.ids(places)
                    missing = set(store.missing(ids))
                    found[key, pool.key] = [place for place, i in zip(places, ids, strict=True) if i in missing]
                    self.damaged += store.damaged
        self._lacking = {which: set(places) for which, places in agree(found).items()}
        self.work: dict[Pool, list[int]] = {}
        for pool in pools.values():
            if wanted := set().union(*(places for (_, key), places in self._lacking.items() if key == pool.key)):
                self.work[pool] = sorted(wanted)
        self._kept = {pool: DecodedImages(preprocess[pool.key]) for pool in self.work} if keep else {}
        self._undecoded: int = agree(
            sum(images.lacks(pool.folder, place) for pool, images in self._kept.items() for place in self.work[pool])
        )
        self._held: dict[str, list[tuple[list[int], Tensor]]] = {}
        self._pool: Pool | None = None  # the one they are of
        self._batches: list[list[list[int]]] = []

    @property
    def images(self) -> int:
        """Return how many images are to be decoded."""
        return sum(map(len, self.work.values()))

    def makes(self, key: str) -> list[str]:
        """Return names of what a pass makes that other runs want too: decoded images that are kept, features of an encoder."""
        decoded = {f"decoded-{images.folder.name}" for images in self._kept.values()} if self._undecoded else set()
        lacking = any(places for (of, _), places in self._lacking.items() if of == key)
        return [*sorted(decoded), *([key] if lacking else [])]

    def require_room(self) -> None:
        """Raise UserError where the disk is too small for the decoded images that are to be kept."""
        record = max((images.size for images in self._kept.values()), default=0)
        needed, folder = self._undecoded * record, cache_dir("decoded")
        if needed > (free := shutil.disk_usage(folder).free):
            raise UserError(
                f"suite.cache=true keeps {self._undecoded} decoded images, {needed / 2**30:.1f} GiB, in {folder}, where "
                f"{free / 2**30:.1f} GiB are free: make room, point QATLAB_CACHE at another disk, or set suite.cache=false."
            )

    def features(self, key: str, entry: EvaluationSet) -> Tensor:
        """Return what the store holds under ``key``, (n, D) float32, of a set's images in its order."""
        pool = pool_of(entry)
        return self._store(key, pool).read(pool.ids(places_of(entry)))

    def loaders(self, batch_size: int, workers: int, rank: int = 0, world: int = 1) -> list[Any]:
        """Return one loader per pool with images to decode, of this process's batches."""
        self._batches, turn = [], 0
        for places in self.work.values():
            batches = [places[first : first + batch_size] for first in range(0, len(places), batch_size)]
            self._batches.append(batches[(rank - turn) % world :: world])
            turn += len(batches)
        return [
            pool.loader(batches, workers, self._kept.get(pool))
            for pool, batches in zip(self.work, self._batches, strict=True)
        ]

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Have every encoder that lacks some of the images see those, and write what a shard's end completes."""
        if isinstance(batch, dict):
            raise UserError(batch["mistake"])
        images, places = batch[0], batch[1].tolist()
        pool = self._pool = list(self.work)[dataloader_idx]
        self.counts.decoded += batch[2]
        for encoder in self.encoders:
            lacking = {key: self._lacking.get((key, pool.key), set()) for key in encoder.keys}
            rows = [i for i, place in enumerate(places) if any(place in missing for missing in lacking.values())]
            if not rows:
                continue
            chosen = images if len(rows) == len(images) else images[torch.tensor(rows, device=images.device)]
            wanted = [key for key, missing in lacking.items() if missing]
            found = encoder(chosen, wanted)
            self.counts.encoded[encoder.key] += len(rows)
            for key in wanted:
                self._held.setdefault(key, []).append(([places[row] for row in rows], found[key].float().cpu()))
        last = batch_idx + 1 == len(self._batches[dataloader_idx])
        self.write(pool, 1 if last else SHARD)

    def write(self, pool: Pool, least: int) -> None:
        """Write what this process holds of a pool, of each encoder that has seen ``least`` images since."""
        for key, held in self._held.items():
            if held and sum(len(of) for of, _ in held) >= least:
                ids = pool.ids([place for of, _ in held for place in of])
                features = torch.cat([f for _, f in held])
                self._store(key, pool).write(ids, features)
                self.counts.written += features.nbytes
                held.clear()

    def rescue(self) -> None:
        """Write what a pass that ends early holds, if there is room for it."""
        if self._pool is not None:
            with suppress(UserError):  # a full disk, which is then why it ended
                self.write(self._pool, least=1)

    def _store(self, key: str, pool: Pool) -> FeatureStore:
        return FeatureStore(self.root / key / pool.folder)


def embed(trainer: L.Trainer, embedder: Embedder, batch_size: int, workers: int) -> Counts:
    """Return what it took to fill the stores of ``embedder``; collective, and nothing is run where nothing is missing."""
    if embedder.work:
        embedder.require_room()
        device = trainer.strategy.root_device
        for encoder in embedder.encoders:
            encoder.visual.to(device).eval()
        loaders = embedder.loaders(batch_size, workers, trainer.global_rank, trainer.world_size)
        try:
            trainer.predict(embedder, loaders, return_predictions=False)
        except BaseException:
            embedder.rescue()
            raise
    counts = embedder.counts
    taken = torch.tensor([counts.decoded, counts.written, *counts.encoded.values()])
    decoded, written, *encoded = trainer.strategy.reduce(
        taken.to(trainer.strategy.root_device), reduce_op="sum"
    ).tolist()  # type: ignore[union-attr]
    trainer.strategy.barrier()  # every process has written its part
    return Counts(decoded, dict(zip(counts.encoded, encoded, strict=True)), written)


def _merged(encoders: Iterable[Encoder]) -> list[Encoder]:
    """Return one encoder for each key, with all the sets and patch scores that are asked of it."""
    merged: dict[str, Encoder] = {}
    for encoder in encoders:
        known = merged.get(encoder.key)
        if known is None:
            merged[encoder.key] = Encoder(
                encoder.key, encoder.visual, encoder.preprocess, list(encoder.sets), {**encoder.local}
            )
        else:
            known.sets = [*known.sets, *encoder.sets]
            known.local.update(encoder.local)
    return list(merged.values())
