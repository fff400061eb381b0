"""Every command under one name: ``qatlab fit ...`` runs what ``python -m qatlab.fit ...`` runs."""

from __future__ import annotations

import os
import runpy
import sys
from importlib import import_module

from qatlab.cli import errors_as_sentences
from qatlab.config.completion import asks_for_completion, typed_line
from qatlab.core.errors import UserError, nearest

COMMANDS = ("fit", "evaluate", "export", "bench", "sweep")


def main() -> None:
    """Run the command that the first word names, with the words after it; exits with 2 and a sentence where there is none."""
    # Each command has such a context of its own: only mistakes in choosing one are explained here.
    with errors_as_sentences(None):
        command, arguments = _chosen(sys.argv[1:])
    if command is None:
        return
    sys.argv[1:] = arguments
    # As `python -m qatlab.fit` does it, with the command as the module __main__: Lightning starts the processes for further
    # devices from the name of that module.
    runpy.run_module(f"qatlab.{command}", run_name="__main__", alter_sys=True)


def _chosen(words: list[str]) -> tuple[str | None, list[str]]:
    """Return the command and its arguments; the command is None where something was printed instead of running one."""
    if not words or words[0] in ("--help", "-h"):
        print(_help())
        return None, []
    if asks_for_completion(words):
        return _completing(), words
    command, *arguments = words
    if command not in COMMANDS:
        raise UserError(f"{command} is none of {', '.join(COMMANDS)}{nearest(command, COMMANDS)}: it comes first.")
    return command, arguments


def _completing() -> str | None:
    """Return the command that answers a shell; None, after printing all commands, where the shell completes their names."""
    if "COMP_LINE" not in os.environ:
        return "fit"  # a user asks for the script of a shell, which every command prints alike
    line = typed_line()
    if line.command is None:
        print("\n".join(line.prefix + name for name in COMMANDS))
    return line.command if line.command in COMMANDS else None


def _help() -> str:
    lines = [f"  {name:10} {_first_line(name)}" for name in COMMANDS]
    return "\n".join(
        [
            f"usage: qatlab {'|'.join(COMMANDS)} [option=value] ...",
            "",
            *lines,
            "",
            "`qatlab <command>` is `python -m qatlab.<command>`; --help after a command lists what it takes.",
        ]
    )


def _first_line(command: str) -> str:
    """Return the first line of a command's module docstring, which says what the command does."""
    # Importing the commands for their docstrings is cheap: they load torch only once they run.
    return (import_module(f"qatlab.{command}").__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    main()
