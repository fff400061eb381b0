"""The embedded world as training data: caption shards in the cache, and an endless stream for pretraining."""

from __future__ import annotations

from typing import Annotated, NoReturn

import torch

from qatlab.core.domains import AtLeast, Count, Seed
from qatlab.core.errors import UserError
from qatlab.core.files import cache_dir, locked
from qatlab.core.hashing import digest
from qatlab.data.captions.locate import expand_shards
from qatlab.data.captions.samples import Captioned
from qatlab.data.captions.source import CaptionShards
from qatlab.data.embedded.sets import CLASS_NAMES, lesson, write_caption_shards
from qatlab.data.embedded.vocabulary import caption
from qatlab.data.embedded.world import VERSION, render
from qatlab.data.preprocess import Preprocess


class RenderedShards(CaptionShards):
    """The shards of ``samples`` captioned images of the world, written once into the cache when they are first read.

    The same code reads them as reads CC3M.
    """

    def __init__(self, name: str, samples: Count, seed: Seed, cache: bool = False) -> None:
        super().__init__(None, name, cache=cache)
        self.samples = samples
        self.seed = seed

    def _expanded(self) -> list[str]:
        name = f"captions-v{VERSION}-{self.samples}-{self.seed}"
        folder = cache_dir("embedded", name)
        # Two processes may come here at once. Without the lock the second could write shards that the first is reading.
        with locked(name):
            write_caption_shards(folder, self.samples, per_shard=500, seed=self.seed)
        return expand_shards(str(folder))


class RenderedStream:
    """Captioned, labelled images rendered while training: sample i is a pure function of (seed, i, total).

    ``total`` is fit.steps · fit.batch_size; the share i / total decides the lesson. The class has the interface of
    CaptionShards.
    """

    # The readers of CaptionShards ask for these two attributes.
    captioned = True
    text_bank = None

    def __init__(self, name: str, steps: Annotated[int, AtLeast(0)], batch_size: Count) -> None:
        self.name = name
        self.steps = steps
        self.batch_size = batch_size

    def prepare(self) -> list[str]:
        """Return [], because there are no shards to check."""
        return []

    def fingerprint(self) -> str:
        """Return 16 hex digits, a hash of everything that decides the images."""
        return digest(f"world {VERSION}, {self.steps} steps of {self.batch_size}")[:16]

    def require(self, n: int) -> NoReturn:
        """Raise UserError, because a stream has no first samples to loop over or to calibrate on."""
        raise UserError(
            f"data={self.name} renders while it trains and has no fixed first {n} samples; use data=embedded."
        )

    def first(self, n: int, preprocess: Preprocess, seed: int = 0) -> Captioned:
        """Raise UserError as ``require`` does."""
        self.require(n)

    def batch(self, step: int, batch_size: int, rank: int, world: int, preprocess: Preprocess, seed: int) -> Captioned:
        """Return the rows ``rank::world`` of batch ``step``: images (n, 3, 64, 64) uint8, captions, keys and labels (n,) int64."""
        # As in CaptionShards.batch, rank r has the rows r, r + world, ... of the global batch.
        mine = range(step * batch_size + rank, (step + 1) * batch_size, world)
        specs = [lesson(i, self.steps * self.batch_size, seed) for i in mine]
        return Captioned(
            images=torch.from_numpy(render(specs)),
            captions=[caption(spec) for spec in specs],
            keys=[f"{i:09d}" for i in mine],
            skipped={},
            labels=torch.tensor([CLASS_NAMES.index(spec.shape) for spec in specs]),
        )
