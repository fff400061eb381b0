"""Tab completion: the scripts for shells, and the command line that a script sends to be completed."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from importlib.resources import files

from qatlab.core.errors import UserError

# zsh reads the script of bash by its bashcompinit.
_SCRIPTS = {"bash": "completion.bash", "zsh": "completion.bash", "fish": "completion.fish"}


@dataclass
class Line:
    """A command line up to the cursor: the command, None while its name is typed, the words after it, and the last one."""

    command: str | None
    words: list[str]
    word: str
    prefix: str = ""
    """What stands before a command's name in the same word: "qatlab." after `python -m`."""


def asks_for_completion(arguments: list[str]) -> bool:
    """Return whether the command line holds Hydra's option by which a shell asks for completions."""
    return bool({"-sc", "--shell-completion"} & set(arguments))


def script(arguments: list[str]) -> str | None:
    """Return the script for the shell in ``-sc install=<shell>``, None for ``-sc query=``.

    Raises UserError for a shell without one and for anything else after ``-sc``.
    """
    if any(argument.startswith("query=") for argument in arguments):
        return None
    shells = [argument.removeprefix("install=") for argument in arguments if argument.startswith("install=")]
    if not shells or shells[0] not in _SCRIPTS:
        given = " ".join(arguments)
        raise UserError(
            f"{given}: -sc takes install= and one of {', '.join(_SCRIPTS)}; a new shell is without it again."
        )
    return (files("qatlab") / "assets" / _SCRIPTS[shells[0]]).read_text()


def typed_line() -> Line:
    """Return the line in $COMP_LINE, `qatlab fit a=1 b` or `python -m qatlab.fit a=1 b`; an empty one for an open quote."""
    text = os.environ.get("COMP_LINE", "")
    try:
        words = shlex.split(text)
    except ValueError:  # inside an open quote nothing sensible can be completed
        return Line(command="", words=[], word="")
    # After a space the word to complete is a new, still empty one, which shlex does not give.
    if text[-1:].isspace():
        words.append("")
    words, prefix = words[1:], ""
    if words[:1] == ["-m"] and len(words) > 1:
        module, *words = words[1:]
        # "-m qatlab.fit" names the command in the module, "-m qatlab fit" in the word after it.
        if module != "qatlab" or not words:
            words.insert(0, module.removeprefix("qatlab").removeprefix("."))
            prefix = "qatlab."
    if len(words) < 2:
        return Line(None, [], "".join(words), prefix)
    return Line(words[0], words[1:-1], words[-1])
