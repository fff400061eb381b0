"""What it costs to know images by their content, over decoding and resizing them once.

python benchmarks/identity.py [--images DIR] [--size 224] [--repeats 5]

The first start hashes every file, a later one looks at each; the reference reads, decodes and resizes them, as a pass that
embeds them does. Process CPU times of one process, files in the page cache, the median of several rounds in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qatlab.core import contents
from qatlab.data.images.folders import Folders
from qatlab.data.preprocess import Preprocess

TARGET = 0.10


def main() -> None:
    """Print the times and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="../shared/data/imagenet1k")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    contents.YOUNG = 0  # files that were unpacked just now are remembered too
    preprocess = Preprocess(options.size, (0.5,) * 3, (0.5,) * 3)
    layout = Folders(options.images)
    places = range(len(layout))

    def decoding() -> None:
        for place in places:
            preprocess.fit(layout.pixels(place))

    def start() -> float:
        return taken(lambda: Folders(options.images).contents(places)) - taken(lambda: Folders(options.images))

    times: list[tuple[float, float, float]] = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as cache:
            os.environ["QATLAB_CACHE"] = cache
            times.append((taken(decoding), start(), start()))
    decode, first, later = (statistics.median(column) for column in zip(*times, strict=True))
    size = sum(Path(layout.file(place)).stat().st_size for place in places) / len(places) / 1024
    print(f"{len(places)} images of {size:.0f} KiB: decoded and resized {1e6 * decode / len(places):.0f} us an image")
    print(f"first start {1e6 * first / len(places):.0f} us an image: {first / decode:.3f} [{TARGET}]")
    print(f"later start {1e6 * later / len(places):.0f} us an image: {later / decode:.3f}")


def taken(what: Callable[[], object]) -> float:
    """Return the CPU seconds of a call."""
    start = time.process_time()
    what()
    return time.process_time() - start


if __name__ == "__main__":
    main()
