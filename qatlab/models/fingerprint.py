"""Hashes that identify a model by its structure and weights, independently of the files that its code is in."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from qatlab.core.hashing import Part, sha256


def fingerprint(model: nn.Module, *parts: str, without: Sequence[str] = ()) -> str:
    """Return 16 hex digits of a hash of ``model``, its structure and every tensor of its state, and of ``parts``.

    ``without`` names submodules and tensors to leave out, with all that is below them.
    """
    return sha256(_parts(model, parts, without)).hex()[:16]


def _parts(model: nn.Module, parts: Sequence[str], without: Sequence[str]) -> Iterator[Part]:
    """Yield what is hashed: the lines of the structure, then the name and the bytes of every tensor, sorted by name."""
    yield "\n".join([*_structure(model, without), *parts])
    for name, tensor in sorted(model.state_dict().items()):
        if not _inside(name, without):
            yield name
            # As bytes, because numpy has no bfloat16.
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def plain_options(thing: object) -> dict[str, str]:
    """Return the attributes of ``thing`` that are numbers, texts, functions or lists of these: what it was built with."""
    kept = {}
    for name, value in sorted(vars(thing).items()):
        listed = value if isinstance(value, (list, tuple)) else [value]
        # Private attributes are caches and torch's own; "training" says in which mode a module is, not what it computes.
        if not name.startswith("_") and name != "training" and all(map(_is_plain, listed)):
            kept[name] = ", ".join(part.__qualname__ if inspect.isroutine(part) else repr(part) for part in listed)
    return kept


def _is_plain(value: Any) -> bool:
    # Only values with the same repr in every process: the repr of most other objects contains a memory address.
    return value is None or isinstance(value, (bool, int, float, str)) or inspect.isroutine(value)


def _structure(model: nn.Module, without: Sequence[str]) -> Iterator[str]:
    """Yield a line for each module: repr leaves out what many of them compute with, such as attention's number of heads."""
    for name, module in model.named_modules():
        if not _inside(name, without):
            kind = type(module)
            # For qatlab's own layers extra_repr gives every option that changes the features. Their attributes also
            # hold options that do not, such as the kernels, and these must not change the key.
            options = {} if kind.__module__.startswith("qatlab.") else plain_options(module)
            yield f"{name}: {lasting_module(kind)}.{kind.__qualname__}({module.extra_repr()}) {options}"


def lasting_module(kind: Any) -> str:
    """Return the name of the module of a class or function; for one of qatlab the package alone, such as "qatlab.quant".

    Keys of stored features hold it: a file may move inside its package, and the features are found again.
    """
    parts = kind.__module__.split(".")
    return ".".join(parts[:2]) if parts[0] == "qatlab" else kind.__module__


def _inside(name: str, parts: Sequence[str]) -> bool:
    # With the dot: leaving out "text" must not leave out "text_projection".
    return any(name == part or name.startswith(f"{part}.") for part in parts)
