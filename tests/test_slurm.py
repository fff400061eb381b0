"""The batch scripts on a real Slurm: two tasks, a time limit that comes too early, and an array of runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from one_node import Slurm, missing
from safetensors.torch import load_file
from torch import equal

from qatlab.config import compose
from qatlab.results.identity import run_id
from qatlab.results.rows import read_rows
from qatlab.sweeps.grid import cells_of
from qatlab.sweeps.state import log_of, state_of

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing())]
SMALL = [
    "trainer.accelerator=cpu", "suite.images=16", "suite.resamples=0", "callbacks.temperature=null", "wandb.mode=disabled",
    "data.samples=128", "fit.workers=0", "fit.checkpoint_every=20",
]  # fmt: skip
TRAINED = ["recipe=light_qat_lsq", "fit.batch_size=8", "fit.steps=700", *SMALL]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    started = Slurm(tmp_path_factory.mktemp("slurm"))
    started.environment |= {
        "PATH": f"{Path(sys.executable).parent}:{started.environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "QATLAB_CACHE": str(started.folder / "cache"),
    }
    yield started
    started.stop()


def submit(cluster: Slurm, *arguments: str, options: tuple[str, ...] = ()) -> str:
    script = str(ROOT / "slurm" / "fit.sbatch")
    return cluster.call(
        "sbatch", "--parsable", "--ntasks-per-node=2", "--cpus-per-task=1", *options, script, *arguments
    )


def said(cluster: Slurm, job: str) -> str:
    log = cluster.folder / f"qatlab-{job}.log"
    return log.read_text() if log.exists() else ""


def test_two_tasks_are_one_run_and_a_time_limit_only_interrupts_it(cluster: Slurm) -> None:
    job = submit(cluster, *TRAINED, "output=whole")
    assert cluster.ended(job, 240) == "COMPLETED", said(cluster, job)
    (whole,) = (cluster.folder / "whole").glob("light_qat_lsq-*")

    # Slurm tells the job up to a minute earlier than it is asked to, and so again after a restart: the time is then raised.
    job = submit(cluster, *TRAINED, "output=cut", options=("--time=1", "--signal=USR1@48"))
    cluster.wait(lambda: "training on from step=" in said(cluster, job), 300)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert cluster.ended(job, 240) == "COMPLETED", said(cluster, job)
    assert int(cluster.fact(job, "Restarts")) >= 1
    assert said(cluster, job).count("stopped by SIGUSR1") >= 1
    (cut,) = (cluster.folder / "cut").glob("light_qat_lsq-*")
    config = compose(*TRAINED)
    assert cut.name == whole.name == f"light_qat_lsq-{run_id(config)}"
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert one.keys() == other.keys()
    assert all(equal(tensor, other[name]) for name, tensor in one.items())
    losses = [pl.read_csv(folder / "metrics.csv")["train/loss"].to_list() for folder in (whole, cut)]
    assert losses[0] == losses[1]


def test_a_mistake_ends_the_job_for_good(cluster: Slurm) -> None:
    """Two processes find it, one a moment before the other: what srun then does to that one looks like a stop."""
    job = submit(cluster, *TRAINED, "output=wrong", "model.checkpoint=none.pt")
    assert cluster.ended(job, 120) == "FAILED", said(cluster, job)
    assert cluster.fact(job, "Restarts") == "0"
    assert "none.pt" in said(cluster, job)
    assert "Traceback" not in said(cluster, job)
    assert not list(cluster.folder.glob(".qatlab-*"))


def test_a_sweep_is_an_array_of_which_a_killed_run_is_retried(cluster: Slurm) -> None:
    given = [f"output={cluster.folder / 'runs'}", "fit.steps=10", "fit.batch_size=8", *SMALL]
    own = cluster.folder / "own"
    (own / "sweep").mkdir(parents=True)
    (own / "sweep" / "six.yaml").write_text(
        "grids: [{recipe: light_qat_lsq, quant.weight.bits: '8,6,4', seed: '0,1'}]\n"
    )
    cells = cells_of("six", given, own)
    assert len(cells) == 6

    def sweep(word: str) -> str:
        options = ["jobs=2", "slurm=--cpus-per-task=1 --time=10", "--config-dir", str(own)]
        return cluster.call(sys.executable, "-m", "qatlab.sweep", word, "sweep=six", *options, *given, check=False)

    job = sweep("submit").rpartition(" ")[2]
    victim = cells[3].run
    assert victim is not None
    cluster.wait(lambda: (victim.folder / ".lock").exists() and (victim.folder / ".lock").read_text(), 300)
    os.kill(int((victim.folder / ".lock").read_text().split()[1]), signal.SIGKILL)
    cluster.wait(lambda: not cluster.call("squeue", "-h", "-j", job, check=False), 300)
    states = [state_of(cell) for cell in cells]
    assert [state.kind for state in states] == ["finished"] * 3 + ["failed"] + ["finished"] * 2, log_of(
        victim
    ).read_text()
    assert "killed by SIGKILL" in states[3].why
    assert "5 finished, 1 failed" in sweep("plan")

    job = sweep("retry").rpartition(" ")[2]
    cluster.wait(lambda: not cluster.call("squeue", "-h", "-j", job, check=False), 300)
    assert {state_of(cell).kind for cell in cells} == {"finished"}
    rows = [read_rows(cell.run.results) for cell in cells if cell.run is not None]
    assert len({len(of) for of in rows}) == 1
