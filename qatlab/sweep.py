"""Run every cell of a sweep as a process of its own, here or on Slurm, and tell how far they are.

python -m qatlab.sweep plan sweep=fig3_bits                      # the runs, which are finished, failed or left
python -m qatlab.sweep run sweep=fig3_bits jobs=2                # those left, two at a time; the same command goes on
python -m qatlab.sweep retry sweep=fig3_bits                     # those that failed
python -m qatlab.sweep submit sweep=paper jobs=32 "slurm=--partition=gpu --gres=gpu:1" data.shards=/data/cc3m suite.root=/data
python -m qatlab.sweep retry sweep=paper jobs=32 "slurm=--partition=gpu --gres=gpu:1" data.shards=/data/cc3m suite.root=/data

Every other option goes to each run, and may have several values (seed=0,1,2). A run is known by its id: what is finished
is not repeated, whoever ran it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qatlab.cli import CONFIG_DIR, config_dir, is_override, told
from qatlab.errors import UserError, nearest

if TYPE_CHECKING:
    from qatlab.sweeps.state import State

WORDS = ("plan", "run", "submit", "retry")


def main() -> None:
    """Do what the first word asks, and exit with 2 where a run has failed."""
    arguments = sys.argv[1:]
    own = config_dir(arguments)
    with told(own):
        if not arguments or {"--help", "-h"} & set(arguments):
            print(_help())
            return
        word, *rest = arguments
        if word not in WORDS:
            raise UserError(f"{word} is none of {', '.join(WORDS)}{nearest(word, WORDS)}: it comes first.")
        name, jobs, slurm, given = _read(word, rest)
        sys.exit(_do(word, name, given, jobs, slurm))


def _read(word: str, arguments: list[str]) -> tuple[str, int, list[str] | None, list[str]]:
    """Return the sweep's name, the jobs at a time, sbatch's options where some are given, and what goes to every run."""
    options = {"sweep": "", "jobs": "1"}
    slurm, given = None, []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        key, equals, value = argument.partition("=")
        if equals and key in options:
            options[key] = value
        elif equals and key == "slurm":
            slurm = value
        elif equals and key == "force":
            raise UserError("force= would move the runs aside each time: move those you mean, and run the sweep again.")
        elif is_override(argument):
            given.append(argument)
        elif key not in CONFIG_DIR and before not in CONFIG_DIR:
            raise UserError(f"{argument} is not known: options are name=value, --help lists the sweeps.")
    name, jobs = options.values()
    if not name:
        raise UserError(f"no sweep given; `python -m qatlab.sweep {word} sweep=<name>` with one of\n{_sweeps()}")
    if not jobs.isdecimal() or int(jobs) < 1:
        raise UserError(f"jobs={jobs}: it takes how many runs go on at a time, from 1 on.")
    try:
        return name, int(jobs), None if slurm is None else shlex.split(slurm), given
    except ValueError as error:
        raise UserError(f"slurm={slurm}: {error}; it takes sbatch's options as on its command line.") from error


def _do(word: str, name: str, given: list[str], jobs: int, slurm: list[str] | None) -> int:
    from qatlab.sweeps import local
    from qatlab.sweeps.grid import cells_of
    from qatlab.sweeps.slurm import submit
    from qatlab.sweeps.state import LEFT, show, state_of

    if word == "run" and slurm is not None:
        raise UserError("slurm= goes to sbatch: `submit` the sweep with it, or `run` it here without.")
    own = config_dir(sys.argv[1:])
    cells = cells_of(name, given, own)
    states = [state_of(cell) for cell in cells]
    kinds = ("failed",) if word == "retry" else LEFT
    taken = (*kinds, "running") if word == "run" else kinds  # one that another process has is waited for
    chosen = [cell for cell, state in zip(cells, states, strict=True) if state.kind in taken]
    impossible = [state.why for state in states if state.kind == "impossible"]
    if len(impossible) == len(cells):
        raise UserError(impossible[0])
    if word == "plan":
        show(cells, states, jobs)
        return _code(states)
    if impossible:
        print(f"cannot be built: {len(impossible)}, `plan` says which and why; the first: {impossible[0]}")
    if not chosen:
        print("nothing to retry: no run failed" if word == "retry" else "nothing left to run")
    elif word == "submit" or slurm is not None:
        print(f"submitted {len(chosen)} runs as job {submit(chosen, name, jobs, slurm or [], own)}")
    else:
        local.run(chosen, kinds, jobs, own, local.gpus())
        states = [state_of(cell) for cell in cells]
        show(cells, states, jobs)
    return _code(states)


def _code(states: Sequence[State]) -> int:
    return 2 if any(state.kind in ("failed", "impossible") for state in states) else 0


def _help() -> str:
    usage = f"usage: python -m qatlab.sweep {'|'.join(WORDS)} sweep=<name> [jobs=N] [option=value] ..."
    return f"{usage}\n\n{__doc__}\nsweeps\n{_sweeps()}"


def _sweeps() -> str:
    from qatlab.config import recipe_files
    from qatlab.usage import first_line

    files = recipe_files("sweep", config_dir(sys.argv[1:]))
    return "\n".join(f"  {name:22} {first_line(path)}" for name, path in files.items())


if __name__ == "__main__":
    main()
