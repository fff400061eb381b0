"""Images per second of qatlab's decoding against open_clip's PIL transform: one process and thread, interleaved.

python benchmarks/decode.py [--data ../shared/data] [--images 48] [--rounds 9]
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from open_clip import image_transform
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image

from qatlab.data.preprocess import Preprocess

ROOT = Path(__file__).resolve().parent.parent


def photographs(folder: Path, count: int) -> list[bytes]:
    """JPEGs of 500 × 375, quality 88, 4:2:0: real photographs cut to 4:3 and enlarged in memory."""
    files = sorted(path for path in folder.rglob("*.jp*g"))
    encoded = []
    for path in files[:: max(1, len(files) // count)][:count]:
        image = Image.open(path).convert("RGB")
        width, height = image.size
        box = (0, 0, width, round(width * 0.75)) if height >= width * 0.75 else (0, 0, round(height / 0.75), height)
        buffer = io.BytesIO()
        image.crop(box).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=88, subsampling=2)
        encoded.append(buffer.getvalue())
    return encoded


def seconds(read: Callable[[bytes], torch.Tensor], encoded: list[bytes]) -> float:
    """Process CPU time of reading every image once."""
    start = time.process_time()
    for data in encoded:
        read(data)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QATLAB_TEST_DATA", ROOT / "../shared/data")))
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    encoded = photographs(options.data / "imagenet1k", options.images)
    if not encoded:
        parser.error(f"no JPEG under {options.data / 'imagenet1k'}")
    preprocess = Preprocess(224, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    reference = image_transform(224, is_train=False)

    def ours(data: bytes) -> torch.Tensor:
        return preprocess.normalize(preprocess.decode(data)[None])[0]

    def theirs(data: bytes) -> torch.Tensor:
        return reference(Image.open(io.BytesIO(data)))

    errors = [(ours(data) - theirs(data)).abs() for data in encoded]
    rounds = [(seconds(theirs, encoded), seconds(ours, encoded)) for _ in range(options.rounds)]
    ratio = statistics.median(slow / fast for slow, fast in rounds)
    print(f"{len(encoded)} JPEGs of 500 × 375, mean {sum(map(len, encoded)) / len(encoded) / 1024:.0f} KiB")
    for name, column in (("open_clip PIL transform", 0), ("qatlab", 1)):
        print(f"{name:24} {len(encoded) / statistics.median(pair[column] for pair in rounds):7.0f} img/s")
    print(f"{'ratio':24} {ratio:7.2f} × (median of {options.rounds} rounds; target 1.8 ×)")
    worst = max(float(error.max()) for error in errors)
    mean = sum(float(error.mean()) for error in errors) / len(errors)
    level = 1 / 255 / min(OPENAI_DATASET_STD)
    print(f"error, normalised units: max {worst:.4f} (one uint8 level is {level:.4f}), mean {mean:.5f}")


if __name__ == "__main__":
    main()
