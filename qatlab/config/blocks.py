"""_target_ blocks: they are checked against the class or function that they name before it is called."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from hydra.utils import get_object

from qatlab.config import Config
from qatlab.config.trust import TARGET, blocks_of
from qatlab.core.domains import hints_of, require, written
from qatlab.core.errors import UserError, nearest

# Arguments that qatlab itself passes when it builds a block: a user need not and cannot set them.
GIVEN = {
    "quant.weight": ("channels", "batched", "width", "inputs"),
    "quant.act": ("channels", "batched", "width", "inputs"),
    "quant.rewrite": ("weight", "act"),
    "quant.adapter": ("in_features", "out_features"),
    "quant.attention": ("heads",),
    "objective.extra": ("student", "scale", "teacher", "captions", "bank", "classes", "labels", "caption_ids"),
}
WEIGHT = "weight"
"""The key of a block of objective.extra that is no option of its function: how much it counts."""


def build(block: Mapping[str, Any], **given: Any) -> Any:
    """Return the object that a block names, made with the block's options and the arguments ``given``.

    Blocks inside the block stay plain mappings: Hydra's own ``instantiate`` would build those of a stored file as well,
    and with them code that nobody looked at.
    """
    return factory(block)(**given)


def factory(block: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a function that makes the object of a block, with the block's options set, to be called with the rest."""
    options = {str(name): value for name, value in block.items() if name != TARGET}
    return partial(get_object(block[TARGET]), **options)


def check_blocks(config: Config) -> None:
    """Raise UserError for a block that names nothing importable, or an option that what it names does not take."""
    for key, block in blocks_of(config).items():
        # An empty slot means that nothing is built, but no run goes without caption data.
        if block is not None or key == "data":
            check_block(key, block)


def imported(key: str, name: str) -> Any:
    """Return the class or function of a full name, given as the option ``key``; raises UserError where it names nothing."""
    try:
        with _quiet():
            return get_object(name)
    except (ImportError, ValueError) as error:
        # Hydra's message spans several lines and quotes the reason, which its cause says alone.
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{key}={name} cannot be imported: {reason}{_neighbour(name)}.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside this context Hydra does not log what it raises as well."""
    log = logging.getLogger("hydra.utils")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def signature_of(key: str, name: str, built: Any) -> inspect.Signature:
    """Return the signature of what ``imported`` gave for a name; raises UserError for what has none, such as a number."""
    try:
        return inspect.signature(built)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}={name} cannot be called with options: {error}.") from error


def check_block(key: str, block: Any) -> None:
    """Raise UserError for a block, given as the option ``key``, whose class cannot be imported or built with its options."""
    if not isinstance(block, Mapping) or not isinstance(block.get(TARGET), str):
        raise UserError(f"{key}={written(block)}: it takes a block with a _target_, the class to build.")
    target = block[TARGET]
    built = imported(f"{key}.{TARGET}", target)
    parameters = signature_of(f"{key}.{TARGET}", target, built).parameters
    given = {str(name): value for name, value in block.items() if name != TARGET}
    passed = passed_to(key)
    if key.startswith("objective.extra."):
        given.pop(WEIGHT, None)
    # A class that takes **options accepts any name: only the class itself can tell a mistake.
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in given:
            if name not in parameters:
                known = [f"{key}.{known}" for known in parameters if known not in passed]
                takes = ", ".join(known) or "no options"
                raise UserError(
                    f"{key}.{name} is not an option{nearest(f'{key}.{name}', known)}; {target} takes {takes}."
                )
    require(given, hints_of(built), f"{key}.")
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if needed and name not in given and name not in passed:
            given_by_qatlab = f", beside what qatlab passes to it ({', '.join(passed)})" if passed else ""
            raise UserError(f"{key}.{name} is missing: {target} needs it{given_by_qatlab}.")


def passed_to(key: str) -> tuple[str, ...]:
    """Return the arguments that qatlab passes to what a block, given as the option ``key``, names."""
    return next((names for of, names in GIVEN.items() if key == of or key.startswith(f"{of}.")), ())


def _neighbour(target: str) -> str:
    """Return the hint " (did you mean 'x'?)" at a similar name in the target's module, "" where there is none."""
    module, _, name = target.rpartition(".")
    try:
        return nearest(name, vars(get_object(module)))
    except (ImportError, ValueError, TypeError):
        return ""
