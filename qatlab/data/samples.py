"""What reading gives: decoded image–caption pairs, and the count of what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from qatlab.globalbatch import world_size

UNREADABLE = "unreadable shard "  # the reason that is counted for a damaged shard, followed by its file or URL
SHOWN = 3  # damaged shards named in the text


class SkipCounter(Counter[str]):
    """How many samples were skipped, by reason; a shard that ends too early has a reason of its own that names it."""

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
        counts: list[Any] = [None] * world_size()
        dist.all_gather_object(counts, dict(self))
        return SkipCounter.summed(counts)

    @property
    def shards(self) -> list[str]:
        """Return the files or URLs of the damaged shards, each once."""
        return sorted(reason.removeprefix(UNREADABLE) for reason in self if reason.startswith(UNREADABLE))

    def __str__(self) -> str:
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

    Only rendered images have ``labels`` (n,) int64.
    """

    images: Tensor
    captions: list[str]
    keys: list[str]
    skipped: dict[str, int]
    labels: Tensor | None = None
