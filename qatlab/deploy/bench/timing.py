"""Times of one way to run an encoder beside torch's in full precision, in a process of its own.

python -m qatlab.deploy.bench.timing '<job as JSON>' prints one JSON line; ``qatlab.bench`` starts it.
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

from qatlab.core.errors import UserError

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
    # A process for each form: memory is its own, and OMP_NUM_THREADS is read only when a process starts.
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    command = [sys.executable, "-m", "qatlab.deploy.bench.timing", json.dumps(asdict(job))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"timing {job.kind} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    # Libraries may print as well: the job's line is the last one.
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Do the job in the command line's JSON and print its times and memory as one line of JSON."""
    import torch

    # torch and open_clip are imported here, before memory is measured, so that they do not count as the model's memory.
    # The runtimes are imported later and do count.
    importlib.import_module("qatlab.models.clip")
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    torch.set_grad_enabled(False)
    images = np.random.default_rng(0).normal(size=(max(job.batches), 3, job.size, job.size)).astype(np.float32)
    # The memory of the model is measured before the reference is loaded, whose memory would be added.
    before = psutil.Process().memory_info().rss / 2**20
    model = open_model(job.kind, job.source, job)
    model(images)
    memory = torch.cuda.max_memory_allocated() / 2**20 if job.device == "cuda" else _peak() - before
    reference = open_model("fp32", job.reference, job)
    # On one thread CPU time says what a call takes even where the machine is busy. With several, or on a GPU, it does not.
    clock = time.process_time if job.device == "cpu" and job.threads == 1 else time.perf_counter
    times = {batch: _interleaved(model, reference, images[:batch], job.rounds, clock) for batch in job.batches}
    print(json.dumps({"times": times, "memory_mib": memory}))


def open_model(kind: str, source: str, job: Job) -> Model:
    """Return an encoder of a ``kind``: from images (B, 3, S, S) float32 in the machine's memory to features (B, D) there."""
    import torch

    if kind in ("onnx", "torch", "openvino"):
        from qatlab.deploy.contents import read_about
        from qatlab.deploy.runtimes import opened

        # Opened without the check of its stored input: a model that is inexact on this CPU takes the same time. Exports
        # that can run code are among the jobs only with trust=true, which speed.written has looked at.
        return opened(Path(source), read_about(Path(source)), job.threads, trust=True)
    if kind == "onnx_fp32":
        from qatlab.deploy.formats.onnx import OnnxModel

        return OnnxModel(Path(source), job.threads)
    if kind in ("openvino_fp32", "openvino_bf16"):
        from qatlab.deploy.formats.openvino import OpenVinoModel

        return OpenVinoModel(Path(source), job.threads, "f32" if kind == "openvino_fp32" else "bf16")
    # A pickle, which qatlab.bench wrote a moment ago to a folder that only this user can read.
    visual = torch.load(source, weights_only=False).eval()
    if kind == "bf16":
        visual = visual.to(torch.bfloat16)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    if kind.startswith("bnb_"):
        from qatlab.deploy.bench.bitsandbytes import replaced

        if job.device == "cuda":
            dtype = torch.float16  # the type that bitsandbytes' CUDA kernels multiply in
        visual = replaced(visual.to(dtype), kind)
    visual = visual.to(job.device)
    return lambda images: visual(torch.from_numpy(images).to(job.device, dtype)).float().cpu()


def _interleaved(
    model: Model, reference: Model, images: np.ndarray, rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Return the median seconds per call of ``model`` ("seconds") and ``reference`` by ``clock``, and "wall" of ``model``.

    The two are called in turns, so that another program on the machine slows them equally. "wall" is by the wall clock.
    """
    # The first call at a batch size compiles and allocates.
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
    """Return the largest memory that this process has held, in MiB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # no /proc: this is macOS, which counts bytes
    # On Linux ru_maxrss counts the process that started this one too; VmHWM does not.
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) / 2**10


if __name__ == "__main__":
    main()
