"""What every entry point shares: Hydra's command line, with mistakes told in a sentence."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qatlab.config import GROUPS, Config, as_config, uncopied_store
from qatlab.config.blocks import check_blocks
from qatlab.config.completion import Line, asks_for_completion, script, typed_line
from qatlab.config.explain import explain
from qatlab.config.heeded import IN_SWEEP, PROGRAMS, heeds, key_of, unheeded, without_effect
from qatlab.config.help import help_text, recipe_lines
from qatlab.config.renamed import present, require_one_value
from qatlab.config.trust import name_targets
from qatlab.core.errors import QUOTED_SHARDS, UserError
from qatlab.core.files import expanded
from qatlab.core.ranks import is_first, rank
from qatlab.core.secrets import shown
from qatlab.core.signals import EXIT_INTERRUPTED, Stopped
from qatlab.core.unheard import unheard

Task = Callable[[Config, str], Any]
CONFIG_DIR = ("--config-dir", "-cd")
# With one of these flags Hydra prints something and runs nothing: no recipe is needed.
_FLAGS = {"--cfg", "-c", "--info", "-i", "--hydra-help", "--version", "--resolve"}


def main(task: Task) -> None:
    """Run ``task(config, recipe name)`` with the options of the command line; exits with 2 and a sentence on a mistake.

    Which program it is, and so what it heeds, says the file that Python was started with.
    """
    arguments = sys.argv[1:]
    config_dir = config_dir_of(arguments)
    started = Path(sys.argv[0]).stem
    program = started if started in PROGRAMS else "fit"
    with errors_as_sentences(config_dir):
        if (section := asked_section(arguments)) is not None:
            print(help_text(program, config_dir, sys.modules[task.__module__].__doc__ or "", section))
            return
        if asks_for_completion(arguments):
            complete(arguments, typed_line(), program)
            return
        _check(arguments, config_dir, program)
        # Before Hydra composes: stored options are read inside the task, and are checked against these classes there.
        name_targets(arguments, config_dir)
        # argparse takes overrides only where they follow each other: `a=1 --config-dir my b=2` would be refused.
        sys.argv[1:] = sorted(_at_home(arguments, config_dir), key=is_override)
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on instead of printing them
        mistakes: list[BaseException] = []
        _compose_and_call(_job(task, mistakes))
        # With -m there is one job for each combination: a failed job must not keep the later ones from running.
        if len(mistakes) > 1:
            raise UserError(
                f"{len(mistakes)} runs failed, each told where it did; the first: {explain(mistakes[0], config_dir)}"
            )
        if mistakes:
            raise mistakes[0]


def complete(arguments: list[str], line: Line, program: str = "fit") -> None:
    """Print the script for a shell, or the words that may complete ``line``, one a line, as ``-sc`` in ``arguments`` asks.

    Options that ``program`` would refuse are none of them.
    """
    if (text := script(arguments)) is not None:
        print(text)
        return
    # Hydra splits the line at every space, also inside quotes, and knows flags only where they stand before the overrides:
    # a word with a space in it, or a flag that takes a value, would spoil the completion of the last word.
    words = [word for word in line.words if is_override(word) and not re.search(r"\s", word)]
    flags = [word for word in line.words if word in ("-m", "--multirun")]
    os.environ["COMP_LINE"] = " ".join(["qatlab", *flags, *words, line.word])
    config_dir = config_dir_of(line.words)
    # The fish form prints one candidate a line and nothing else, which the scripts of all shells can read.
    sys.argv[1:] = ["-sc", "query=fish", *(["--config-dir", str(config_dir)] if config_dir else [])]
    found = io.StringIO()
    with redirect_stdout(found):
        _compose_and_call(lambda composed: None)
    stored = any(word.startswith("checkpoint=") for word in words)
    for word in found.getvalue().splitlines():
        key = key_of(word)
        if heeds(program, key.rstrip("./"), stored) and present(key) == key:
            print(word)


def _compose_and_call(job: Callable[[DictConfig], None]) -> None:
    """Let Hydra do what the command line asks: compose the options and call ``job``, print them, or complete a line."""
    # Hydra also looks for choices in the package that the job's module is in. With a module of qatlab, the folders of that
    # package would be offered and accepted as choices.
    job.__module__ = "__main__"
    with uncopied_store():
        hydra.main(config_path=None, config_name="qatlab", version_base="1.3")(job)()


@contextmanager
def errors_as_sentences(config_dir: Path | None) -> Iterator[None]:
    """Inside this context a mistake ends the process with exit code 2 and a sentence, a signal with its code and a sentence.

    A closed pipe or a full disk behind stdout does not end the process.
    """
    with unheard(), _explained(config_dir):
        yield


@contextmanager
def _explained(config_dir: Path | None) -> Iterator[None]:
    """Inside this context errors and signals become a sentence on stderr and an exit code."""
    try:
        # Inside, so that _marked sees the errors before they become a SystemExit.
        with _marked():
            yield
    except (UserError, HydraException, OmegaConfBaseException, YAMLError, OSError) as error:
        sentence = explain(error, config_dir)
        if sentence is None:
            raise
        # An error may quote an address with its signature: the sentence goes to logs that others read.
        print(f"qatlab: {f'rank {rank()}: ' if rank() else ''}{shown(sentence)}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        # Lightning kills all processes of a run when one other than the first ends with an exit code other than 0, and the first
        # may be writing its checkpoint then.
        if is_first():
            print(
                f"qatlab: stopped by {stopped}; the same command goes on from the last checkpoint or finished stage.",
                file=sys.stderr,
            )
        sys.exit(stopped.exit_code if is_first() else 0)
    except KeyboardInterrupt:
        print("qatlab: interrupted; what was finished before is stored.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


@contextmanager
def _marked() -> Iterator[None]:
    """Make the file $QATLAB_MISTAKE, which a batch script looks for, where the process ends by an error.

    When one of several processes fails, the launcher terminates the others. They take the signal for a stop, and their exit
    code asks the batch script to start the job again, where it would fail again. The file tells the script not to.
    """
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException as error:
        mark = os.environ.get("QATLAB_MISTAKE")
        if mark and not (isinstance(error, SystemExit) and not error.code):
            with suppress(OSError):  # on a full disk the file cannot be made; the error below is printed all the same
                Path(mark).touch()
        raise


def _at_home(arguments: list[str], config_dir: Path | None) -> list[str]:
    """Return the arguments with the folder of --config-dir as ``config_dir`` says it: Hydra does not understand its ~."""
    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("--config-dir="):
            argument = f"--config-dir={config_dir}"
        found.append(str(config_dir) if before in CONFIG_DIR else argument)
    return found


def is_override(argument: str) -> bool:
    """Return whether an argument is one of Hydra's overrides, and no flag."""
    return not argument.startswith("-") and ("=" in argument or argument.startswith(("~", "+")))


def config_dir_of(arguments: list[str]) -> Path | None:
    """Return the folder of the user's own choices that the command line names, None without one."""
    # Needed before Hydra parses the line: help, completion and the sentences for mistakes know the user's choices too.
    for i, argument in enumerate(arguments):
        if argument in CONFIG_DIR and i + 1 < len(arguments):
            return Path(expanded(arguments[i + 1]))
        if argument.startswith("--config-dir="):
            return Path(expanded(argument.split("=", 1)[1]))
    return None


def asked_section(arguments: list[str]) -> str | None:
    """Return the section of the options that ``--help SECTION`` asks for, "" for all of them; None without --help."""
    for flag, following in pairwise([*arguments, ""]):
        if flag in ("--help", "-h"):
            return "" if following.startswith("-") or "=" in following else following
    return None


def _job(task: Task, mistakes: list[BaseException]) -> Callable[[DictConfig], None]:
    """Return the job for Hydra to call; it adds mistakes to ``mistakes``.

    A mistake that the job raised would pass through Hydra, which prints a heading of its own over it.
    """

    def job(composed: DictConfig) -> None:
        try:
            config = _checked(composed)
        except (UserError, OmegaConfBaseException) as error:
            mistakes.append(error)
            return
        try:
            # Without a recipe nothing is trained: the run is named after the one thing that is done.
            task(config, HydraConfig.get().runtime.choices.get("recipe") or "evaluate")
        except (UserError, InstantiationException) as error:
            mistakes.append(error)
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # said now, because the runs that follow may take hours
                cell = " ".join(HydraConfig.get().overrides.task)
                print(shown(f"qatlab: {cell}: {explain(error, None) or error}"), file=sys.stderr, flush=True)

    return job


def _checked(composed: DictConfig) -> Config:
    """Return the options as typed dataclasses; raises UserError for mistakes that Hydra cannot see."""
    config = as_config(composed)
    if HydraConfig.get().mode == RunMode.MULTIRUN and config.trainer.devices * config.trainer.num_nodes != 1:
        raise UserError(
            f"trainer.devices={config.trainer.devices} with trainer.num_nodes={config.trainer.num_nodes} does not go with "
            "-m: start one process per run (a second device's process would walk the sweep by itself)."
        )
    # A recipe from somebody else could otherwise set trust=true and name its own code in the same file.
    if config.trust and not any(argument.startswith("trust=") for argument in HydraConfig.get().overrides.task):
        raise UserError(
            "trust=true stands in a file: it is for the command line, where you say it of what you looked at."
        )
    # Before the blocks are looked at, for which their classes and with these torch are imported.
    _refuse_without_effect(config, [*HydraConfig.get().overrides.task, *HydraConfig.get().overrides.hydra])
    check_blocks(config)
    return config


def _refuse_without_effect(config: Config, overrides: list[str]) -> None:
    """Raise UserError for an option of the command line that has no effect in this run; in one of several it is told.

    Ignored in silence, it would leave the user with numbers that seem to be those of the options given. A recipe may hold
    options for other choices than those that it is used with, so that what stands in files is never refused.
    """
    vain = {} if IN_SWEEP in os.environ else without_effect(config, overrides)
    if vain and HydraConfig.get().mode == RunMode.MULTIRUN:
        told = "; ".join(f"{argument} ({why})" for argument, why in vain.items())
        run = " ".join(HydraConfig.get().overrides.task)
        print(shown(f"qatlab: without effect in {run}: {told}"), file=sys.stderr, flush=True)
        return
    for argument, why in vain.items():
        raise UserError(f"{argument} has no effect: {why}; leave it out.")


def _check(arguments: list[str], config_dir: Path | None, program: str) -> None:
    """Raise UserError for what is wrong before Hydra looks at the command line."""
    # Unquoted, data.shards={00000..00331}.tar reaches this process as 332 options, of which Hydra would keep the last alone.
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
    # argparse would answer --fit.steps=100 with its usage, which shows none of qatlab's options.
    for argument in arguments:
        if found := re.match(r"--([\w./]+)=", argument):
            name = found.group(1)
            if name not in ("config-dir", "config-path", "config-name", "package"):
                raise UserError(f"{argument} is not known: options have no dashes, {argument.removeprefix('--')}.")
    require_one_value(arguments)
    if IN_SWEEP not in os.environ:
        for sentence in unheeded(program, [argument for argument in arguments if is_override(argument)]):
            raise UserError(sentence)
    if program == "fit" and not any(a.startswith("recipe=") or a in _FLAGS for a in arguments):
        listed = "\n".join(f"  {name:22} {line}" for name, line in recipe_lines(config_dir))
        raise UserError(f"no recipe given; run `python -m qatlab.{program} recipe=<name>` with one of\n{listed}")
