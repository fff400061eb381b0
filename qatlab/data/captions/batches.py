"""The training data as a LightningDataModule: each global batch, divided among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from qatlab.core.errors import UserError
from qatlab.core.hashing import sha256
from qatlab.core.signals import leave_to_parent
from qatlab.data.captions.samples import Captioned, SkipCounter
from qatlab.data.captions.source import CaptionShards
from qatlab.data.captions.uncaptioned import ImageFolder
from qatlab.data.preprocess import Preprocess
from qatlab.data.rendered import RenderedStream

Batch = dict[str, Any]
Tokenizer = Callable[[list[str]], Tensor]
SIGNLESS = 2**63 - 1  # all bits of an int64 but its sign


def check_batch(batch_size: int, processes: int) -> None:
    """Raise UserError when ``processes`` cannot share the global batch evenly."""
    if batch_size % processes:
        raise UserError(
            f"fit.batch_size={batch_size} is the global batch and {processes} processes cannot share it evenly; "
            f"choose a multiple of {processes}."
        )


def caption_ids(captions: Sequence[str]) -> Tensor:
    """Return an id per caption, (n,) int64, equal for equal captions: 63 of the first 64 bits of the caption's SHA-256."""
    # surrogatepass: a caption may hold half a surrogate pair, which plain UTF-8 refuses to encode.
    digests = [sha256([caption.encode(errors="surrogatepass")]) for caption in captions]
    return torch.tensor([int.from_bytes(digest[:8], "big") & SIGNLESS for digest in digests], dtype=torch.int64)


def looped_indices(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """Return (batch_size,) int64, the samples of global batch ``step``: a pure function of its arguments.

    Seeded permutations of 0..n-1, one after another, are cut into batches.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    # A batch may lie across the end of an epoch, or, with few samples, hold several epochs.
    epochs = range(positions[0] // n, positions[-1] // n + 1)
    # Each epoch is seeded by its number: a resumed run needs none of the earlier draws.
    orders = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs])
    return orders[positions - epochs.start * n]


class LoopedBatches(IterableDataset[Batch]):
    """The batches of ``steps`` from decoded samples in memory; ``share`` is (rank, world), and a rank has rows rank::world.

    The dataset is iterable, because Lightning would give a map-style dataset a distributed sampler of its own.
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
        self.ids = caption_ids(samples.captions) if samples.captions else None
        self.tokens = tokens
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world = share
        self.steps = steps

    def __iter__(self) -> Iterator[Batch]:
        for step in self.steps:
            chosen = looped_indices(self.seed, step, self.batch_size, len(self.samples.keys))[self.rank :: self.world]
            rows = torch.from_numpy(chosen)
            batch: Batch = {"images": self.samples.images[rows], "rows": rows, "skipped": {}}
            if self.ids is not None:
                batch["caption_ids"] = self.ids[rows]
            if self.tokens is not None:
                batch["tokens"] = self.tokens[rows]
            yield batch


class StreamedBatches(IterableDataset[Batch]):
    """The batches of ``steps`` from a stream, this rank's rows of each; DataLoader workers take turns over the steps."""

    def __init__(
        self,
        data: CaptionShards | ImageFolder | RenderedStream,
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
        # Worker w of W makes the batches of the steps w, w + W, ... The DataLoader asks the workers in turn, so the batches
        # come in the order of the steps.
        info = get_worker_info()
        try:
            for step in self.steps[info.id :: info.num_workers] if info else self.steps:
                yield self._batch(step)
        except UserError as error:
            if info is None:
                raise
            # An error that is raised in a worker arrives with the traceback of the worker in its text. The batch carries the
            # sentence instead, and ``on_before_batch_transfer`` raises it.
            yield {"mistake": str(error)}

    def _batch(self, step: int) -> Batch:
        taken = self.data.batch(step, self.batch_size, self.rank, self.world, self.preprocess, self.seed)
        batch: Batch = {"images": taken.images, "skipped": taken.skipped}
        if taken.captions:
            batch["caption_ids"] = caption_ids(taken.captions)
            if self.tokenizer is not None:
                batch["tokens"] = self.tokenizer(taken.captions)
        if taken.labels is not None:
            batch["labels"] = taken.labels
        return batch


class CaptionModule(L.LightningDataModule):
    """Image–caption batches; each batch is a dict, with B = ``batch_size`` / processes images.

    ``images`` are (B, 3, S, S) uint8. Images with captions have ``caption_ids`` (B,) int64, as the function of this
    name returns them, and with a tokenizer ``tokens`` (B, T) int64. Looped samples have ``rows`` (B,) int64, each
    image's position in ``looped``. Rendered images have ``labels`` (B,) int64. ``skipped`` {reason: count} are skipped
    samples.

    ``unique_samples`` N loops over the first N readable pairs, decoded once; None streams all shards. The loader begins
    at ``start_step`` and ends after step ``steps`` - 1. Each batch is a pure function of (seed, step, data), so that a
    resumed run sees the batches which the interrupted one would have seen, whatever the number of workers. The
    attribute ``skipped`` is the sum over this rank's batches. Raises UserError when the processes cannot share the
    batch evenly.
    """

    def __init__(
        self,
        data: CaptionShards | ImageFolder | RenderedStream,
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
        self.data.prepare()
        # Lightning calls setup more than once; the samples are read and decoded at the first call.
        if self.unique_samples is not None and self._looped is None:
            samples = self.data.first(self.unique_samples, self.preprocess, self.seed)
            self.skipped.update(samples.skipped)
            self._looped = samples, self.tokenizer(samples.captions) if self.tokenizer and samples.captions else None

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of this rank's batches ``start_step`` .. ``steps`` - 1."""
        # Callers without a Trainer, such as benchmarks, ask for the loader at once.
        self.setup("fit")
        rank, world = self._share()
        # Pinned memory lets the copy to the GPU run beside the computation; without a GPU it only gives a warning.
        pinned = torch.cuda.is_available()
        remaining = range(self.start_step, self.steps)
        if self._looped is not None:
            samples, tokens = self._looped
            looped = LoopedBatches(samples, tokens, self.batch_size, self.seed, (rank, world), remaining)
            # No workers: the samples are in memory, and batch_size=None because each item is a whole batch.
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
        # leave_to_parent: a signal to stop is for the main process, which stops its workers.
        return DataLoader(
            streamed, batch_size=None, num_workers=self.workers, pin_memory=pinned, worker_init_fn=leave_to_parent
        )

    def state_dict(self) -> dict[str, Any]:
        """Return {"skipped": counts} of the samples that all ranks together have skipped; {} where samples are looped."""
        return {"skipped": dict(self.skipped.gathered())} if self.unique_samples is None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add the counts of skipped samples in a checkpoint to those of the first rank."""
        # The stored counts are those of all ranks: added on each rank they would count several times.
        if self._share()[0] == 0:
            self.skipped.update(state.get("skipped", {}))

    def val_dataloader(self) -> Sequence[DataLoader[Any]]:
        """Return the loaders of the probe suite."""
        return self.probes

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return ``batch`` after its skipped samples were counted; raises the UserError of a worker that failed."""
        # Lightning calls this hook in the main process. Batches of the probe suite come here too, and are no dicts.
        if isinstance(batch, dict) and "mistake" in batch:
            raise UserError(batch["mistake"])
        if isinstance(batch, dict) and "skipped" in batch:
            self.skipped.update(batch["skipped"])
        return batch

    def _share(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
