"""The training data as a LightningDataModule: each global batch, divided among the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from qatlab.data.captions import CaptionShards
from qatlab.data.rendered import RenderedStream
from qatlab.data.samples import Captioned, SkipCounter
from qatlab.data.transforms import Preprocess
from qatlab.errors import UserError
from qatlab.stopping import leave_to_parent

Batch = dict[str, Any]
Tokenizer = Callable[[list[str]], Tensor]
SIGNLESS = 2**63 - 1


def check_batch(batch_size: int, processes: int) -> None:
    """Raise UserError when ``processes`` cannot share the global batch evenly."""
    if batch_size % processes:
        raise UserError(
            f"fit.batch_size={batch_size} is the global batch and {processes} processes cannot share it evenly; "
            f"choose a multiple of {processes}."
        )


def caption_ids(captions: Sequence[str]) -> Tensor:
    """Return (n,) int64, equal for equal captions: the first 63 of the 64 leading bits of each one's SHA-256."""
    digests = [hashlib.sha256(caption.encode(errors="surrogatepass")).digest() for caption in captions]
    return torch.tensor([int.from_bytes(digest[:8], "big") & SIGNLESS for digest in digests], dtype=torch.int64)


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
        self.ids = caption_ids(samples.captions)
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
                "caption_ids": self.ids[rows],
                "rows": rows,
                "skipped": {},
            }
            if self.tokens is not None:
                batch["tokens"] = self.tokens[rows]
            yield batch


class StreamedBatches(IterableDataset[Batch]):
    """This rank's part of the batches of a stream; DataLoader workers take turns over the steps."""

    def __init__(
        self,
        data: CaptionShards | RenderedStream,
        preprocess: Preprocess,
        tokenizer: Tokenizer | None,
        batch_size: int,
        seed: int,
        share: tuple[int, int],
        steps: range,
    ) -> None:
        self.data = data
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world = share
        self.steps = steps

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        try:
            for step in self.steps[info.id :: info.num_workers] if info else self.steps:
                yield self._batch(step)
        except UserError as error:
            if info is None:
                raise
            yield {"mistake": str(error)}  # raised through a worker it would carry the worker's traceback in its text

    def _batch(self, step: int) -> Batch:
        taken = self.data.batch(step, self.batch_size, self.rank, self.world, self.preprocess, self.seed)
        batch: Batch = {
            "images": taken.images,
            "caption_ids": caption_ids(taken.captions),
            "skipped": taken.skipped,
        }
        if self.tokenizer is not None:
            batch["tokens"] = self.tokenizer(taken.captions)
        if taken.labels is not None:
            batch["labels"] = taken.labels
        return batch


class CaptionModule(L.LightningDataModule):
    """Image–caption batches, a dict each.

    ``images`` (B, 3, S, S) uint8; ``caption_ids`` (B,) int64, see ``caption_ids``; ``tokens`` (B, T) int64, absent
    without a tokenizer; ``rows`` (B,) int64, each image's position in ``looped``, only where samples are looped;
    ``labels`` (B,) int64, only of rendered images; ``skipped`` counts by reason. B is ``batch_size`` / processes.

    ``unique_samples`` N loops over the first N readable pairs, decoded once; None streams all shards. The loader begins
    at ``start_step`` and ends after step ``steps`` - 1. Each batch is a pure function of (seed, step, data), so that a
    resumed run sees the batches which the interrupted one would have seen, whatever the number of workers. ``skipped``
    adds up what this rank's batches left out. Raises UserError when the processes cannot share the batch evenly.
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

    @property
    def looped(self) -> Captioned | None:
        """Return the decoded samples that training loops over, after ``setup``; None where shards are streamed."""
        return self._looped[0] if self._looped else None

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
            self.batch_size,
            self.seed,
            (rank, world),
            remaining,
        )
        return DataLoader(
            streamed, batch_size=None, num_workers=self.workers, pin_memory=pinned, worker_init_fn=leave_to_parent
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: how many samples all ranks together have left out, where they are streamed."""
        return {"skipped": dict(self.skipped.gathered())} if self.unique_samples is None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting, on the first rank, from what a checkpoint kept."""
        if self._share()[0] == 0:
            self.skipped.update(state.get("skipped", {}))

    def val_dataloader(self) -> Sequence[DataLoader[Any]]:
        """Return the loaders of the probe suite."""
        return self.probes

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add up the skipped samples that the batch brings along from its worker; raises the UserError that ended one."""
        if isinstance(batch, dict) and "mistake" in batch:
            raise UserError(batch["mistake"])
        if isinstance(batch, dict) and "skipped" in batch:
            self.skipped.update(batch["skipped"])
        return batch

    def _share(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
