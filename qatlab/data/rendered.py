"""The embedded world behind the `data` option: caption shards in the cache, and the endless stream of pretraining."""

from __future__ import annotations

import torch

from qatlab.cache import cache_dir, digest, locked
from qatlab.data.captions import CaptionShards
from qatlab.data.embedded import CLASS_NAMES, lesson, write_caption_shards
from qatlab.data.samples import Captioned
from qatlab.data.shards import expand_shards
from qatlab.data.transforms import Preprocess
from qatlab.data.vocabulary import caption
from qatlab.data.world import VERSION, render
from qatlab.errors import UserError


class RenderedShards(CaptionShards):
    """The shards of ``samples`` captioned images of the world, written once into the cache when they are first read.

    They go through the very code that reads CC3M.
    """

    def __init__(self, name: str, samples: int, seed: int, cache: bool = False) -> None:
        super().__init__(None, name, cache=cache)
        self.samples = samples
        self.seed = seed

    def _expanded(self) -> list[str]:
        name = f"captions-v{VERSION}-{self.samples}-{self.seed}"
        folder = cache_dir("embedded", name)
        with locked(name):  # written twice, they would change under the process that is reading them
            write_caption_shards(folder, self.samples, per_shard=500, seed=self.seed)
        return expand_shards(str(folder))


class RenderedStream:
    """Captioned, labelled images rendered while training: sample i is a pure function of (seed, i, total).

    ``total`` is fit.steps x fit.batch_size, which the curriculum is measured against. Stands where CaptionShards stands.
    """

    text_bank = None

    def __init__(self, name: str, steps: int, batch_size: int) -> None:
        self.name = name
        self.steps = steps
        self.batch_size = batch_size

    def prepare(self) -> list[str]:
        """Return no shards: there is nothing to check."""
        return []

    def fingerprint(self) -> str:
        """Return 16 hex digits that tell which images these are."""
        return digest(f"world {VERSION}, {self.steps} steps of {self.batch_size}")[:16]

    def first(self, n: int, preprocess: Preprocess, seed: int = 0) -> Captioned:
        """Raise UserError: a looped or calibration set is read from shards, data=embedded."""
        raise UserError(
            f"data={self.name} renders while it trains and has no fixed first {n} samples; use data=embedded."
        )

    def batch(self, step: int, batch_size: int, rank: int, world: int, preprocess: Preprocess, seed: int) -> Captioned:
        """Return the rows ``rank::world`` of batch ``step``, with their labels."""
        mine = range(step * batch_size + rank, (step + 1) * batch_size, world)
        specs = [lesson(i, self.steps * self.batch_size, seed) for i in mine]
        return Captioned(
            images=torch.from_numpy(render(specs)),
            captions=[caption(spec) for spec in specs],
            keys=[f"{i:09d}" for i in mine],
            skipped={},
            labels=torch.tensor([CLASS_NAMES.index(spec.shape) for spec in specs]),
        )
