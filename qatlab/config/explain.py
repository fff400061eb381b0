"""Messages for mistakes in the options: one or two sentences with the given value, the known ones and the nearest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from yaml import YAMLError

from qatlab.config import ENTRIES, GROUPS, Config, recipe_files
from qatlab.config.help import known_keys
from qatlab.config.renamed import present
from qatlab.core.domains import fits, hints_of, words
from qatlab.core.errors import QUOTED_SHARDS, UserError, nearest
from qatlab.core.files import FULL, REFUSALS


def explain(error: BaseException, config_dir: Path | None = None) -> str | None:
    """Return one or two sentences for a mistake in the options; None for an error that is no mistake of the user.

    The caller lets the traceback of such an error show. ``config_dir`` is the folder of the user's own choices.
    """
    # Hydra wraps whatever a class raises while it is built; the sentence that helps is that of the innermost error.
    cause = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, UserError):
        # A DataLoader puts the traceback of its loader process before the sentence.
        return str(cause).rpartition("UserError: ")[2].strip()
    # Hydra's exception for a choice without a file is an OSError too, and is explained as an unknown choice below.
    if isinstance(cause, OSError) and not isinstance(cause, HydraException):
        return _refused(cause)
    # A class that fails with something other than a UserError has a fault of its own: its traceback is what helps.
    if isinstance(error, InstantiationException):
        return None
    if isinstance(error, YAMLError):
        return f"not YAML: {' '.join(str(error).split())}."
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override))
    # Hydra says one part of what is wrong, and OmegaConf, from which Hydra raised, another: both are searched.
    text = "\n".join(_messages(error))
    # Hydra and OmegaConf raise one class for many mistakes, so the words tell which one it is. The upper bound of
    # hydra-core in pyproject.toml, which bounds OmegaConf in turn, and a test for each message keep the words as expected.
    known = _unknown_choice(text, config_dir) or _unknown_option(text, config_dir) or _wrong_value(text)
    return known or f"{text.splitlines()[0].rstrip('.')}."


def _refused(error: OSError) -> str | None:
    """Return the sentence for what the disk or its rights did not allow; None for what is a fault of the program."""
    if error.filename is None and error.errno in FULL:  # a write does not know its file's name, an open does
        return f"a file could not be written ({error.strerror}): make room on the disk; the same command goes on from there."
    # Without a file's name there is nothing to look at: a broken socket or pipe, for example, is no path to correct.
    if error.filename is None or error.errno not in (*REFUSALS, *FULL):
        return None
    return f"{error.filename} cannot be used ({error.strerror}): look at the path, its rights and its disk."


def _messages(error: BaseException | None) -> Iterator[str]:
    """Yield the message of an error and those of the errors that it was raised from, outermost first."""
    while error is not None:
        yield str(error)
        error = error.__cause__


def _unreadable(override: str) -> str:
    """Return the sentence for an override outside Hydra's grammar."""
    # The braces of a pattern are the usual reason, and both the shell and Hydra give braces a meaning of their own.
    if override.startswith("data.shards="):
        return f"Hydra could not read data.shards: quote the pattern for the shell and for Hydra, {QUOTED_SHARDS}."
    key, equals, value = override.partition("=")
    if not equals:
        return f"{key} has no value: options are written name=value, with quotes around a value with spaces, \"name='a b'\"."
    return f"Hydra could not read {override}: quote the value for the shell and for Hydra, \"{key}='{value}'\"."


def _unknown_choice(text: str, config_dir: Path | None) -> str | None:
    """Return the sentence for group=choice without such a file."""
    if found := re.search(r"Ambiguous value for argument '(.*)'", text):
        return _several(found.group(1))
    if found := re.search(r"Multiple values for ([\w/]+)|([\w/]+) appears more than once", text):
        return _chosen_twice(found.group(1) or found.group(2), config_dir)
    found = re.search(r"Could not (?:find|load) '([\w/]+)/([^'/]*)'", text)
    if not found:
        return None
    group, choice = found.groups()
    names = sorted(recipe_files("" if group == "recipe" else group, config_dir))
    if not names:
        return _unknown_group(group, text)
    return f"{group}={choice} is unknown{nearest(choice, names)}; there are {', '.join(names)}."


def _several(override: str) -> str:
    """Return the sentence for a value with a comma, which is several values to Hydra."""
    key, _, value = override.partition("=")
    if key == "recipe" or key in GROUPS:
        return f"{override} names several choices: add -m to run them one after the other."
    quoted = f"\"{key}='{value}'\""
    if fits(value.split(","), _hint(key) or Any):
        return f'{override}: a list is written "{key}=[{value}]"; a value with a comma is quoted twice, {quoted}.'
    if not fits(value, _hint(key) or Any):  # a number, say, of which several values can only be meant
        return f"{override}: a comma separates several values; add -m to run them one after the other."
    return (
        f"{override}: a comma separates several values, to run with -m; quote it for the shell and for Hydra, {quoted}."
    )


def _chosen_twice(group: str, config_dir: Path | None) -> str:
    """Return the sentence for a group that is chosen where a choice stands already: in a file of the user, or with a plus."""
    for file in sorted(config_dir.rglob("*.yaml")) if config_dir else []:
        if group in _groups_chosen(file):
            return (
                f"{file}: {group} has a choice already, which its defaults replace by '- override /{group}: <choice>'."
            )
    return f"{group} is given twice; the command line chooses one with {group}=<choice>, without a plus."


def _groups_chosen(file: Path) -> set[str]:
    """Return the groups that the defaults of a file choose from without overriding; none of a file that is no YAML."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8", errors="replace"))
    except YAMLError:  # Hydra reports such a file where it is chosen
        return set()
    entries = content.get("defaults") if isinstance(content, dict) else None
    mappings = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {str(key).lstrip("/").partition("@")[0] for entry in mappings for key in entry}


def _unknown_group(group: str, text: str) -> str:
    """Return the sentence for a folder without choices, in a file's defaults or on the command line."""
    file = re.search(r"In '([\w/]+)': Could not", text)
    where = f"{file.group(1)}.yaml: " if file and file.group(1) != "qatlab" else ""
    if (whole := group.partition("/")[2]) in GROUPS:
        return f"{where}{group} is no group of choices: in a file's defaults {whole} has a slash in front, /{whole}."
    known = ["recipe", *GROUPS]
    return f"{where}{group} is no group of choices{nearest(group, known)}; there are {', '.join(known)}."


def _unknown_option(text: str, config_dir: Path | None) -> str | None:
    """Return the sentence for a key that no option has."""
    found = re.search(r"Could not override '([\w./@]+)'", text) or re.search(r" not in .*\s+full_key: ([\w.-]+)", text)
    if not found:
        return None
    key, known = found.group(1), known_keys(config_dir)
    if (group := key.partition("@")[0]) != key and group.partition("/")[2] in GROUPS:
        return _unknown_group(group, text)
    if key == "recipe" and config_dir:
        return f"a file in {config_dir / 'recipe'} lacks its first line, '# @package _global_'."
    # These two are open mappings: a name that no option has is no typing mistake there.
    if key in ("quant.rules", "callbacks"):
        return f'{key} is added to with a plus: "+{key}={{...}}".'
    parts = key.split(".")
    if parts[:2] == ["suite", "sets"] and len(parts) > 3:
        # The known keys hold "<name>" where a set's name stands; the nearest key is wanted with the name as it was typed.
        known = [name.replace("<name>", parts[2]) for name in known]
    # An option of a block exists only while that block is chosen: "quant.weight.group_size" without quant/weight=... is known
    # to qatlab and refused by Hydra.
    if key in known:
        return f"{key} is not an option of the choice made here; --help lists what each one takes."
    return f"{key} is not an option{nearest(key, known)}; --help lists them."


def _wrong_value(text: str) -> str | None:
    """Return the sentence for a value of the wrong type, on the command line or in a file."""
    override = re.search(r"Error merging override [+~]*([\w.-]+)(?:=(.*))?", text)
    full_key = re.search(r"full_key: ([\w.-]+)", text)
    if override is None and full_key is None:
        return None
    key = override.group(1) if override else full_key.group(1)  # type: ignore[union-attr]
    # A value from a file is in no override; OmegaConf's message quotes it, with Python's None for YAML's null.
    value = override and override.group(2)
    if value is None and (stated := re.search(r"[Vv]alue '([^']*)'", text)):
        value = "null" if stated.group(1) == "None" else stated.group(1)
    hint = _hint(key)
    # Below an untyped option (a _target_ block) there is no type to name: the library's own reason is all that is known.
    if value is None or hint is None:
        reason = next(line for line in text.splitlines() if "Error merging" not in line)
        return f"{key}: {reason}."
    return f"{key}={value}: it takes {words(hint)}."


def _hint(key: str) -> Any:
    """Return the annotated type of the option with the dotted name ``key``; None for an unknown or untyped one."""
    hint: Any = Config
    before = ""
    for part in present(key).split("."):
        if before in ENTRIES:  # this part of the key is a set's name, the next one an option of it
            hint = ENTRIES[before]
        elif is_dataclass(hint):
            hint = hints_of(hint).get(part)
        else:
            return None
        before = f"{before}.{part}".lstrip(".")
    return hint
