"""What every entry point shares: Hydra's command line, its help, and mistakes told in a sentence."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qatlab import config as options
from qatlab.errors import UserError, nearest

BLOCKS = ["data", "quant/weight", "quant/act"]  # groups whose choices are _target_ blocks with options of their own
QUOTED_SHARDS = "\"data.shards='/data/cc3m/{00000..00331}.tar'\""


def main(task: Callable[[options.Config, str], Any], needs_recipe: bool = True) -> None:
    """Run ``task(config, recipe name)`` with the options of the command line; exits with 2 and a sentence on a mistake."""
    arguments = sys.argv[1:]
    program = f"python -m qatlab.{Path(sys.argv[0]).stem.removeprefix('qatlab-')}"
    if {"--help", "-h"} & set(arguments):
        print(help_text(program, _config_dir(arguments)))
        return
    try:
        _check(arguments, needs_recipe, program)
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on instead of printing them
        mistakes: list[BaseException] = []
        hydra.main(config_path=None, config_name="qatlab", version_base="1.3")(_job(task, mistakes))()
        if mistakes:
            raise mistakes[0]
    except (UserError, HydraException, OmegaConfBaseException) as error:
        sentence = explain(error, arguments)
        if sentence is None:
            raise
        print(f"qatlab: {sentence}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("qatlab: interrupted; what is finished is kept, the same command goes on from there.", file=sys.stderr)
        sys.exit(130)


def _job(task: Callable[[options.Config, str], Any], mistakes: list[BaseException]) -> Callable[[DictConfig], None]:
    """Return Hydra's job; a mistake is kept in ``mistakes``, because Hydra would print a heading over it."""

    def job(composed: DictConfig) -> None:
        try:
            checked(composed)
        except (UserError, InstantiationException, OmegaConfBaseException) as error:
            mistakes.append(error)

    def checked(composed: DictConfig) -> None:
        config = options.as_config(composed)
        hydra_config = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN and config.trainer.devices * config.trainer.num_nodes != 1:
            raise UserError(
                f"trainer.devices={config.trainer.devices} does not go with -m: start one process per run "
                "(a second device's process would walk the sweep by itself)."
            )
        task(config, hydra_config.runtime.choices.get("recipe") or "evaluate")

    return job


def _check(arguments: list[str], needs_recipe: bool, program: str) -> None:
    """Raise UserError for what is wrong before Hydra looks at the command line."""
    if sum(argument.startswith("data.shards=") for argument in arguments) > 1:
        raise UserError(f"the shell expanded the braces of data.shards: quote the pattern twice, {QUOTED_SHARDS}.")
    flags = {"--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--hydra-help", "--version", "--resolve"}
    if needs_recipe and not any(a.startswith(("recipe=", "+recipe=")) or a in flags for a in arguments):
        listed = "\n".join(f"  {name:22} {line}" for name, line in recipes(_config_dir(arguments)))
        raise UserError(f"no recipe given; run `{program} recipe=<name>` with one of\n{listed}")


def explain(error: BaseException, arguments: list[str]) -> str | None:
    """Return one or two sentences for a mistake in the options; None when it is none, so that its traceback shows."""
    cause = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, UserError):
        # From a loader process the sentence arrives below that process's traceback.
        return str(cause).rpartition("UserError: ")[2].strip()
    if isinstance(error, InstantiationException):
        return str(error).split("\n")[0] if isinstance(cause, (TypeError, ImportError)) else None
    text = "\n".join(_messages(error))
    if "grammar" in text and any(a.startswith("data.shards=") for a in arguments):
        return f"Hydra could not read data.shards: quote the pattern for the shell and for Hydra, {QUOTED_SHARDS}."
    if found := re.search(r"Could not find '([\w/]+)/([\w-]+)'", text):
        group, choice = found.groups()
        names = [
            *options.recipe_files("" if group == "recipe" else group),
            *_own_choices(_config_dir(arguments), group),
        ]
        return f"{group}={choice} is unknown{nearest(choice, names)}; there are {', '.join(sorted(names))}."
    if found := re.search(r"Could not override '([\w./@]+)'|full_key: ([\w.]+)", text):
        key = found.group(1) or found.group(2)
        if "Could not override" in text or "not in" in text:
            known = [*(name for name, _ in option_sentences()), *block_options()]
            return f"{key} is not an option{nearest(key, known)}; --help lists them."
        return f"{key}: {text.splitlines()[-1] if 'full_key' in text.splitlines()[0] else _value_error(text)}"
    return text.splitlines()[0]


def _messages(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield str(error)
        error = error.__cause__


def _value_error(text: str) -> str:
    """Return the line of an OmegaConf message that names the value and the type that was expected."""
    lines = [line for line in text.splitlines() if line.startswith(("Value '", "Incompatible value", "Cannot convert"))]
    return f"{lines[0]}." if lines else text.splitlines()[0]


def block_options() -> Iterator[str]:
    """Yield the dotted options of the _target_ blocks: data.* and quant.*.* of every choice."""
    for group in BLOCKS:
        for path in options.recipe_files(group).values():
            yield from (f"{group.replace('/', '.')}.{key!s}" for key in OmegaConf.load(path) if key != "_target_")


def _config_dir(arguments: list[str]) -> Path | None:
    for i, argument in enumerate(arguments):
        if argument in ("--config-dir", "-cd") and i + 1 < len(arguments):
            return Path(arguments[i + 1])
        if argument.startswith("--config-dir="):
            return Path(argument.split("=", 1)[1])
    return None


def _own_choices(folder: Path | None, group: str) -> list[str]:
    return [path.stem for path in sorted((folder / group).glob("*.yaml"))] if folder else []


def recipes(own: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (name, first comment line) of every recipe, the user's own under ``own``/recipe included."""
    paths = [*options.recipe_files().values(), *(sorted((own / "recipe").glob("*.yaml")) if own else [])]
    for path in paths:
        comments = [line for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line]
        yield path.stem, comments[0].lstrip("# ") if comments else ""


def option_sentences(kind: Any = options.Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted option, sentence under its field) over the dataclasses of qatlab.config."""
    sentences = _field_docs(kind)
    hints = get_type_hints(kind)
    for entry in fields(kind):
        name = f"{prefix}{entry.name}"
        if is_dataclass(hints[entry.name]):
            yield from option_sentences(hints[entry.name], f"{name}.")
        elif entry.name in sentences:
            yield name, sentences[entry.name]


def _field_docs(kind: Any) -> dict[str, str]:
    """Return {field: the string literal under it}."""
    body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
    return {
        a.target.id: str(b.value.value)
        for a, b in pairwise(body)
        if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)
        if isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant)
    }


def _shown(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def help_text(program: str, own: Path | None = None) -> str:
    """Return the text of --help: recipes, groups and every option with its sentence."""
    parts = [f"usage: {program} recipe=<name> [group=choice] [option=value] ...", "", "recipes"]
    parts += [f"  {name:22} {line}" for name, line in recipes(own)]
    parts += ["", "groups"]
    for group in options.GROUPS:
        parts.append(f"  {group + '=':16} {' | '.join([*options.recipe_files(group), *_own_choices(own, group)])}")
    parts += ["", "blocks"]
    for group in BLOCKS:
        for name, path in options.recipe_files(group).items():
            block = OmegaConf.to_container(OmegaConf.load(path))
            assert isinstance(block, dict)
            shown = " ".join(f"{key!s}={_shown(value)}" for key, value in block.items() if key != "_target_")
            parts.append(f"  {f'{group}={name}':28} {group.replace('/', '.')}.{{{shown}}}")
    parts += ["", "options"]
    parts += [f"  {name:28} {sentence}" for name, sentence in option_sentences()]
    parts += [
        "",
        f"shards are quoted twice: {QUOTED_SHARDS}",
        "own recipes: --config-dir FOLDER recipe=mine reads FOLDER/recipe/mine.yaml (first line '# @package _global_')",
        "also: --cfg job prints the composed options, -m runs several, --hydra-help shows Hydra's own options",
    ]
    return "\n".join(parts)
