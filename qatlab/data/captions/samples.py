"""The result of reading: decoded image–caption pairs, and the counts of samples that were skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from qatlab.core.ranks import world_size

# A damaged shard is counted under this text followed by its file or URL, so that ``shards`` can read the names back.
UNREADABLE = "unreadable shard "
SHOWN = 3  # number of damaged shards that a sentence names; the others are only counted


class SkipCounter(Counter[str]):
    """The number of skipped samples by reason; a damaged shard has a reason of its own, which contains its name."""

    @classmethod
    def summed(cls, counts: Iterable[Mapping[str, int]]) -> SkipCounter:
        """Return the sum of several counts."""
        total = cls()
        for count in counts:
            total.update(count)
        return total

    def gathered(self) -> SkipCounter:
        """Return the sum over all ranks; every rank must call it."""
        if world_size() == 1:
            return SkipCounter(self)
        # Dicts are gathered instead of tensors, because the reasons differ between ranks.
        counts: list[Any] = [None] * world_size()
        dist.all_gather_object(counts, dict(self))
        return SkipCounter.summed(counts)

    @property
    def shards(self) -> list[str]:
        """Return the files or URLs of the damaged shards, each once."""
        return sorted(reason.removeprefix(UNREADABLE) for reason in self if reason.startswith(UNREADABLE))

    def __str__(self) -> str:
        # Damaged shards are listed apart from skipped samples, because nobody knows how many samples they have lost.
        reasons = [f"{count} {reason}" for reason, count in self.most_common() if not reason.startswith(UNREADABLE)]
        said = [f"samples skipped and replaced: {', '.join(reasons)}"] if reasons else []
        if shards := self.shards:
            more = f" and {len(shards) - SHOWN} more" if len(shards) > SHOWN else ""
            plural = "s" if len(shards) > 1 else ""
            named = ", ".join(shards[:SHOWN])
            said.append(f"{len(shards)} unreadable shard{plural}, read as far as whole: {named}{more}")
        return "; ".join(said) or "no sample skipped"


@dataclass(frozen=True, eq=False)
class Captioned:
    """Decoded pairs: ``images`` (n, 3, S, S) uint8, their captions and keys, and what was skipped on the way.

    For the images of a folder ``captions`` is an empty list. Only rendered images have ``labels`` (n,) int64.
    """

    images: Tensor
    captions: list[str]
    keys: list[str]
    skipped: dict[str, int]
    labels: Tensor | None = None
