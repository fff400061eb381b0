"""Cells as the tasks of a Slurm array."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from qatlab.core.errors import UserError
from qatlab.core.files import atomic
from qatlab.core.hashing import digest
from qatlab.core.secrets import shown
from qatlab.sweeps.grid import Cell
from qatlab.sweeps.state import log_of


def submit(cells: Sequence[Cell], name: str, jobs: int, options: Sequence[str], config_dir: Path | None) -> str:
    """Return the id of the array job that runs the cells, ``jobs`` at a time; ``options`` are sbatch's.

    The cells are stored one a line in <output>/sweeps, and slurm/sweep.sbatch runs the line of its task. Raises
    UserError where there is no Slurm, and with the message of sbatch where sbatch refuses.
    """
    # sbatch's options set the processes and GPUs of a task, and
    # a second number in a run's options could contradict them.
    for option in {option for cell in cells for option in cell.overrides}:
        if option.startswith(("trainer.devices=", "trainer.num_nodes=")):
            raise UserError(
                f"{option}: on Slurm the job decides, slurm='--nodes=1 --ntasks-per-node=2 --gres=gpu:2' for two."
            )
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not here: submit on a machine of the cluster, or `run` the sweep on this one.")
    runs = [cell.run for cell in cells if cell.run is not None]
    output = runs[0].folder.parent.resolve()
    where = ["--config-dir", str(config_dir.resolve())] if config_dir else []
    lines = [shlex.join([str(log_of(cell.run)), *where, *cell.overrides]) for cell in cells if cell.run is not None]
    text = "\n".join(lines) + "\n"
    # The digest in the name keeps a later submission of the same sweep from changing the list of tasks that still wait.
    listed = output / "sweeps" / f"{name}-{digest(text)[:8]}.txt"
    # The tasks need the data's URLs with their secrets, so a
    # list may hold secrets, and only its owner may then read it.
    with atomic(listed, mode=0o600 if shown(text) != text else 0o644) as temporary:
        temporary.write_text(text)
    script = Path(str(files("qatlab.slurm"))) / "sweep.sbatch"
    command = ["sbatch", "--parsable", f"--array=0-{len(lines) - 1}%{jobs}", f"--job-name={name}", *options]
    done = subprocess.run([*command, str(script), str(listed)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"sbatch refused the sweep: {said[-1]}")
    return done.stdout.strip().partition(";")[0]  # --parsable gives "id" or "id;cluster"
