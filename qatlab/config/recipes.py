"""The composition of options by Hydra from recipes and the command line, and the checks of names and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from qatlab.config.options import QUANT_SLOTS, Config, SetConfig
from qatlab.config.renamed import accept_earlier, require_one_value, settle
from qatlab.core.domains import hints_of, require
from qatlab.core.errors import UserError, nearest
from qatlab.core.files import expanded


def recipe_files(folder: str = "", config_dir: Path | None = None) -> dict[str, Path]:
    """Return {name: file} of the YAML choices in recipes/<folder>; "" gives the recipes themselves.

    ``config_dir`` is a --config-dir: its choices come after qatlab's, and in place of those with the same name.
    """
    # By the package, not by a path beside this file: an editable install and a wheel keep the recipes in different places.
    paths = sorted((Path(str(files("qatlab.recipes"))) / folder).glob("*.yaml"))
    paths += sorted((config_dir / (folder or "recipe")).glob("*.yaml")) if config_dir else []
    return {path.stem: path for path in paths}


GROUPS = ["model", "data", "suite", "trainer", "optim", *(f"quant/{slot}" for slot in QUANT_SLOTS)]


_PACKAGE = "# @package "


def register() -> None:
    """Make the options and every file under recipes/ known to Hydra."""
    # The resolver is for the only folder that Hydra makes itself, which holds its multirun.yaml.
    OmegaConf.register_new_resolver("expanded", expanded, replace=True)
    store = ConfigStore.instance()
    options = typed_options()
    # A user may add a set, or options to a set that its file leaves out. ``as_config`` refuses unknown ones later.
    OmegaConf.set_struct(options.suite.sets, False)
    store.store(name="qatlab", node=options)
    # Recipes are packaged as _global_: their keys stand at the top (fit.steps), not below "recipe".
    for name, path in recipe_files().items():
        store.store(group="recipe", name=name, node=OmegaConf.load(path), package="_global_")
    for group in GROUPS:
        for name, path in recipe_files(group).items():
            store.store(group=group, name=name, node=OmegaConf.load(path), package=section_of(path))


def section_of(path: Path) -> str | None:
    """Return the section that the keys of a choice stand in, as Hydra's "# @package" line names it; None: that of its group.

    A rewrite of another section can be chosen beside one of ``quant.rewrite``: quant/rewrite=[rotation,outlier_channels].
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix(_PACKAGE).strip() for line in lines if line.startswith(_PACKAGE)), None)


def typed_options() -> DictConfig:
    """Return all options at their defaults, with their types, under earlier names too."""
    return accept_earlier(OmegaConf.structured(Config))


@contextmanager
def uncopied_store() -> Iterator[None]:
    """Inside this context Hydra composes from the store of all choices itself, not from a copy of it.

    Hydra's loader copies the whole store for each composition, which takes a third of its time, and a command line is
    composed twice. The copy is not needed: the store copies every choice that is loaded, so nothing changes the store.
    """
    store: Any = ConfigStore.instance()
    if hasattr(store, "__deepcopy__"):  # inside such a context already
        yield
        return
    store.__deepcopy__ = lambda _: store
    try:
        yield
    finally:
        del store.__deepcopy__


def as_config(composed: DictConfig) -> Config:
    """Return the options, composed by Hydra or merged into ``Config``, as typed dataclasses without interpolations.

    Raises UserError for an option that nothing reads and for a value outside the domain of its option.
    """
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    config.suite.sets = typed_sets(config.suite.sets)
    settle(config.quant)
    check_options(config)
    return config


@dataclass
class _Sets:
    sets: dict[str, SetConfig]


def typed_sets(sets: Mapping[str, Any]) -> dict[str, SetConfig]:
    """Return the sets of a suite, composed as plain mappings, as typed dataclasses.

    Hydra adds no mapping to a section whose entries have a type, so the sets get theirs here. Raises UserError for a set
    without a path or a role, and OmegaConf's errors for an option that no set has and a value of the wrong type.
    """
    for name, entry in sets.items():
        if not isinstance(entry, (Mapping, SetConfig)):
            raise UserError(f"suite.sets.{name} is {entry!r}: {_both(name)}")
    # The sets get their full name here, so that OmegaConf's errors name it.
    typed = OmegaConf.create({"suite": OmegaConf.structured(_Sets(sets={}))})
    merged = OmegaConf.merge(typed, {"suite": {"sets": dict(sets)}})
    for name, entry in merged.suite.sets.items():
        if lacking := [key for key in ("path", "role") if OmegaConf.is_missing(entry, key)]:
            close = nearest(name, [other for other in sets if other != name])
            raise UserError(f"suite.sets.{name} has no {' and no '.join(lacking)}{close}: {_both(name)}")
    found = OmegaConf.to_object(merged.suite)
    assert isinstance(found, _Sets)
    return found.sets


def _both(name: str) -> str:
    return f'a set needs a path and a role, as in "+suite.sets.{name}={{path: FOLDER, role: id}}".'


def check_options(config: Config) -> None:
    """Raise UserError for an option that nothing reads, and for a value outside the domain of its option."""
    _refuse_unknown(config)
    _refuse_outside(config)


def _refuse_outside(options: Any, prefix: str = "") -> None:
    """Raise UserError for a value that is not in the domain that its option declares."""
    hints = hints_of(type(options))
    for entry in fields(options):
        value, key = getattr(options, entry.name), f"{prefix}{entry.name}"
        # suite.sets alone is a dict of sections, one for each name.
        parts = value.items() if isinstance(value, dict) else [("", value)]
        sections = [(f"{key}.{name}." if name else f"{key}.", part) for name, part in parts if is_dataclass(part)]
        for where, section in sections:
            _refuse_outside(section, where)
        if not sections:
            require({key: value}, {key: hints[entry.name]})


def _refuse_unknown(options: Any, prefix: str = "") -> None:
    """Raise UserError for an option added with '+' that nothing reads."""
    # "+fit.setps=1" adds an attribute to the dataclass, which is no field: a typing mistake must not pass in silence.
    known = [f"{prefix}{entry.name}" for entry in fields(options)]
    for name, value in vars(options).items():
        if (key := f"{prefix}{name}") not in known:
            raise UserError(f"{key} is not an option{nearest(key, known)}; --help lists them.")
        # A section is the value of an option itself; suite.sets alone is a dict, which holds one section for each name.
        for key, entry in value.items() if isinstance(value, dict) else [("", value)]:
            if is_dataclass(entry):
                _refuse_unknown(entry, f"{prefix}{name}.{key}{'.' if key else ''}")


def compose(*overrides: str) -> Config:
    """Return the options that ``python -m qatlab.fit <overrides>`` would run with (for tests and notebooks)."""
    require_one_value(overrides)
    with initialize(config_path=None, version_base="1.3"), uncopied_store():
        return as_config(hydra_compose("qatlab", overrides=list(overrides)))
