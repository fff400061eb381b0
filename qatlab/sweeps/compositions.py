"""The options of many command lines: their choices are composed once, and the values of each line are put in."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from qatlab.config import GROUPS, Config, SuiteConfig, as_config, check_options, typed_sets, uncopied_store
from qatlab.config.renamed import require_one_value, settle

Line = tuple[str, ...]

# ${seed} or ${optim.log_scale}: the first name is the section from which the value is taken.
_REFERENCE = re.compile(r"\$\{(\w+)(?:\.\w+)*\}")
_INTERPOLATION = "${"


@dataclass(frozen=True)
class Alike:
    """Command lines that make the same choices, by their ``places`` among all lines.

    ``common`` are the overrides that are composed once for all lines, ``values`` those that are put in for each line.
    """

    places: list[int]
    common: list[str]
    values: list[list[Override]]


@contextmanager
def initialized(config_dir: Path | None) -> Iterator[None]:
    """Inside this context Hydra composes qatlab's choices, and those of the folder ``config_dir``."""
    where = (
        hydra.initialize_config_dir(str(config_dir.resolve()), version_base="1.3")
        if config_dir
        else hydra.initialize(None, version_base="1.3")
    )
    with where, uncopied_store():
        yield


class Composition:
    """The options that several command lines have in common; ``with_values`` returns the options of one of these lines.

    Composing a recipe, a model, a suite and so on takes Hydra a quarter of a second, but putting values in takes some
    milliseconds. The same functions of Hydra and OmegaConf read, merge and check both, and raise the same errors. Use
    this class inside ``initialized``.
    """

    def __init__(self, overrides: Sequence[str]) -> None:
        self._composed = hydra.compose("qatlab", overrides=list(overrides))
        self._config = as_config(self._composed)
        self._sources = _sources(self._composed)

    def with_values(self, overrides: Sequence[Override]) -> Config:
        """Return the options with values put in; sections without a change are the same objects each time."""
        if not overrides:
            return self._config
        # Only the sections that change, and those that their interpolations read, are merged and converted again.
        changed = self._changed(overrides)
        needed = {*changed, *(source for section in changed for source in self._sources[section])}
        # OmegaConf.masked_copy would lose the types of numbers, and
        # the struct flag that makes OmegaConf refuse unknown options.
        part = DictConfig({section: self._composed._get_node(section) for section in sorted(needed)})
        OmegaConf.set_struct(part, True)
        ConfigLoaderImpl._apply_overrides_to_config(list(overrides), part)
        typed = OmegaConf.to_object(part)
        assert isinstance(typed, dict)
        if isinstance(suite := typed.get("suite"), SuiteConfig):
            suite.sets = typed_sets(suite.sets)
        if "quant" in typed:
            settle(typed["quant"])
        config = replace(self._config, **{section: typed[section] for section in changed})
        check_options(config)
        return config

    def _changed(self, overrides: Sequence[Override]) -> set[str]:
        """Return the sections of the values, and all sections that take something from these by an interpolation."""
        # A value that is itself an interpolation reads a section that the composition's own interpolations do not name.
        if any(_INTERPOLATION in str(override.input_line) for override in overrides):
            return {*self._sources}
        changed = {override.key_or_group.split(".")[0] for override in overrides} & {*self._sources}
        # The loop ends when nothing is added: a section may read from one that itself reads from a changed one.
        while more := {section for section, sources in self._sources.items() if sources & changed} - changed:
            changed |= more
        return changed


def alike(lines: Sequence[Line], config_dir: Path | None = None) -> Iterator[Alike]:
    """Yield groups of command lines that make the same choices; ``config_dir`` is the folder of the user's own choices.

    A value that all lines of a group have is composed with the choices. But where it concerns the same option as a
    differing value, it is put in with the differing values, because the order of the two decides.
    """
    parser = OverridesParser.create()
    # Most arguments stand in many lines, so parsed arguments are kept.
    parse = cache(lambda text: parser.parse_overrides([text])[0])
    for line in lines:
        require_one_value(line)
    parsed = [list(map(parse, line)) for line in lines]
    places: dict[Line, list[int]] = defaultdict(list)
    for place, overrides in enumerate(parsed):
        places[tuple(_text(override) for override in overrides if not _is_value(override, config_dir))].append(place)
    for group in places.values():
        yield _alike([parsed[place] for place in group], group, config_dir)


def _alike(lines: Sequence[Sequence[Override]], places: list[int], config_dir: Path | None) -> Alike:
    """Return the group of ``lines`` that make the same choices and stand at ``places`` among all lines."""
    shared = {_text(override) for override in lines[0]}
    for line in lines[1:]:
        shared &= {_text(override) for override in line}
    differing = [override for line in lines for override in line if _text(override) not in shared]
    keys = {override.key_or_group for override in differing}

    def is_put_in(override: Override) -> bool:
        return _is_value(override, config_dir) and (_text(override) not in shared or _overlaps(override, keys))

    values = [list(filter(is_put_in, line)) for line in lines]
    # The first line serves for all, because a value that is no choice and not put in is the same in every line.
    put_in = {_text(override) for override in values[0]}
    common = [_text(override) for override in lines[0] if _text(override) not in put_in]
    return Alike(places, common, values)


def _is_value(override: Override, config_dir: Path | None) -> bool:
    """Return whether an override sets values; other overrides choose a file to compose, or are for Hydra itself."""
    key = override.key_or_group
    if re.split(r"[./]", key)[0] == "hydra" or override.package is not None:
        return False
    # "quant" is no group but the folder of five groups, and takes a mapping of values (quant={weight: null}).
    is_group = key in ("recipe", "quant", *GROUPS) or (config_dir is not None and (config_dir / key).is_dir())
    return isinstance(override.value(), dict) or not is_group


def _overlaps(override: Override, keys: set[str]) -> bool:
    """Return whether an override concerns an option of ``keys``, a part of one, or a whole that holds one."""
    # The dots keep "fit.lr" from counting as a part of "fit.l".
    mine = f"{override.key_or_group}."
    return any(mine.startswith(f"{key}.") or f"{key}.".startswith(mine) for key in keys)


def _text(override: Override) -> str:
    """Return an override as it was written."""
    assert override.input_line is not None
    return override.input_line


def _sources(composed: DictConfig) -> dict[str, set[str]]:
    """Return for every section the other sections from which its interpolations take values."""
    plain = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(plain, dict)
    sections = {str(section): str(value) for section, value in plain.items() if section != "hydra"}
    return {section: _named(text, {*sections}) - {section} for section, text in sections.items()}


def _named(text: str, sections: set[str]) -> set[str]:
    """Return the sections that a text refers to: all where it has more than plain names, as in ${oc.env:HOME}."""
    found = _REFERENCE.findall(text)
    return {*found} if len(found) == text.count(_INTERPOLATION) and {*found} <= sections else sections
