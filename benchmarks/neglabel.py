"""Seconds of NegLabel against its bare matrix product, on one thread: interleaved rounds, process CPU time.

python benchmarks/neglabel.py [--images 4096] [--classes 1000] [--negatives 10499] [--width 512] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qatlab.metrics.neglabel import LOGIT_SCALE, NegLabels, grouped, neglabel


def unit(rows: int, width: int, seed: int) -> Tensor:
    return normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def product(images: Tensor, texts: Tensor) -> None:
    """All cosines, in chunks that are dropped: what no implementation gets around."""
    for rows in images.split(256):
        rows @ texts.T


def whole(images: Tensor, negatives: NegLabels) -> Tensor:
    """As the authors' code: all logits at once, a softmax over classes and negatives per group."""
    own = LOGIT_SCALE * images @ negatives.inside.T
    others = LOGIT_SCALE * images @ negatives.groups.flatten(0, 1).T
    masses = [
        torch.cat([own, part], dim=1).softmax(dim=1)[:, : own.shape[1]].sum(dim=1)
        for part in others.chunk(len(negatives.groups), dim=1)
    ]
    return torch.stack(masses).mean(dim=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--negatives", type=int, default=10_499)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, inside = unit(options.images, options.width, 0), unit(options.classes, options.width, 1)
    negatives = NegLabels(inside, grouped(unit(options.negatives, options.width, 2)))
    texts = torch.cat([inside, negatives.groups.flatten(0, 1)])
    calls = {
        "matrix product": lambda: product(images, texts),
        "neglabel": lambda: neglabel(images, negatives),
        "as published": lambda: whole(images, negatives),
    }
    print(f"{options.images} images x ({options.classes} classes + {options.negatives} negatives) x {options.width}")
    error = (neglabel(images, negatives) - whole(images, negatives).double()).abs().max()
    print(f"largest difference from the published formula in float32: {error:.1e}")
    rounds: list[dict[str, float]] = [
        {name: seconds(call) for name, call in calls.items()} for _ in range(options.rounds)
    ]
    for name in calls:
        ratio = statistics.median(times[name] / times["matrix product"] for times in rounds)
        print(f"{name:15} {statistics.median(times[name] for times in rounds):7.3f} s  {ratio:5.2f} x the product")


if __name__ == "__main__":
    main()
