"""What every entry point shares: Hydra's command line, with mistakes told in a sentence."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qatlab.blocks import check_blocks
from qatlab.config import GROUPS, Config, as_config
from qatlab.errors import QUOTED_SHARDS, UserError
from qatlab.mistakes import explain
from qatlab.stopping import EXIT_INTERRUPTED, Stopped, rank
from qatlab.usage import help_text, recipe_lines

Task = Callable[[Config, str], Any]
CONFIG_DIR = ("--config-dir", "-cd")
# With one of these Hydra prints something and runs nothing.
_FLAGS = {"--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--hydra-help", "--version", "--resolve"}


def main(task: Task, needs_recipe: bool = True) -> None:
    """Run ``task(config, recipe name)`` with the options of the command line; exits with 2 and a sentence on a mistake."""
    arguments = sys.argv[1:]
    own = config_dir(arguments)
    program = f"python -m qatlab.{Path(sys.argv[0]).stem.removeprefix('qatlab-')}"
    with told(own):
        if {"--help", "-h"} & set(arguments):
            print(help_text(program, own, needs_recipe, sys.modules[task.__module__].__doc__ or ""))
            return
        _check(arguments, own, needs_recipe, program)
        # argparse takes overrides in one row only: `a=1 --config-dir my b=2` would be refused.
        sys.argv[1:] = sorted(arguments, key=is_override)
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on instead of printing them
        mistakes: list[BaseException] = []
        hydra.main(config_path=None, config_name="qatlab", version_base="1.3")(_job(task, mistakes))()
        if len(mistakes) > 1:
            raise UserError(
                f"{len(mistakes)} runs failed, each told where it did; the first: {explain(mistakes[0], own)}"
            )
        if mistakes:
            raise mistakes[0]


@contextmanager
def told(own: Path | None) -> Iterator[None]:
    """Inside this context a mistake ends the process with 2 and a sentence, and a signal with its code and one too."""
    try:
        with _marked():
            yield
    except (UserError, HydraException, OmegaConfBaseException, YAMLError) as error:
        sentence = explain(error, own)
        if sentence is None:
            raise
        print(f"qatlab: {f'rank {rank()}: ' if rank() else ''}{sentence}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        # Lightning kills a group in which a process other than the first ends with anything but 0.
        if rank() == 0:
            print(
                f"qatlab: stopped by {stopped}; the same command goes on from the last checkpoint or finished stage.",
                file=sys.stderr,
            )
        sys.exit(stopped.exit_code if rank() == 0 else 0)
    except KeyboardInterrupt:
        print("qatlab: interrupted; what was finished before is stored.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


@contextmanager
def _marked() -> Iterator[None]:
    """Make the file $QATLAB_MISTAKE, for a batch script, where the process ends for anything but a signal.

    Of several processes one that errs has the others terminated, who take that for a stop: their exit codes tell a script
    to start the job again, and it would err again.
    """
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException as error:
        mark = os.environ.get("QATLAB_MISTAKE")
        if mark and not (isinstance(error, SystemExit) and not error.code):
            with suppress(OSError):  # a full disk: what went wrong is told all the same
                Path(mark).touch()
        raise


def is_override(argument: str) -> bool:
    """Return whether an argument is one of Hydra's overrides, and no flag."""
    return not argument.startswith("-") and ("=" in argument or argument.startswith(("~", "+")))


def config_dir(arguments: list[str]) -> Path | None:
    """Return the folder of the user's own choices that the command line names, if any."""
    for i, argument in enumerate(arguments):
        if argument in CONFIG_DIR and i + 1 < len(arguments):
            return Path(arguments[i + 1])
        if argument.startswith("--config-dir="):
            return Path(argument.split("=", 1)[1])
    return None


def _job(task: Task, mistakes: list[BaseException]) -> Callable[[DictConfig], None]:
    """Return Hydra's job; a mistake is kept in ``mistakes``, because Hydra would print a heading over it."""

    def job(composed: DictConfig) -> None:
        try:
            config = _checked(composed)
        except (UserError, OmegaConfBaseException) as error:
            mistakes.append(error)
            return
        try:
            task(config, HydraConfig.get().runtime.choices.get("recipe") or "evaluate")
        except (UserError, InstantiationException) as error:
            mistakes.append(error)
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # at once: the other runs may take hours
                cell = " ".join(HydraConfig.get().overrides.task)
                print(f"qatlab: {cell}: {explain(error, None) or error}", file=sys.stderr, flush=True)

    return job


def _checked(composed: DictConfig) -> Config:
    """Return the options; raises UserError for what Hydra does not see."""
    config = as_config(composed)
    if HydraConfig.get().mode == RunMode.MULTIRUN and config.trainer.devices * config.trainer.num_nodes != 1:
        raise UserError(
            f"trainer.devices={config.trainer.devices} with trainer.num_nodes={config.trainer.num_nodes} does not go with "
            "-m: start one process per run (a second device's process would walk the sweep by itself)."
        )
    check_blocks(config)
    return config


def _check_evaluation(arguments: list[str], program: str) -> None:
    """Raise UserError for options that what evaluates would not heed, so that no one takes its numbers for theirs."""
    unheeded = {"recipe", "quant", "objective", "optim"}
    of_run = unheeded | {"model", "data", "seed"}
    stored = any(argument.startswith("checkpoint=") for argument in arguments)
    for argument in arguments:
        group = re.split(r"[./=@]", argument.lstrip("+~"))[0]
        if is_override(argument) and group in (of_run if stored else unheeded):
            taken = "the run in checkpoint= as it is" if stored else "an unquantized model, or the run in checkpoint="
            raise UserError(f"{argument}: `{program}` takes {taken}; drop the option, or use `python -m qatlab.fit`.")


def _check(arguments: list[str], own: Path | None, needs_recipe: bool, program: str) -> None:
    """Raise UserError for what is wrong before Hydra looks at the command line."""
    if sum(argument.startswith("data.shards=") for argument in arguments) > 1:
        raise UserError(f"the shell expanded the braces of data.shards: quote the pattern twice, {QUOTED_SHARDS}.")
    for group in ["recipe", *GROUPS, "quant"]:
        if f"{group}=null" in arguments:
            left_out = "~quant/weight ~quant/act" if group == "quant" else f"~{group}"
            remedy = (
                f"write {left_out} to leave it out" if group.startswith("quant") else "name a choice, --help lists them"
            )
            raise UserError(f"{group}=null: Hydra takes no null for a group; {remedy}.")
    if sweep := next((argument for argument in arguments if argument.startswith("sweep=")), None):
        raise UserError(f"{sweep}: `python -m qatlab.sweep run {sweep}` runs it, every run in a process of its own.")
    for argument in arguments:
        if found := re.match(r"--([\w./]+)=", argument):
            name = found.group(1)
            if name not in ("config-dir", "config-path", "config-name", "package"):
                raise UserError(f"{argument} is not known: options have no dashes, {argument.removeprefix('--')}.")
    if not needs_recipe:
        _check_evaluation(arguments, program)
    if needs_recipe and not any(a.startswith("recipe=") or a in _FLAGS for a in arguments):
        listed = "\n".join(f"  {name:22} {line}" for name, line in recipe_lines(own))
        raise UserError(f"no recipe given; run `{program} recipe=<name>` with one of\n{listed}")
