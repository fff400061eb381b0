"""The pass over the images of a suite: each image is decoded once, for every encoder that lacks its features."""

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

from qatlab.core.errors import UserError
from qatlab.core.files import cache_dir
from qatlab.data.preprocess import Preprocess
from qatlab.data.storage.decoded import FOLDER, DecodedImages
from qatlab.evaluation.store import SHARD, FeatureStore
from qatlab.metrics.glmcm import local_mcm
from qatlab.models.patches import with_patches
from qatlab.suites.pools import Pool, places_of, pool_of, pooled
from qatlab.suites.suite import EvaluationSet

# Feature stores whose image ids stay in memory; a few suffice, because consecutive sets mostly share a store.
STORES = 4


class Local(NamedTuple):
    """What ``local_mcm`` needs for the sets of an ID reference: class embeddings (C, D), and its temperature."""

    reference: str
    classes: Tensor
    temperature: float


@dataclass
class Encoder:
    """An encoder and the ``sets`` it is fed with; ``key`` is the ``fingerprint`` of the encoder and of how it is run.

    ``local`` {another key: Local} asks for ``local_mcm`` too, computed from the patches of the same forward.
    """

    key: str
    visual: nn.Module
    preprocess: Preprocess
    sets: Sequence[EvaluationSet]
    local: dict[str, Local] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """Return the key of the features and the keys of the patch scores."""
        return [self.key, *self.local]

    def sets_of(self, key: str) -> list[EvaluationSet]:
        """Return the sets whose images are needed under a key."""
        local = self.local.get(key)
        return [entry for entry in self.sets if local is None or entry.source.reference == local.reference]

    def __call__(self, images: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        """Return {key: (B, D) features or (B, 1) patch scores} for ``keys`` in one forward.

        ``images`` are (B, 3, S, S) uint8. The features are returned whether ``keys`` names them or not.
        """
        normalised = self.preprocess.normalize(images)
        # Patch features cost one more transformer block in each forward,
        # so they are computed only where a patch score is missing.
        if not any(key in self.local for key in keys):
            return {self.key: normalize(self.visual(normalised).float(), dim=-1)}
        features, patches = with_patches(self.visual, normalised)
        found = {self.key: normalize(features.float(), dim=-1)}
        # Patch scores of different images may differ by only 1e-3, and bfloat16 would make such scores equal.
        with torch.autocast(images.device.type, enabled=False):
            for key in keys:
                if key in self.local:
                    _, classes, temperature = self.local[key]
                    scores = local_mcm(patches.float(), classes.to(patches.device), temperature)
                    found[key] = scores[:, None]  # a store holds matrices, so a score is a feature of width 1
        return found


@dataclass
class Work:
    """The work of a pass, summed over processes: images ``decoded``, ``encoded`` by encoder, and bytes ``written``."""

    decoded: int = 0
    encoded: dict[str, int] = field(default_factory=dict)
    written: int = field(default=0, compare=False)

    def __add__(self, other: Work) -> Work:
        """Return the sums of two counts, encoder by encoder."""
        keys = {**self.encoded, **other.encoded}
        encoded = {key: self.encoded.get(key, 0) + other.encoded.get(key, 0) for key in keys}
        return Work(self.decoded + other.decoded, encoded, self.written + other.written)


class Embedder(L.LightningModule):
    """Fills the feature stores of several encoders: a module for ``trainer.predict`` over ``loaders()``.

    The features lie in ``root``/<key>/<pool>. An image that any encoder lacks is decoded, once where the same image
    lies at several places; encoders that have its features skip it. Batches are the same on any number of processes,
    which take turns with them. A process writes its features every SHARD images and when the pass ends early, so that a
    killed process loses no more. ``agree`` gives every process what the first process found missing, because another
    job may be filling the same stores. With ``keep`` decoded images stay on disk for the next pass, of any process and
    encoder.
    """

    def __init__(
        self,
        encoders: Iterable[Encoder],
        root: Path,
        agree: Callable[[Any], Any] = lambda value: value,
        keep: bool = False,
    ) -> None:
        super().__init__()
        # A small set may have no batch for some process, which Lightning refuses unless this attribute allows it.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.encoders, self.root = _merged(encoders), root
        self.counts = Work(encoded={encoder.key: 0 for encoder in self.encoders})
        sets: list[EvaluationSet] = []
        for encoder in self.encoders:
            sets += encoder.sets
        pools = {pool.key: pool for pool in pooled(sets)}
        self.damaged: list[Path] = []
        self._stores: dict[Path, FeatureStore] = {}
        preprocess: dict[str, Preprocess] = {}
        found: dict[tuple[str, str], list[int]] = {}
        # Ids of images that an earlier pool brings to a store, by the store's key and folder: the same image may lie in
        # several pools, and one of these is enough.
        taken: dict[tuple[str, str], set[int]] = {}
        for encoder in self.encoders:
            for key in encoder.keys:
                for pool, places in pooled(encoder.sets_of(key)).items():
                    preprocess[pool.key] = encoder.preprocess
                    store = self._store(key, pool)
                    ids = pool.ids(places)
                    missing = set(store.missing(ids))
                    found[key, pool.key] = _firsts(places, ids, missing, taken.setdefault((key, pool.folder), set()))
                    self.damaged += [file for file in store.damaged if file not in self.damaged]
        # The first process decides for all, because another job may add features between the looks of two processes.
        # With different lists the processes would wait for each other forever.
        self._lacking = {which: set(places) for which, places in agree(found).items()}
        self.work: dict[Pool, list[int]] = {}
        for pool in pools.values():
            # An image is decoded where at least one encoder lacks it; predict_step skips the other encoders.
            wanted: set[int] = set()
            for (_, pool_key), lacked in self._lacking.items():
                if pool_key == pool.key:
                    wanted |= lacked
            if wanted:
                self.work[pool] = sorted(wanted)
        self._kept = {pool: DecodedImages(preprocess[pool.key]) for pool in self.work} if keep else {}
        # The processes of a run must decide alike whether they wait for another run. The decision depends on this
        # number, so the first process counts for all.
        self._undecoded: int = agree(
            sum(
                images.lacks(pool.key, place, of_image)
                for pool, images in self._kept.items()
                for place, of_image in zip(self.work[pool], pool.ids(self.work[pool]), strict=True)
            )
        )
        # Encoded features that are not yet written: {key: [(places of the images in the pool, features), ...]}.
        self._held: dict[str, list[tuple[list[int], Tensor]]] = {}
        self._pool: Pool | None = None  # the pool of the features in _held, which are written at its end
        self._batches: list[list[list[int]]] = []

    @property
    def images(self) -> int:
        """Return how many images are to be decoded."""
        return sum(map(len, self.work.values()))

    def to_make_for_others(self, key: str) -> list[str]:
        """Return names of what a pass makes for other runs too: kept decoded images, and features of an encoder."""
        decoded = {f"decoded-{images.folder.name}" for images in self._kept.values()} if self._undecoded else set()
        lacking = any(places for (of, _), places in self._lacking.items() if of == key)
        # The names are sorted: processes that take several locks in one order cannot wait for each other forever.
        return [*sorted(decoded), *([key] if lacking else [])]

    def require_room(self) -> None:
        """Raise UserError where the disk is too small for the decoded images that are to be kept."""
        # The room is checked before the first image, because a disk that is full after hours would end the pass midway.
        record = max((images.size for images in self._kept.values()), default=0)
        needed, folder = self._undecoded * record, cache_dir(FOLDER)
        if needed > (free := shutil.disk_usage(folder).free):
            raise UserError(
                f"suite.cache=true keeps {self._undecoded} decoded images, {needed / 2**30:.1f} GiB, in {folder}, where "
                f"{free / 2**30:.1f} GiB are free: make room, point QATLAB_CACHE at another disk, or set suite.cache=false."
            )

    def features(self, key: str, entry: EvaluationSet) -> Tensor:
        """Return the features or patch scores (n, D) float32 under ``key`` for a set's images, in its order."""
        pool = pool_of(entry)
        return self._store(key, pool).read(pool.ids(places_of(entry)))

    def loaders(self, batch_size: int, workers: int, rank: int = 0, world: int = 1) -> list[Any]:
        """Return a loader of this process's batches for each pool that has images to decode."""
        # The batches of all pools are divided among the processes as one list; ``turn`` counts the batches of earlier
        # pools. Otherwise the first process would get the only batch of every small pool.
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
        """Have every encoder see the images that it lacks, and write the features once a shard is complete."""
        # A loader process returns a UserError as data, because an error
        # raised there would get the traceback of that process into its text.
        if isinstance(batch, dict):
            raise UserError(batch["mistake"])
        images, places = batch[0], batch[1].tolist()
        pool = self._pool = list(self.work)[dataloader_idx]
        self.counts.decoded += batch[2]
        for encoder in self.encoders:
            lacking = {key: self._lacking.get((key, pool.key), set()) for key in encoder.keys}
            lacked: set[int] = set().union(*lacking.values())
            chosen = [i for i, place in enumerate(places) if place in lacked]
            if not chosen:
                continue
            # Indexing would copy the batch, and in most batches all images are lacked.
            seen = images if len(chosen) == len(images) else images[torch.tensor(chosen, device=images.device)]
            wanted = [key for key, missing in lacking.items() if missing]
            found = encoder(seen, wanted)
            self.counts.encoded[encoder.key] += len(chosen)
            _require_finite(found)
            # All keys keep the same images. An image that only one key lacked is then stored twice under the others,
            # with the same values, which does no harm.
            of_chosen = [places[i] for i in chosen]
            for key in wanted:
                self._held.setdefault(key, []).append((of_chosen, found[key].float().cpu()))
        # After a pool's last batch nothing may stay held, because what follows belongs to another pool.
        last = batch_idx + 1 == len(self._batches[dataloader_idx])
        self.write(pool, 1 if last else SHARD)

    def write(self, pool: Pool, least: int) -> None:
        """Write the features of a pool that this process holds, for each key with at least ``least`` held images."""
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
            with suppress(UserError):  # a full disk, which is then why the pass ended
                self.write(self._pool, least=1)

    def _store(self, key: str, pool: Pool) -> FeatureStore:
        folder = self.root / key / pool.folder
        if folder not in self._stores:
            # A dict keeps its entries in order, so the first entry is the store that was opened longest ago.
            if len(self._stores) == STORES:
                del self._stores[next(iter(self._stores))]
            self._stores[folder] = FeatureStore(folder)
        return self._stores[folder]


def embed(trainer: L.Trainer, embedder: Embedder, batch_size: int, workers: int) -> Work:
    """Fill the stores of ``embedder`` and return the Work of all processes, each of which has to call this.

    Nothing is run where nothing is missing.
    """
    if embedder.work:
        embedder.require_room()
        device = trainer.strategy.root_device
        for encoder in embedder.encoders:
            encoder.visual.to(device).eval()
        loaders = embedder.loaders(batch_size, workers, trainer.global_rank, trainer.world_size)
        try:
            trainer.predict(embedder, loaders, return_predictions=False)
        except BaseException:
            # Ctrl-C and a lost rank arrive here too; images that were encoded before need not be encoded again.
            embedder.rescue()
            raise
    counts = embedder.counts
    # All counts travel in one tensor, because a collective call for each count would take longer.
    taken = torch.tensor([counts.decoded, counts.written, *counts.encoded.values()])
    decoded, written, *encoded = trainer.strategy.reduce(
        taken.to(trainer.strategy.root_device), reduce_op="sum"
    ).tolist()  # type: ignore[union-attr]
    trainer.strategy.barrier()  # the next reader of the stores must find what every process has written
    return Work(decoded, dict(zip(counts.encoded, encoded, strict=True)), written)


def _require_finite(found: dict[str, Tensor]) -> None:
    """Raise UserError for NaN or infinite features before they reach a store, where later runs would read them."""
    for values in found.values():
        broken = int((~values.isfinite().all(1)).sum())
        if broken:
            raise UserError(
                f"the features of {broken} of {len(values)} images are NaN or infinite and were not stored: the encoder overflows. "
                "trainer.precision=32-true and bf16-mixed hold larger values than 16-mixed."
            )


def _firsts(places: Sequence[int], ids: Sequence[int], missing: set[int], taken: set[int]) -> list[int]:
    """Return one place for each missing image whose id is not in ``taken``, and add the ids to ``taken``."""
    found = []
    for place, of_image in zip(places, ids, strict=True):
        if of_image in missing and of_image not in taken:
            taken.add(of_image)
            found.append(place)
    return found


def _merged(encoders: Iterable[Encoder]) -> list[Encoder]:
    """Return one encoder for each key, with all sets and patch scores that are asked of it."""
    merged: dict[str, Encoder] = {}
    for encoder in encoders:
        # Runs that are scored side by side share the full-precision
        # encoder, which sees each image once for all of them.
        known = merged.get(encoder.key)
        if known is None:
            merged[encoder.key] = Encoder(
                encoder.key, encoder.visual, encoder.preprocess, list(encoder.sets), {**encoder.local}
            )
        else:
            known.sets = [*known.sets, *encoder.sets]
            known.local.update(encoder.local)
    return list(merged.values())
