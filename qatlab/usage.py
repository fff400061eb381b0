"""The text of --help: recipes, groups, blocks and every option with its sentence."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf

from qatlab.config import GROUPS, Config, default_callbacks, recipe_files
from qatlab.errors import QUOTED_SHARDS

_BLOCK_GROUPS = ["data", *(group for group in GROUPS if group.startswith("quant/"))]


def help_text(program: str, own: Path | None = None, needs_recipe: bool = True, about: str = "") -> str:
    """Return the text of --help; ``own`` is the folder of the user's own choices, ``about`` what the program does."""
    first = "recipe=<name>" if needs_recipe else "[checkpoint=runs/<id>]"
    parts = [f"usage: {program} {first} [group=choice] [option=value] ...", "", about.strip()]
    if needs_recipe:
        parts += ["", "recipes", *(f"  {name:22} {line}" for name, line in recipe_lines(own))]
    parts += ["", "groups"]
    parts += [f"  {group + '=':16} {' | '.join(recipe_files(group, own))}" for group in GROUPS]
    parts += ["", "blocks (a _target_ and the options it takes)"]
    for title, key, block in blocks(own):
        shown = " ".join(f"{option}={_shown(value)}" for option, value in block.items() if option != "_target_")
        parts.append(f"  {title:28} {key}.{{{shown}}}" if shown else f"  {title}")
    parts += ["", "options"]
    parts += [f"  {name:30} {sentence}" for name, sentence in option_sentences()]
    parts += [
        "",
        f"shards are quoted twice: {QUOTED_SHARDS}",
        "own recipes: --config-dir FOLDER recipe=mine reads FOLDER/recipe/mine.yaml (first line '# @package _global_')",
        "also: --cfg job prints the composed options, -m runs several, --hydra-help shows Hydra's own options",
    ]
    return "\n".join(parts)


def recipe_lines(own: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (name, first comment line) of every recipe, the user's own under ``own``/recipe included."""
    for name, path in recipe_files(own=own).items():
        yield name, first_line(path)


def first_line(path: Path) -> str:
    """Return what a recipe or sweep says of itself in its first comment line."""
    comments = [line for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line]
    return comments[0].lstrip("# ") if comments else ""


def blocks(own: Path | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (how it is chosen, its dotted key, the block) of every _target_ block among the choices, and the callbacks."""
    for group in _BLOCK_GROUPS:
        for name, path in recipe_files(group, own).items():
            block: Any = OmegaConf.to_container(OmegaConf.load(path))
            yield f"{group}={name}", group.replace("/", "."), block or {}
    for name, block in default_callbacks().items():
        yield f"callbacks.{name}", f"callbacks.{name}", block


def known_keys(own: Path | None = None) -> list[str]:
    """Return everything that can stand before '=': groups, sections, options, and the options of blocks."""
    options = [name for name, _ in option_sentences()]
    of_blocks = [f"{key}.{option}" for _, key, block in blocks(own) for option in block]
    callbacks = [f"callbacks.{name}" for name in default_callbacks()]
    sections = [entry.name for entry in fields(Config) if entry.name not in ("defaults", "hydra")]
    return list(dict.fromkeys(["recipe", *GROUPS, *sections, *options, *callbacks, *of_blocks]))


def option_sentences(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted option, sentence under its field) over the dataclasses of qatlab.config."""
    sentences = _field_docs(kind)
    hints = get_type_hints(kind)
    for entry in fields(kind):
        name, hint = f"{prefix}{entry.name}", hints[entry.name]
        if is_dataclass(hint):
            yield from option_sentences(hint, f"{name}.")
        elif entry.name in sentences:
            yield name, sentences[entry.name]
        if get_args(hint) and is_dataclass(get_args(hint)[-1]):  # a dict of dataclasses
            yield from option_sentences(get_args(hint)[-1], f"{name}.<name>.")


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
