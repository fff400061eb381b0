"""What two processes cost beside one for the same global batch: CPU time of all of them, a thread each.

python benchmarks/ddp.py [rounds]

Prints the CPU seconds of STEPS training steps on 1 and 2 processes and their ratio; start-up and evaluation cancel,
because each figure is that of a long run less that of a short one.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile

SHORT, STEPS = 20, 80
OPTIONS = [
    "recipe=light_qat_lsq", "fit.batch_size=128", "fit.unique_samples=256", "data.samples=512", "fit.workers=0",
    "suite.images=8", "suite.resamples=0", "callbacks.temperature=null", "wandb.mode=disabled", "trainer.accelerator=cpu",
    "fit.checkpoint_every=1000", "quant.kernels=eager", "fit.micro_batch=64",
]  # fmt: skip


def cpu_seconds(processes: int, steps: int) -> float:
    """Return the CPU time of a run and of all that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        # torchrun waits for what it starts, which Lightning's own launcher does not: only then is its time counted.
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, "-m", "qatlab.fit", *OPTIONS, f"output={folder}"]
        command += [f"fit.steps={steps}", f"trainer.devices={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def main() -> None:
    """Print the ratio of each round, and their median."""
    ratios = []
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        one, two = (cpu_seconds(n, SHORT + STEPS) - cpu_seconds(n, SHORT) for n in (1, 2))
        ratios.append(two / one)
        print(
            f"1 process {one:.1f} s, 2 processes {two:.1f} s of CPU time for {STEPS} steps: {two / one:.2f}", flush=True
        )
    print(f"median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
