"""What values an option takes, said once, in its annotation: --help shows it, and what is given is checked against it.

``steps: Annotated[int, AtLeast(0)]`` stands beside the option, in a dataclass of options or in the signature of a class that a
block names. An annotation without such a mark says the type: a number is finite, a text is not empty, ``| None`` allows null.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, ParamSpec, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from qatlab.core.errors import UserError, nearest

# What most platforms hold in an integer; above it numpy and torch raise an OverflowError.
_LARGEST = 2**63 - 1
_SHOWN = 100  # characters of a wrong value that a sentence quotes


class Mark(Protocol):
    """What narrows a type in ``Annotated[type, mark]``."""

    def holds(self, value: Any) -> bool:
        """Return whether a value, which is of the type already, is in the domain."""

    def words(self, of_type: str) -> str:
        """Return the domain in words, given the words for the type."""


@dataclass(frozen=True)
class Between:
    """A number from ``low`` to ``high``; ``above`` leaves ``low`` itself out, ``below`` leaves ``high`` out."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Return whether the number is in the range."""
        least = value > self.low if self.above else value >= self.low
        return least and (value < self.high if self.below else value <= self.high)

    def words(self, of_type: str) -> str:
        """Return "a number from 0 to below 1" and the like."""
        # With :g a seed's upper end, which has ten digits, would be rounded.
        high = f"{self.high:.0f}" if self.high == self.high // 1 else f"{self.high:g}"
        low = "" if self.low == -math.inf else f" above {self.low:g}" if self.above else f" from {self.low:g}"
        if self.high == math.inf:
            return f"{of_type}{low}{'' if self.above or not low else ' on'}"
        if self.above or not low:
            return f"{of_type}{low}{',' if low else ''} {'below' if self.below else 'at most'} {high}"
        return f"{of_type}{low} to {'below ' if self.below else ''}{high}"


def AtLeast(low: float) -> Between:  # noqa: N802 - it stands where a mark stands
    """Return the mark of numbers from ``low`` on."""
    return Between(low)


@dataclass(frozen=True)
class OneOf:
    """One of some words."""

    choices: tuple[str, ...]

    def __init__(self, *choices: str) -> None:
        object.__setattr__(self, "choices", choices)

    def holds(self, value: Any) -> bool:
        """Return whether the value is one of the words."""
        return value in self.choices

    def words(self, of_type: str) -> str:
        """Return the words, as --help lists choices."""
        return " | ".join(self.choices)


@dataclass(frozen=True)
class Kind:
    """What a text or a mapping stands for, ``title`` ("a path"); ``pattern``, where given, is that of the whole text."""

    title: str
    pattern: str | None = None

    def holds(self, value: Any) -> bool:
        """Return whether a text matches the pattern."""
        return self.pattern is None or re.fullmatch(self.pattern, value) is not None

    def words(self, of_type: str) -> str:
        """Return what the value stands for."""
        return self.title


@dataclass(frozen=True)
class Some:
    """A list that is not empty."""

    def holds(self, value: Sequence[Any]) -> bool:
        """Return whether the list holds anything."""
        return len(value) > 0

    def words(self, of_type: str) -> str:
        """Return the words for the list."""
        return of_type.replace("a list", "a list of one or more", 1)


@dataclass(frozen=True)
class Takes:
    """The type of an option that Hydra cannot type (``Annotated[Any, Takes(str | list[str])]``): it knows no such unions."""

    hint: Any

    def holds(self, value: Any) -> bool:
        """Return whether the value is in the domain of the type."""
        return fits(value, self.hint)

    def words(self, of_type: str) -> str:
        """Return the words for the type."""
        return words(self.hint)


Count = Annotated[int, AtLeast(1)]
"""A whole number from 1 on."""
Positive = Annotated[float, Between(0, above=True)]
"""A number above 0."""
Seed = Annotated[int, Between(0, 2**32 - 1)]
"""What numpy's older generators take, which Lightning seeds along with torch's."""
Place = Annotated[str, Kind("a path")]
"""A file or folder; ~ is the home (``qatlab.core.files.user_path``)."""
Dotted = Annotated[str, Kind("the full name of your own (my.module.name)", r"[^\W\d]\w*(\.[^\W\d]\w*)+")]
"""A class or function of the user's own, which is imported."""
Block = Annotated[dict[str, Any], Kind("a block with a _target_")]
"""The class to build, with its options."""

_TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is in the domain of an annotation; True for an annotation that says nothing of plain values."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, parts[0]) and all(mark.holds(value) for mark in hint.__metadata__)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin in (list, Sequence):
        return isinstance(value, (list, tuple)) and all(fits(each, parts[0]) for each in value)
    if origin is tuple:
        same_length = isinstance(value, (list, tuple)) and len(value) == len(parts)
        return same_length and all(fits(each, part) for each, part in zip(value, parts, strict=True))
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(fits(each, parts[1]) for each in value.values())
    return _is_plain(value, hint)


def _is_plain(value: Any, hint: Any) -> bool:
    """Return whether a value is of a plain type, and a number finite, a text not empty; True for any other type."""
    if hint not in _TYPES:
        return True
    # Python's bool is an int: without this line true would pass for 1.
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and abs(value) <= _LARGEST
    if hint is str:
        return isinstance(value, str) and bool(value.strip())
    return isinstance(value, hint)


def words(hint: Any) -> str:
    """Return the domain of an annotation in words: "a whole number from 1 on or null"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        said = words(parts[0])
        for mark in hint.__metadata__:
            said = mark.words(said)
        return said
    if origin in (Union, types.UnionType):
        return (" | " if choices(hint) else " or ").join(words(part) for part in parts)
    if origin in (list, Sequence):
        return f"a list, each {words(parts[0])}" if parts[0] is not Any else "a list"
    if origin is tuple:
        return f"a list of {len(parts)}, each {words(parts[0])}"
    if is_dataclass(hint):
        return f"options of its own ({', '.join(get_type_hints(hint))})"
    return _TYPES.get(hint, "any value" if hint is Any else "a mapping")


def choices(hint: Any) -> tuple[str, ...]:
    """Return the words that an annotation allows, where it allows words alone and perhaps null; else ()."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        marks = [mark for mark in hint.__metadata__ if isinstance(mark, OneOf)]
        return marks[0].choices if marks else ()
    if origin in (Union, types.UnionType):
        others = [part for part in parts if part is not type(None)]
        return choices(others[0]) if len(others) == 1 else ()
    return ()


def wrong(key: str, value: Any, hint: Any) -> str:
    """Return the sentence for the value of the option ``key`` that is not in the domain of its annotation."""
    text = " ".join(written(value).split())  # a sentence stays on one line
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    if (known := choices(hint)) and isinstance(value, str) and value.strip():
        return f"{key}={shown} is unknown{nearest(value, known)}; there are {', '.join(known)}."
    return f"{key}={shown}: it takes {words(hint)}{_misspelt(value, hint)}."


def _misspelt(value: Any, hint: Any) -> str:
    """Return the hint at a similar word for a text, or the first unknown one of a list; "" where no words are listed."""
    if isinstance(value, str):
        return nearest(value, _listed(hint)) if value.strip() else ""
    if get_origin(hint) is Annotated:
        taken = [mark.hint for mark in hint.__metadata__ if isinstance(mark, Takes)]
        return _misspelt(value, taken[0] if taken else get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return next(filter(None, (_misspelt(value, part) for part in get_args(hint))), "")
    if get_origin(hint) not in (list, Sequence) or not isinstance(value, (list, tuple)):
        return ""
    each = get_args(hint)[0]
    unknown = [part for part in value if not fits(part, each)]
    return nearest(str(unknown[0]), _listed(each)) if unknown else ""


def _listed(hint: Any) -> tuple[str, ...]:
    """Return the words that an annotation lists, beside whatever else it allows."""
    if get_origin(hint) is Annotated:
        taken = [mark.hint for mark in hint.__metadata__ if isinstance(mark, Takes)]
        return _listed(taken[0]) if taken else choices(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(word for part in get_args(hint) for word in _listed(part))
    return ()


def written(value: Any) -> str:
    """Return a value as it is written on the command line: null, true, [1, 2], {a: null}."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(written(each) for each in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {written(each)}' for key, each in value.items())}}}"
    return str(value)


P = ParamSpec("P")
T = TypeVar("T")


def checked(init: Callable[P, T]) -> Callable[P, T]:
    """Return an ``__init__`` that raises UserError for an argument that is not in the domain of its annotation.

    For classes that a block names and that Python code may make by itself: the block's options are checked before, with
    their dotted names.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def with_check(*args: P.args, **kwargs: P.kwargs) -> T:
        require(signature.bind(*args, **kwargs).arguments, hints_of(init))
        return init(*args, **kwargs)

    return with_check


def require(values: Mapping[str, Any], hints: Mapping[str, Any], prefix: str = "") -> None:
    """Raise UserError for the first of some named values that is not in the domain of its annotation."""
    for name, value in values.items():
        if not fits(value, hint := hints.get(name, Any)):
            raise UserError(wrong(f"{prefix}{name}", value, hint))


# Reading annotations takes longer than checking by them, and a sweep checks thousands of runs.
_HINTS: dict[Any, dict[str, Any]] = {}


def hints_of(owner: Any) -> dict[str, Any]:
    """Return {name: annotation with its marks} of a dataclass, or of the arguments of a class or function.

    Nothing is known of a class of the user that imports the types of its annotations for a type checker only.
    """
    if owner not in _HINTS:
        called = owner.__init__ if inspect.isclass(owner) and not is_dataclass(owner) else owner
        try:
            _HINTS[owner] = get_type_hints(called, include_extras=True)
        except NameError:
            _HINTS[owner] = {}
    return _HINTS[owner]
