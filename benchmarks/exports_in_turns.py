"""What exported models cost beside each other: CPU time of a call, all of them in turns in one process.

python benchmarks/exports_in_turns.py runs/<lsq>/export/onnx/model.onnx runs/<other>/export/onnx/model.onnx ...

The first file is what the others are compared with: a ratio is the median over the rounds of the two times of one round, with
the least and the largest. Files are those of ONNX Runtime (.onnx) and OpenVINO (.xml), of one input size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qatlab.deploy.formats.onnx import OnnxModel
from qatlab.deploy.formats.openvino import OpenVinoModel


def opened(file: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the model in ``file``."""
    return OnnxModel(file, threads) if file.suffix == ".onnx" else OpenVinoModel(file, threads)


def seconds(model: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> float:
    """Return the CPU time of a call, which another program on the machine does not count in."""
    start = time.process_time()
    model(images)
    return time.process_time() - start


def main() -> None:
    """Print a line for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    images = np.random.default_rng(0).normal(size=(options.batch, 3, options.size, options.size)).astype(np.float32)
    models = {file: opened(file, options.threads) for file in options.files}
    for model in models.values():
        model(images)  # the first call compiles and allocates
    times: dict[Path, list[float]] = {file: [] for file in models}
    for _ in range(options.rounds):
        for file, model in models.items():
            times[file].append(seconds(model, images))
    first = times[options.files[0]]
    for file, taken in times.items():
        ratios = [one / other for one, other in zip(taken, first, strict=True)]
        middle = statistics.median(ratios)
        print(f"{1000 * statistics.median(taken):8.0f} ms  {middle:.3f} [{min(ratios):.3f}-{max(ratios):.3f}]  {file}")


if __name__ == "__main__":
    main()
