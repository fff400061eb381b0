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
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qatlab.cli import CONFIG_DIR, complete, config_dir_of, errors_as_sentences, is_override
from qatlab.config import recipe_files
from qatlab.config.completion import Line, asks_for_completion, script, typed_line
from qatlab.config.heeded import key_of, unheeded, without_effect
from qatlab.config.help import first_line
from qatlab.core.errors import UserError, nearest

if TYPE_CHECKING:
    from qatlab.sweeps.grid import Cell
    from qatlab.sweeps.state import State

WORDS = ("plan", "run", "submit", "retry")


def main() -> None:
    """Do what the first word asks, and exit with 2 where a run has failed."""
    arguments = sys.argv[1:]
    # Mistakes are explained with the user's own recipes in view, which --config-dir names.
    config_dir = config_dir_of(arguments)
    with errors_as_sentences(config_dir):
        if not arguments or {"--help", "-h"} & set(arguments):
            print(_help())
            return
        if asks_for_completion(arguments):
            _complete(arguments, typed_line())
            return
        word, *rest = arguments
        if word not in WORDS:
            raise UserError(f"{word} is none of {', '.join(WORDS)}{nearest(word, WORDS)}: it comes first.")
        name, jobs, slurm, given = _read(word, rest)
        sys.exit(_do(word, name, given, jobs, slurm))


def _complete(arguments: list[str], line: Line) -> None:
    """Print what may complete ``line``, one a line: the first word, what a sweep takes, and what goes to every run."""
    # ``script`` is None where Tab was pressed, else the text that installs completion in a shell.
    if script(arguments) is None:
        if not line.words:
            print("\n".join(WORDS))
            return
        if line.word.startswith("sweep="):
            print("\n".join(f"sweep={name}" for name in recipe_files("sweep", config_dir_of(line.words))))
            return
        print("\n".join(f"{option}=" for option in ("sweep", "jobs", "slurm")))
    # What is left on the line goes to qatlab.fit, whose completion knows it; the first word is the sweep's own.
    of_runs = [word for word in line.words if not word.startswith(("sweep=", "jobs=", "slurm="))]
    complete(arguments, replace(line, words=of_runs[1:]))


def _read(word: str, arguments: list[str]) -> tuple[str, int, list[str] | None, list[str]]:
    """Return the sweep's name, the jobs at a time, sbatch's options where some are given, and what goes to every run."""
    options = {"sweep": "", "jobs": "1"}
    slurm, given = None, []
    # With each word the one before it: "--config-dir FOLDER" are two words.
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
    """Do what ``word`` asks with a sweep; return the exit code."""
    from qatlab.sweeps import local
    from qatlab.sweeps.grid import cells_of
    from qatlab.sweeps.slurm import submit
    from qatlab.sweeps.state import LEFT, show, state_of

    if word == "run" and slurm is not None:
        raise UserError("slurm= goes to sbatch: `submit` the sweep with it, or `run` it here without.")
    config_dir = config_dir_of(sys.argv[1:])
    cells = cells_of(name, given, config_dir)
    if told := _without_effect(cells, given):
        print(told)
    states = [state_of(cell) for cell in cells]
    kinds = ("failed",) if word == "retry" else LEFT
    # `run` waits for a run that another process has, and starts it itself where that process leaves it unfinished.
    taken = (*kinds, "running") if word == "run" else kinds
    chosen = [cell for cell, state in zip(cells, states, strict=True) if state.kind in taken]
    impossible = [state.why for state in states if state.kind == "impossible"]
    # A product of methods and bits may have cells that cannot be built, beside others that can. Where none can, an option
    # is wrong.
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
        print(f"submitted {len(chosen)} runs as job {submit(chosen, name, jobs, slurm or [], config_dir)}")
    else:
        local.run(chosen, kinds, jobs, config_dir, local.gpus())
        # Looked at again: the table shows what came of the runs.
        states = [state_of(cell) for cell in cells]
        show(cells, states, jobs)
    return _code(states)


def _without_effect(cells: Sequence[Cell], given: Sequence[str]) -> str:
    """Return a line on what is given to all runs and changes nothing in some; "" where there is nothing of the kind."""
    keys = {key_of(argument) for argument in given}
    runs: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    for cell in cells:
        if cell.run is not None:
            mine = [argument for argument in cell.overrides if key_of(argument) in keys]
            vain = without_effect(cell.config, mine)
            reasons |= {key_of(argument): why for argument, why in vain.items()}
            runs.update({key_of(argument) for argument in vain})
    told = [f"{key} in {count} of {len(cells)} runs ({reasons[key]})" for key, count in runs.items()]
    told += list(unheeded("fit", given))
    return f"without effect: {'; '.join(told)}" if told else ""


def _code(states: Sequence[State]) -> int:
    """Return the exit code: 2 where a run has failed or cannot be built."""
    return 2 if any(state.kind in ("failed", "impossible") for state in states) else 0


def _help() -> str:
    usage = f"usage: python -m qatlab.sweep {'|'.join(WORDS)} sweep=<name> [jobs=N] [option=value] ..."
    return f"{usage}\n\n{__doc__}\nsweeps\n{_sweeps()}"


def _sweeps() -> str:
    files = recipe_files("sweep", config_dir_of(sys.argv[1:]))
    return "\n".join(f"  {name:22} {first_line(path)}" for name, path in files.items())


if __name__ == "__main__":
    main()
