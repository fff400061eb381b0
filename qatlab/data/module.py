"""The training data as a LightningDataModule: each global batch, divided among the ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from qatlab.data.captions import Captioned, CaptionShards, SkipCounter
from qatlab.data.rendered import RenderedStream
from qatlab.data.transforms import Preprocess
from qatlab.errors import UserError

Batch = dict[str, Any]
Tokenizer = Callable[[list[str]], Tensor]


def check_batch(batch_size: int, processes: int) -> None:
    """Raise UserError when ``processes`` cannot share the global batch evenly."""
    if batch_size % processes:
        raise UserError(
            f"fit.batch_size={batch_size} is the global batch and {processes} processes cannot share it evenly; "
            f"choose a multiple of {processes}."
        )


def looped_indices(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """Return (batch_size,) int64, the samples of global batch ``step``: a pure function of its arguments.

    Seeded permutations of 0..n-1, one after another, are cut into batches.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(positions[0] // n, positions[-1] // n + 1)
    orders = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs])
    return orders[positions - epochs.start * n]


class LoopedBatches(IterableDataset[Batch]):
    """Batches ``start_step`` .. ``steps`` - 1 from decoded samples held in memory; this rank has rows ``rank::world``.

    Iterable, because Lightning would give a map-style set a distributed sampler of its own.
    """

    def __init__(
        self,
        samples: Captioned,
        tokens: Tensor | None,
        batch_size: int,
        seed: int,
        share: tuple[int, int],
        steps: range,
    ) -> None:
        self.samples = samples
        self.tokens = tokens
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world = share
        self.steps = steps

    def __iter__(self) -> Iterator[Batch]:
        for step in self.steps:
            chosen = looped_indices(self.seed, step, self.batch_size, len(self.samples.keys))[self.rank :: self.world]
            rows = torch.from_numpy(chosen)
            batch: Batch = {
                "images": self.samples.images[rows],
                "captions": [self.samples.captions[row] for row in chosen],
                "skipped": {},
            }
            if self.tokens is not None:
                batch["tokens"] = self.tokens[rows]
            yield batch


class StreamedBatches(IterableDataset[Batch]):
    """This rank's part of the batches of a stream, each put together by one DataLoader worker, which take turns."""

    def __init__(
        self,
        data: CaptionShards | RenderedStream,
        preprocess: Preprocess,
        tokenizer: Tokenizer | None,
        local_batch: int,
        seed: int,
        share: tuple[int, int],
        steps: range,
    ) -> None:
        self.data = data
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.local_batch = local_batch
        self.seed = seed
        self.rank, self.world = share
        self.steps = steps

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        turns = self.steps[info.id :: info.num_workers] if info else self.steps
        if len(turns) == 0:
            return
        pairs = self.data.stream(self.preprocess, self.seed, self.rank, self.world, self.steps.start)
        for _ in turns:
            taken = list(itertools.islice(pairs, self.local_batch))
            captions = [pair.caption for pair in taken]
            batch: Batch = {
                "images": torch.stack([pair.image for pair in taken]),
                "captions": captions,
                "skipped": dict(SkipCounter.summed(pair.skipped for pair in taken)),
            }
            if self.tokenizer is not None:
                batch["tokens"] = self.tokenizer(captions)
            if taken[0].label is not None:
                batch["labels"] = torch.tensor([pair.label for pair in taken])
            yield batch


class CaptionModule(L.LightningDataModule):
    """Image–caption batches: ``images`` (B, 3, S, S) uint8, ``tokens`` (B, T) int64, ``captions``, ``skipped`` counts.

    B is ``batch_size`` / processes; ``tokens`` is absent without a tokenizer. ``unique_samples`` N loops over the
    first N readable pairs, decoded once; None streams all shards. The loader ends after step ``steps`` - 1 and begins
    at ``start_step``, which a resumed run sets before training; the looped batches are then the ones the interrupted
    run would have seen, the streamed ones a new order. ``skipped`` adds up what this rank's batches left out. Raises
    UserError when the processes cannot share the batch evenly.
    """

    def __init__(
        self,
        data: CaptionShards | RenderedStream,
        preprocess: Preprocess,
        tokenizer: Tokenizer | None,
        batch_size: int,
        unique_samples: int | None,
        workers: int,
        seed: int,
        steps: int,
        start_step: int = 0,
        probes: Sequence[DataLoader[Any]] = (),
    ) -> None:
        super().__init__()
        self.data = data
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.probes = probes
        self.unique_samples = unique_samples
        self.workers = workers
        self.seed = seed
        self.steps = steps
        self.start_step = start_step
        self.skipped = SkipCounter()
        self._looped: tuple[Captioned, Tensor | None] | None = None

    def setup(self, stage: str) -> None:
        """Check the batch against the processes and the shards against the disk, and read the looped samples."""
        _, world = self._share()
        check_batch(self.batch_size, world)
        if self.unique_samples is not None and self.unique_samples < 1:
            raise UserError(
                f"fit.unique_samples={self.unique_samples}; expected at least 1, or null to stream all shards."
            )
        self.data.prepare()
        if self.unique_samples is not None and self._looped is None:
            samples = self.data.first(self.unique_samples, self.preprocess, self.seed)
            self.skipped.update(samples.skipped)
            self._looped = samples, self.tokenizer(samples.captions) if self.tokenizer else None

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of this rank's batches ``start_step`` .. ``steps`` - 1."""
        self.setup("fit")
        rank, world = self._share()
        pinned = torch.cuda.is_available()
        remaining = range(self.start_step, self.steps)
        if self._looped is not None:
            samples, tokens = self._looped
            looped = LoopedBatches(samples, tokens, self.batch_size, self.seed, (rank, world), remaining)
            return DataLoader(looped, batch_size=None, pin_memory=pinned)
        streamed = StreamedBatches(
            self.data,
            self.preprocess,
            self.tokenizer,
            self.batch_size // world,
            self.seed,
            (rank, world),
            remaining,
        )
        # More readers than shards would read the same shard at the same time
        workers = min(self.workers, max(1, len(self.data.prepare()) // world))
        return DataLoader(streamed, batch_size=None, num_workers=workers, pin_memory=pinned)

    def val_dataloader(self) -> Sequence[DataLoader[Any]]:
        """Return the loaders of the probe suite."""
        return self.probes

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add up the skipped samples that the batch brings along from its worker."""
        if isinstance(batch, dict) and "skipped" in batch:
            self.skipped.update(batch["skipped"])
        return batch

    def _share(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
