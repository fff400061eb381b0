"""Options of quant that earlier releases called otherwise: read under both names, stored under the earlier one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import yaml
from omegaconf import BooleanNode, DictConfig, OmegaConf

from qatlab.config.options import QuantConfig
from qatlab.core.errors import UserError

# A run id hashes the names of options too: under the new names every finished run would count as another one.
EARLIER = {entry.name: entry.metadata["earlier"] for entry in fields(QuantConfig) if "earlier" in entry.metadata}
_NEW = {f"quant.{earlier}": f"quant.{name}" for name, earlier in EARLIER.items()}


def present(key: str) -> str:
    """Return the name that an option has now: "quant.first" for "quant.patch_conv"."""
    return _NEW.get(key, key)


def with_earlier_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of quant, by name, as runs store them: in the same order, under the earlier names."""
    return {EARLIER.get(name, name): value for name, value in options.items()}


def with_present_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of quant that a run stored, by name, under the names that they have now."""
    return {present(f"quant.{name}").removeprefix("quant."): value for name, value in options.items()}


def accept_earlier(options: DictConfig) -> DictConfig:
    """Return the typed ``options`` of a run, in which the earlier names may be given values too; null: not given."""
    OmegaConf.set_struct(options.quant, False)
    for earlier in EARLIER.values():
        options.quant[earlier] = BooleanNode(None, is_optional=True)
    OmegaConf.set_struct(options.quant, None)  # as the whole is: it refuses names that no option has
    return options


def settle(quant: QuantConfig) -> None:
    """Move the values that ``quant`` was given under earlier names to the fields of the present names.

    Raises UserError where the two names of an option have different values.
    """
    for name, earlier in EARLIER.items():
        value = vars(quant).pop(earlier, None)
        if value is False and getattr(quant, name):
            raise _contradiction(f"quant.{name}=true", f"quant.{earlier}=false", f"quant.{name}")
        if value is not None:
            setattr(quant, name, value)


def require_one_value(overrides: Sequence[str]) -> None:
    """Raise UserError where a command line gives the two names of an option different values."""
    # ``settle`` cannot see them all: false is what an option is where it was not given.
    given: dict[str, str] = {}
    for argument in overrides:
        key, _, text = argument.lstrip("+").partition("=")
        if (name := present(key)) not in _NEW.values():
            continue
        earlier = given.setdefault(name, argument)
        if earlier.partition("=")[0].lstrip("+") != key and _flag(earlier.partition("=")[2]) != _flag(text):
            raise _contradiction(earlier, argument, name)


def _flag(text: str) -> Any:
    """Return the value of a text on the command line, as far as it is true or false: yes, on and 1 are true."""
    value = yaml.safe_load(text)
    return bool(value) if value in (0, 1) else text


def _contradiction(one: str, other: str, name: str) -> UserError:
    return UserError(f"{one} and {other} contradict each other, being one option: give {name} alone.")
