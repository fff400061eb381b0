"""Hooks that look at the inputs and outputs of modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn


@contextmanager
def on_inputs(modules: Mapping[str, nn.Module], look: Callable[[str, Any, tuple[Any, ...]], None]) -> Iterator[None]:
    """Inside this context ``look(name, module, inputs)`` is called before each of ``modules``, given by name, runs.

    ``inputs`` are the positional arguments of its forward. Afterwards no hook is left, also where the model or ``look``
    raised.
    """
    with ExitStack() as handles:
        for name, module in modules.items():
            handles.enter_context(module.register_forward_pre_hook(partial(_looked_at, look, name)))
        yield


@contextmanager
def on_outputs(
    modules: Mapping[str, nn.Module], look: Callable[[str, Any, tuple[Any, ...], Any], None]
) -> Iterator[None]:
    """Inside this context ``look(name, module, inputs, output)`` is called after each of ``modules`` ran."""
    with ExitStack() as handles:
        for name, module in modules.items():
            handles.enter_context(module.register_forward_hook(partial(_looked_at, look, name)))
        yield


def _looked_at(look: Callable[..., None], name: str, module: nn.Module, *seen: Any) -> None:
    """Call ``look`` and return None, because torch replaces the inputs or the output by what a hook returns."""
    look(name, module, *seen)
