"""A model that runs on many batches in step: every batch waits before a layer until all of them have come to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qatlab.core.errors import UserError
from qatlab.quant.inspect.hooks import on_inputs

# What happens while all batches wait: called with a layer's name and its input in each run, in the order of the runs.
AtLayer = Callable[[str, list[Tensor]], None]


class _Abandoned(BaseException):
    """Ends the thread of a run that nobody waits for; no ``except Exception`` in a model holds it."""


class _Run:
    """One forward in a thread of its own, which goes on only while ``advance`` waits: two runs never compute at a time."""

    def __init__(self, forward: Callable[[], Any]) -> None:
        self.waiting_at: str | None = None
        self.inputs: Tensor | None = None
        self._forward, self._abandoned = forward, False
        self._error: BaseException | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def number(self) -> int | None:
        """The number by which a hook knows the thread that it was called in."""
        return self._thread.ident

    def advance(self) -> str | None:
        """Return the name of the next layer that the run waits before, None at its end; raises what the run raised."""
        self.waiting_at = self.inputs = None
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self.waiting_at

    def wait(self, name: str, inputs: Tensor) -> None:
        """Stop the run, in whose thread this is called, before the layer ``name``, whose input is ``inputs``."""
        self.waiting_at, self.inputs = name, inputs
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """End the run where it waits."""
        self._abandoned = True
        self._go.release()
        self._thread.join()

    def _work(self) -> None:
        self._go.acquire()
        try:
            # Whether gradients are kept is a thread's own setting.
            with suppress(_Abandoned), torch.no_grad():
                if not self._abandoned:
                    self._forward()
        except BaseException as error:
            self._error = error
        finally:
            self._stopped.release()


def in_step(runs: Sequence[tuple[nn.Module, Tensor]], names: Iterable[str], at: AtLayer) -> None:
    """Run each model of ``runs`` on its batch, all in step, and call ``at(name, inputs)`` before every layer of ``names``.

    ``runs`` are pairs of a model and a batch (B, ...) on its device; a model may stand in several pairs, and all models
    have the layers ``names``, which they call once each, in one order. ``inputs`` are the layer's first argument in each
    run. A change that ``at`` makes to the layer is seen by the layer itself and by all that comes after it, so that each
    layer is reached once, by one forward of each batch, with all layers before it as they were left. At a time only what
    the runs hold before one layer is in memory. Raises UserError where the runs come to different layers, and for a layer
    that is called again.
    """
    names = list(names)
    with _stopping(runs, names) as started:
        done: set[str] = set()
        while True:
            reached = {run.advance() for run in started}
            if reached == {None}:
                return
            name = next(iter(reached))
            if len(reached) > 1 or name is None or name in done:
                raise UserError(
                    f"the model calls {', '.join(sorted(map(str, reached)))} in another order, or again: layers are "
                    "rounded and corrected one after the other. Skip the layer with +quant.rules, or choose another quant/weight "
                    "and no quant/compensate."
                )
            done.add(name)
            at(name, [run.inputs for run in started if run.inputs is not None])


@contextmanager
def _stopping(runs: Sequence[tuple[nn.Module, Tensor]], names: Sequence[str]) -> Iterator[list[_Run]]:
    """Inside this context the runs have threads, and wait before each layer of ``names``; afterwards no thread is left."""
    by_number: dict[int | None, _Run] = {}

    def stop(name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        by_number[threading.get_ident()].wait(name, inputs[0])

    started: list[_Run] = []
    with ExitStack() as hooks:
        for model in {id(model): model for model, _ in runs}.values():
            hooks.enter_context(on_inputs({name: model.get_submodule(name) for name in names}, stop))
        try:
            for model, batch in runs:
                started.append(_Run(partial(model, batch)))
            by_number.update({run.number: run for run in started})
            yield started
        finally:
            for run in started:
                run.abandon()
