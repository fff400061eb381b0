"""_target_ blocks are checked against what they name, before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from hydra.utils import get_object

from qatlab.config import QUANT_SLOTS, Config
from qatlab.errors import UserError, nearest
from qatlab.mistakes import fits, named

# What qatlab itself gives to what is built.
_GIVEN = {
    "quant.weight": ("channels", "batched", "width"),
    "quant.act": ("channels", "batched"),
    "quant.rewrite": ("weight", "act"),
    "quant.adapter": ("in_features", "out_features"),
}


def check_blocks(config: Config) -> None:
    """Raise UserError for a block that names nothing importable, or an option that what it names does not take."""
    callbacks = {f"callbacks.{name}": block for name, block in config.callbacks.items()}
    quant = {f"quant.{slot}": getattr(config.quant, slot) for slot in QUANT_SLOTS}
    optional = {**quant, **callbacks}
    for key, block in {"data": config.data, **optional}.items():
        if block is not None or key not in optional:
            _check(key, block)


def _check(key: str, block: Any) -> None:
    if not isinstance(block, Mapping) or not isinstance(block.get("_target_"), str):
        raise UserError(f"{key} is {block!r}: it takes a block with a _target_, the class to build.")
    target = block["_target_"]
    try:
        built = get_object(target)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{key}._target_={target} cannot be imported: {reason}{_neighbour(target)}.") from error
    parameters = inspect.signature(built).parameters
    given = {str(name): value for name, value in block.items() if not str(name).startswith("_")}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in given:
            if name not in parameters:
                known = [f"{key}.{known}" for known in parameters if known not in _GIVEN.get(key, ())]
                takes = ", ".join(known) or "no options"
                raise UserError(
                    f"{key}.{name} is not an option{nearest(f'{key}.{name}', known)}; {target} takes {takes}."
                )
    _check_values(key, given, built)
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if needed and name not in given and name not in _GIVEN.get(key, ()):
            raise UserError(f"{key}.{name} is missing: {target} needs it.")


def _check_values(key: str, given: Mapping[str, Any], built: Any) -> None:
    try:
        hints = get_type_hints(built.__init__ if inspect.isclass(built) else built)
    except NameError:  # a user's own class may import its types for the type checker only
        return
    for name, value in given.items():
        if not fits(value, hints.get(name, Any)):
            raise UserError(f"{key}.{name} is {value!r}: it takes {named(hints[name])}.")


def _neighbour(target: str) -> str:
    """Return the hint at what the target's module does have under a similar name."""
    module, _, name = target.rpartition(".")
    try:
        return nearest(name, vars(get_object(module)))
    except (ImportError, ValueError, TypeError):
        return ""
