"""The text of --help: the recipes, groups, blocks and options that a program uses, section by section."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import OmegaConf

from qatlab.config import ENTRIES, GROUPS, Config, default_callbacks, recipe_files
from qatlab.config.blocks import passed_to
from qatlab.config.heeded import heeds
from qatlab.core.domains import hints_of, words, written
from qatlab.core.errors import QUOTED_SHARDS, UserError, nearest

WIDTH = 80
_BLOCK_GROUPS = ["data", *(group for group in GROUPS if group.startswith("quant/"))]
RUN = "run"  # the section of the options at the top, which belong to no dataclass of their own
_ABOUT = {
    RUN: "The run itself.",
    "data": "The image-caption pairs that a model is calibrated and trained on.",
    "callbacks": "The evaluations.",
}


def help_text(program: str, config_dir: Path | None = None, about: str = "", section: str = "") -> str:
    """Return the text of --help of one of the programs: all that it heeds, or of one section; no line is wider than WIDTH.

    ``config_dir`` is the folder of the user's own choices, ``about`` what the program does. Everything is read from the
    recipes and dataclasses themselves, so that the text cannot fall behind them. Raises UserError for an unknown section.
    """
    sections = [name for name in _sections() if name == RUN or heeds(program, name)]
    if section:
        if section not in sections:
            raise UserError(
                f"--help {section}: python -m qatlab.{program} has no such section{nearest(section, sections)}; there are "
                f"{', '.join(sections)}."
            )
        return "\n".join(_section(program, section, config_dir, domains=True))
    first = {"fit": "recipe=<name>", "evaluate": "[checkpoint=runs/<id>]"}.get(program, "checkpoint=runs/<id>")
    parts = _wrapped(f"usage: python -m qatlab.{program} {first} [group=choice] [option=value] ...", "", "    ")
    parts += ["", *(part for line in about.strip().splitlines() for part in _wrapped(line, "", "    "))]
    if heeds(program, "recipe"):
        parts += ["", "recipes"]
        for name, line in recipe_lines(config_dir):
            parts += _entry(f"recipe={name}", line)
    for name in sections:
        parts += ["", *_section(program, name, config_dir, domains=False)]
    return "\n".join([*parts, "", *_closing(program, sections)])


def _closing(program: str, sections: list[str]) -> list[str]:
    """Return the lines at the end of the text, which are about all options."""
    lines = [
        f"one section alone: python -m qatlab.{program} --help SECTION, of {', '.join(sections)}",
        "true or false: yes, no, on, off, 1 and 0 are taken too",
    ]
    if heeds(program, "data"):
        lines.append(f"shards are quoted twice: {QUOTED_SHARDS}")
    lines.append("a path or text with commas, spaces or brackets is quoted twice too: \"output='a,b'\"")
    if heeds(program, "recipe"):
        lines.append(
            "own recipes: --config-dir FOLDER recipe=mine reads FOLDER/recipe/mine.yaml (first line '# @package _global_')"
        )
    lines.append("also: --cfg job prints the composed options, -m runs several, --hydra-help shows Hydra's own options")
    return [part for line in lines for part in _wrapped(line, "", "    ")]


def _sections() -> list[str]:
    """Return the names of the sections, in the order of the options."""
    names = [entry.name for entry in fields(Config) if entry.name not in ("defaults", "hydra")]
    hints = hints_of(Config)
    return [*(name for name in names if is_dataclass(hints[name]) or name in _ABOUT), RUN]


def _section(program: str, section: str, config_dir: Path | None, domains: bool) -> Iterator[str]:
    """Yield the lines of a section; with ``domains`` those of blocks too, for which their classes are imported."""
    hint = hints_of(Config).get(section)
    yield from _wrapped(f"{section}: {_ABOUT.get(section) or inspect.getdoc(hint) or ''}", "", "    ")
    for group in GROUPS:
        if group.split("/")[0] == section and heeds(program, group):
            yield from _wrapped(f"{group}= {' | '.join(recipe_files(group, config_dir))}", "  ", "      ")
    for name, value, domain, sentence in _options():
        first = name.split(".")[0]
        if (first if first in _sections() else RUN) == section and heeds(program, name):
            # What a mapping holds stands below, entry by entry; "???" is OmegaConf's mark of a value that has to be given.
            shown = "" if value == "???" or isinstance(value, dict) else written(value)
            yield from _entry(f"{name}={shown}", f"({words(domain)}) {sentence}")
    for title, key, block in blocks(config_dir):
        if key.split(".")[0] == section and block and heeds(program, key):
            yield from _block(title, key, block, domains)


def _block(title: str, key: str, block: dict[str, Any], domains: bool) -> Iterator[str]:
    """Yield the lines of a block: the options that its file sets, or with ``domains`` all that its class takes."""
    built = _class_of(block) if domains else None
    if built is None:
        shown = ", ".join(f"{name}={written(value)}" for name, value in block.items() if name != "_target_")
        yield from _wrapped(f"{title}: {key}.{{{shown}}}" if shown else title, "  ", "      ")
        return
    yield f"  {title}"
    hints = hints_of(built)
    for name, parameter in inspect.signature(built).parameters.items():
        if name in passed_to(key) or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = None if parameter.default is parameter.empty else parameter.default
        # An option that the file does not set is added, and Hydra wants a plus for that.
        plus = "" if name in block else "+"
        yield from _wrapped(
            f"{plus}{key}.{name}={written(block.get(name, default))} ({words(hints.get(name, Any))})",
            "    ",
            "        ",
        )


def _class_of(block: dict[str, Any]) -> Any:
    """Return the class that a block names; None if it cannot be imported, which a run with this block reports."""
    try:
        return get_object(block["_target_"])
    except (ImportError, ValueError, KeyError):
        return None


def _entry(head: str, text: str) -> Iterator[str]:
    """Yield the lines of an option: its name and value, and below it what it means."""
    yield from _wrapped(head, "  ", "      ")
    yield from _wrapped(text, "      ", "      ")


def _wrapped(text: str, first: str, further: str) -> list[str]:
    """Return a text in lines of at most WIDTH letters, with spaces before the ``first`` and before ``further`` ones."""
    # A pattern or a path is copied whole: no line ends inside a word.
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=further, break_long_words=False, break_on_hyphens=False
    ) or [""]


def recipe_lines(config_dir: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (name, first comment line) of every recipe, the user's own under ``config_dir``/recipe included."""
    for name, path in recipe_files(config_dir=config_dir).items():
        yield name, first_line(path)


def first_line(path: Path) -> str:
    """Return what a recipe or sweep says of itself in its first comment line."""
    # "# @package _global_" is an instruction to Hydra, which has to stand first in a recipe, and no sentence about it.
    comments = [line for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line]
    return comments[0].lstrip("# ") if comments else ""


def blocks(config_dir: Path | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (how it is chosen, its dotted key, the block) of every _target_ block among the choices, and the callbacks."""
    for group in _BLOCK_GROUPS:
        for name, path in recipe_files(group, config_dir).items():
            block: Any = OmegaConf.to_container(OmegaConf.load(path))
            yield f"{group}={name}", group.replace("/", "."), block or {}
    # Callbacks are no group of choices: all of them are there by default, and their options are set in place.
    for name, block in default_callbacks().items():
        yield f"callbacks.{name}", f"callbacks.{name}", block


def known_keys(config_dir: Path | None = None) -> list[str]:
    """Return everything that can stand before '=': groups, sections, options, and the options of blocks."""
    options = [name for name, _ in option_sentences()]
    of_blocks = [f"{key}.{option}" for _, key, block in blocks(config_dir) for option in block]
    callbacks = [f"callbacks.{name}" for name in default_callbacks()]
    sections = [entry.name for entry in fields(Config) if entry.name not in ("defaults", "hydra")]
    # A name that is a group and a section too (model, suite) counts once; dict.fromkeys keeps the order of --help.
    return list(dict.fromkeys(["recipe", *GROUPS, *sections, *options, *callbacks, *of_blocks]))


def option_sentences() -> Iterator[tuple[str, str]]:
    """Yield (dotted option, sentence under its field) over the dataclasses of qatlab.config."""
    for name, _, _, sentence in _options():
        yield name, sentence


def option_hints() -> Iterator[tuple[str, Any]]:
    """Yield (dotted option, annotation with its domain) over the dataclasses of qatlab.config, blocks left out."""
    for name, _, hint, _ in _options():
        yield name, hint


def _options(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Yield (dotted option, default, annotation, sentence) of every field of a dataclass that has a sentence."""
    sentences, hints, defaults = _field_docs(kind), hints_of(kind), kind()
    for entry in fields(kind):
        name, hint = f"{prefix}{entry.name}", hints[entry.name]
        if is_dataclass(hint):
            yield from _options(hint, f"{name}.")
        elif entry.name in sentences:
            yield name, getattr(defaults, entry.name), hint, sentences[entry.name]
        if name in ENTRIES:
            yield from _options(ENTRIES[name], f"{name}.<name>.")


def _field_docs(kind: Any) -> dict[str, str]:
    """Return {field: the string literal under it}."""
    # Python keeps no docstrings of fields. The sentences are read from the source, where they stand next to the defaults.
    body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
    return {
        a.target.id: str(b.value.value)
        for a, b in pairwise(body)
        if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)
        if isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant)
    }
