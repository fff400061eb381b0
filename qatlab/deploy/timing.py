"""Times of one way to run an encoder beside torch's in full precision, in a process of its own.

python -m qatlab.deploy.timing '<job as JSON>' prints one JSON line; ``qatlab.bench`` starts it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from qatlab.errors import UserError

Model = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Job:
    """What is timed: ``kind`` of speed.TITLES, from ``source``, a file or an exported folder, against ``reference``."""

    kind: str
    source: str
    reference: str
    size: int
    batches: list[int]
    threads: int
    rounds: int
    device: str


def run(job: Job) -> dict[str, Any]:
    """Return {times: {batch: {wall, seconds, reference}}} in seconds, medians, and {memory_mib} of the largest batch.

    ``seconds`` and ``reference`` are CPU time on one thread of a CPU, and the clock's elsewhere. ``memory_mib`` is the
    peak above what the process held before the model was read. Raises UserError with what the process said where it
    failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    command = [sys.executable, "-m", "qatlab.deploy.timing", json.dumps(asdict(job))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"timing {job.kind} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Do one job and print what came of it."""
    import torch

    importlib.import_module("qatlab.clip")  # what reading any of them imports is not the model's memory
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    torch.set_grad_enabled(False)
    images = np.random.default_rng(0).normal(size=(max(job.batches), 3, job.size, job.size)).astype(np.float32)
    before = psutil.Process().memory_info().rss / 2**20
    model = open_model(job.kind, job.source, job)
    model(images)
    memory = torch.cuda.max_memory_allocated() / 2**20 if job.device == "cuda" else _peak() - before
    reference = open_model("fp32", job.reference, job)
    clock = time.process_time if job.device == "cpu" and job.threads == 1 else time.perf_counter
    times = {batch: _interleaved(model, reference, images[:batch], job.rounds, clock) for batch in job.batches}
    print(json.dumps({"times": times, "memory_mib": memory}))


def open_model(kind: str, source: str, job: Job) -> Model:
    """Return what maps images (B, 3, S, S) float32, in the machine's memory, to features there by a kind of encoder."""
    import torch

    if kind in ("onnx", "torch", "openvino"):
        from qatlab.deploy.runtimes import load

        return load(source, job.threads)
    if kind == "onnx_fp32":
        from qatlab.deploy.onnx import OnnxModel

        return OnnxModel(Path(source), job.threads)
    if kind in ("openvino_fp32", "openvino_bf16"):
        from qatlab.deploy.openvino import OpenVinoModel

        return OpenVinoModel(Path(source), job.threads, "f32" if kind == "openvino_fp32" else "bf16")
    visual = torch.load(source, weights_only=False).eval()
    if kind == "bf16":
        visual = visual.to(torch.bfloat16)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    if kind.startswith("bnb_"):
        from qatlab.deploy.bitsandbytes import replaced

        if job.device == "cuda":
            dtype = torch.float16  # what its CUDA kernels multiply in
        visual = replaced(visual.to(dtype), kind)
    visual = visual.to(job.device)
    return lambda images: visual(torch.from_numpy(images).to(job.device, dtype)).float().cpu()


def _interleaved(
    model: Model, reference: Model, images: np.ndarray, rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Medians of seconds a call; the sides take turns, so that a neighbour on the machine slows both alike."""
    for side in (model, reference):
        side(images)
    taken: dict[str, list[float]] = {"seconds": [], "reference": [], "wall": []}
    for _ in range(rounds):
        for name, side in (("seconds", model), ("reference", reference)):
            wall, start = time.perf_counter(), clock()
            side(images)
            taken[name].append(clock() - start)
            if name == "seconds":
                taken["wall"].append(time.perf_counter() - wall)
    return {name: statistics.median(values) for name, values in taken.items()}


def _peak() -> float:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes, on macOS
    # On Linux ru_maxrss is at least what the process was started from held.
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) / 2**10


if __name__ == "__main__":
    main()
