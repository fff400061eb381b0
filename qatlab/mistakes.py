"""A mistake in the options becomes one or two sentences: what was given, what is known, what comes nearest."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.errors import InstantiationException, OverrideParseException
from yaml import YAMLError

from qatlab.config import Config, recipe_files
from qatlab.errors import QUOTED_SHARDS, UserError, nearest
from qatlab.usage import known_keys

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def explain(error: BaseException, own: Path | None = None) -> str | None:
    """Return one or two sentences for a mistake in the options; None when it is none, so that its traceback shows.

    ``own`` is the folder of the user's own choices.
    """
    cause = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, UserError):
        # From a loader process the sentence arrives below that process's traceback.
        return str(cause).rpartition("UserError: ")[2].strip()
    if isinstance(error, InstantiationException):
        return None
    if isinstance(error, YAMLError):
        return f"not YAML: {' '.join(str(error).split())}."
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override))
    text = "\n".join(_messages(error))
    known = _unknown_choice(text, own) or _unknown_option(text, own) or _wrong_value(text)
    return known or f"{text.splitlines()[0].rstrip('.')}."


def _messages(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield str(error)
        error = error.__cause__


def _unreadable(override: str) -> str:
    """Return the sentence for an override outside Hydra's grammar."""
    if override.startswith("data.shards="):
        return f"Hydra could not read data.shards: quote the pattern for the shell and for Hydra, {QUOTED_SHARDS}."
    key, equals, value = override.partition("=")
    if not equals:
        return f"{key} has no value: options are written name=value."
    return f"Hydra could not read {override}: quote the value for the shell and for Hydra, \"{key}='{value}'\"."


def _unknown_choice(text: str, own: Path | None) -> str | None:
    """Return the sentence for group=choice without such a file."""
    if found := re.search(r"Ambiguous value for argument '(.*)'", text):
        return f"{found.group(1)} names several choices: add -m to run them one after the other."
    if found := re.search(r"Multiple values for ([\w/]+)|([\w/]+) appears more than once", text):
        group = found.group(1) or found.group(2)
        return f"{group} is given twice; the command line chooses one with {group}=<choice>, without a plus."
    found = re.search(r"Could not (?:find|load) '([\w/]+)/([^'/]*)'", text)
    if not found:
        return None
    group, choice = found.groups()
    names = sorted(recipe_files("" if group == "recipe" else group, own))
    return f"{group}={choice} is unknown{nearest(choice, names)}; there are {', '.join(names)}."


def _unknown_option(text: str, own: Path | None) -> str | None:
    """Return the sentence for a key that no option has."""
    found = re.search(r"Could not override '([\w./@]+)'", text) or re.search(r" not in .*\s+full_key: ([\w.]+)", text)
    if not found:
        return None
    key, known = found.group(1), known_keys(own)
    if key == "recipe" and own:
        return f"a file in {own / 'recipe'} lacks its first line, '# @package _global_'."
    if key in ("quant.rules", "callbacks"):
        return f'{key} is added to with a plus: "+{key}={{...}}".'
    parts = key.split(".")
    if parts[:2] == ["suite", "sets"]:
        if len(parts) < 4:
            return _no_such_set(key)
        known = [name.replace("<name>", parts[2]) for name in known]
    if key in known:
        return f"{key} is not an option of the choice made here; --help lists what each one takes."
    return f"{key} is not an option{nearest(key, known)}; --help lists them."


def _no_such_set(key: str) -> str:
    return (
        f"{key} is not in the suite; sets are added in a file, FOLDER/suite/mine.yaml: --config-dir FOLDER suite=mine."
    )


def _wrong_value(text: str) -> str | None:
    """Return the sentence for a value of the wrong type, on the command line or in a file."""
    override = re.search(r"Error merging override [+~]*([\w.]+)(?:=(.*))?", text)
    full_key = re.search(r"full_key: ([\w.]+)", text)
    if override is None and full_key is None:
        return None
    key = override.group(1) if override else full_key.group(1)  # type: ignore[union-attr]
    if re.match(r"suite\.sets\.\w+\.?", key) and "not a subclass" in text:
        return _no_such_set(key)
    value = override and override.group(2)
    if value is None and (stated := re.search(r"[Vv]alue '([^']*)'", text)):
        value = "null" if stated.group(1) == "None" else stated.group(1)
    hint = _hint(key)
    if value is None or hint is None:
        reason = next(line for line in text.splitlines() if "Error merging" not in line)
        return f"{key}: {reason}."
    return f"{key}={value}: it takes {named(hint)}."


def _hint(key: str) -> Any:
    """Return the type of an option, None where it has none."""
    hint: Any = Config
    for part in key.split("."):
        if is_dataclass(hint):
            hint = get_type_hints(hint).get(part)
        elif get_origin(hint) is dict:
            hint = get_args(hint)[1]
        else:
            return None
    return hint


def named(hint: Any) -> str:
    """Return a type in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(named(part) for part in get_args(hint))
    if is_dataclass(hint):
        return f"options of its own ({', '.join(get_type_hints(hint))})"
    if get_origin(hint) in (list, tuple):
        return "a list"
    return _NAMES.get(hint, "a mapping")


def fits(value: Any, hint: Any) -> bool:
    """Return whether a plain value is of the type ``hint``; True for a hint that is none of the plain types."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if hint not in _NAMES:
        return True
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
