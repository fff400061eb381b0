"""The embedded world behind the `data` option: caption shards in the cache, and the endless stream of pretraining."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import get_worker_info

from qatlab.cache import cache_dir
from qatlab.data.captions import Captioned, CaptionShards, Pair
from qatlab.data.embedded import CLASS_NAMES, lesson, write_caption_shards
from qatlab.data.transforms import Preprocess
from qatlab.data.vocabulary import caption
from qatlab.data.world import VERSION, render
from qatlab.errors import UserError


class RenderedShards(CaptionShards):
    """The shards of ``samples`` captioned images of the world, written once into the cache when they are first read.

    They go through the very code that reads CC3M.
    """

    def __init__(self, name: str, samples: int, seed: int) -> None:
        super().__init__(None, name)
        self.samples = samples
        self.seed = seed

    def prepare(self) -> list[str]:
        """Return the shards, written if the cache lacks them."""
        if self.shards is None:
            folder = cache_dir("embedded", f"captions-v{VERSION}-{self.samples}-{self.seed}")
            write_caption_shards(folder, self.samples, per_shard=500, seed=self.seed)
            self.shards = str(folder)
        return super().prepare()


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
        """Return one name per loader process that can be of use: any number can."""
        return [self.name] * 64

    def first(self, n: int, preprocess: Preprocess, seed: int = 0) -> Captioned:
        """Raise UserError: a looped or calibration set is read from shards, data=embedded."""
        raise UserError(
            f"data={self.name} renders while it trains and has no fixed first {n} samples; use data=embedded."
        )

    def stream(
        self, preprocess: Preprocess, seed: int, rank: int = 0, world: int = 1, start_step: int = 0
    ) -> Iterator[Pair]:
        """Yield this rank's and loader process's pairs, from batch ``start_step`` on."""
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        for step in range(start_step + number, self.steps, count):
            mine = range(step * self.batch_size + rank, (step + 1) * self.batch_size, world)
            specs = [lesson(i, self.steps * self.batch_size, seed) for i in mine]
            for i, spec, image in zip(mine, specs, torch.from_numpy(render(specs)), strict=True):
                yield Pair(image, caption(spec), f"{i:09d}", {}, CLASS_NAMES.index(spec.shape))
