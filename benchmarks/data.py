"""What reading training batches costs over decoding alone, and what data.cache=true saves.

Two ratios of process CPU time, one thread, both sides interleaved in one process, median over the rounds:

  reader / bare   batches from shards (order, index, captions, decoding) over decoding the same bytes from memory
  cache gain      images per second of batches with data.cache=true over those without

The index of a shard is made once and then read from the cache: its cost is printed by itself.

python benchmarks/data.py [--data FOLDER] [--images 200] [--batch 50] [--rounds 7]
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from scipy.ndimage import gaussian_filter

from qatlab.core.contents import YOUNG
from qatlab.data import CaptionShards, Preprocess

READER_TARGET, CACHE_TARGET = 1.20, 2.0
PER_SHARD = 100


def photographs(count: int) -> list[bytes]:
    """JPEGs of 500 × 375, quality 88, 4:2:0, about 40 KiB: blurred noise of all scales, as photographs have."""
    files = []
    for number in range(count):
        noise = np.random.default_rng(number).standard_normal((375, 500, 3), np.float32)
        scales = [gaussian_filter(noise, (sigma, sigma, 0)) * sigma for sigma in (1, 4, 16, 64)]
        picture = sum(scale / scale.std() * weight for scale, weight in zip(scales, (6, 16, 30, 40), strict=True))
        buffer = io.BytesIO()
        Image.fromarray(np.clip(picture + 118, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88, subsampling=2)
        files.append(buffer.getvalue())
    return files


def jpegs(folder: Path | None, count: int) -> list[bytes]:
    """The first JPEGs of the shards in a folder, or of a tree of files; without a folder, made ones."""
    if folder is None:
        return photographs(count)
    if shards := sorted(map(str, folder.glob("*.tar"))):
        samples = webdataset.WebDataset(shards, shardshuffle=False)
        return list(itertools.islice((sample["jpg"] for sample in samples if "jpg" in sample), count))
    return [path.read_bytes() for path in sorted(folder.rglob("*.jp*g"))[:count]]


def write_shards(folder: Path, files: list[bytes]) -> None:
    for first in range(0, len(files), PER_SHARD):
        with webdataset.TarWriter(f"{folder}/{first // PER_SHARD:05d}.tar", encoder=False) as writer:
            for number, data in enumerate(files[first : first + PER_SHARD], first):
                text = f"a photograph with the number {number}".encode()
                writer.write({"__key__": f"{number:09d}", "jpg": data, "txt": text, "json": b'{"caption": ""}'})


def seconds(work: Callable[[], None]) -> float:
    """Process CPU time of one pass."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of WebDataset shards, or of JPEGs; default: made images")
    parser.add_argument("--images", type=int, default=200, help="how many of them are read in a round")
    parser.add_argument("--batch", type=int, default=50, help="images per batch")
    parser.add_argument("--rounds", type=int, default=7, help="rounds; at least 5 for a figure to rely on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = jpegs(options.data, options.images)
    files = files[: len(files) // options.batch * options.batch]
    if not files:
        parser.error(f"--data {options.data} holds fewer than --batch {options.batch} JPEGs")
    preprocess = Preprocess(224, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QATLAB_CACHE"] = f"{folder}/cache"
        write_shards(Path(folder), files)
        time.sleep(1.1e-9 * YOUNG)  # nothing is kept of a shard that was written just now
        shards, cached = CaptionShards(folder, "plain"), CaptionShards(folder, "cached", cache=True)
        steps = len(files) // options.batch

        def bare() -> None:
            for data in files:
                preprocess.decode(data)

        def reading(source: CaptionShards) -> None:
            for step in range(steps):
                source.batch(step, options.batch, 0, 1, preprocess, 0)

        index = seconds(lambda: shards.first(1, preprocess)) / min(PER_SHARD, len(files))
        for source in (shards, cached):  # the indices are made, and the cache is filled
            reading(source)
        rounds = [
            (seconds(bare), seconds(lambda: reading(shards)), seconds(lambda: reading(cached)))
            for _ in range(options.rounds)
        ]
    size = sum(map(len, files)) / len(files) / 1024
    print(f"{len(files)} JPEGs, mean {size:.0f} KiB, batches of {options.batch}, median of {options.rounds} rounds")
    for column, name in enumerate(("bare decode + transform", "reader", "reader, data.cache=true")):
        print(f"{name:24} {len(files) / statistics.median(times[column] for times in rounds):7.0f} img/s")
    print(f"{'index, once per machine':24} {1e6 * index:7.0f} µs per sample")
    overhead = statistics.median(reader / alone for alone, reader, _ in rounds)
    gain = statistics.median(reader / kept for _, reader, kept in rounds)
    print(f"{'reader / bare':24} {overhead:7.2f} × (target at most {READER_TARGET:.2f} ×)")
    print(f"{'cache gain':24} {gain:7.2f} × (target at least {CACHE_TARGET:.2f} ×)")


if __name__ == "__main__":
    main()
