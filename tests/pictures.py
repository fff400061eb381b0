"""The pictures of runs, blank in most tests: matplotlib would take half the time of a small run, drawing what nobody looks at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image


class _Axes:
    """Axes that anything can be drawn on, and nothing is: each method takes all arguments, and gives these axes again.

    Making real ones, with their ticks and labels, takes as long as computing what is drawn on them.
    """

    def __getattr__(self, name: str) -> _Axes:
        if name.startswith("__"):  # what numpy asks of an object, to see whether it is an array
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> _Axes:
        return self

    def __getitem__(self, _: Any) -> _Axes:
        return self

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def get_legend_handles_labels(self) -> tuple[list[_Axes], list[str]]:
        return [self], [""]


def _subplots(figure: Figure, rows: int = 1, columns: int = 1, squeeze: bool = True, **_: Any) -> Any:
    axes = np.full((rows, columns), _Axes(), dtype=object)
    return axes[0, 0] if squeeze and axes.size == 1 else axes


def _save(figure: Figure, path: str | Path, **_: Any) -> None:
    Image.new("RGB", (8, 8), "white").save(path, "png")


def _legend(figure: Figure, *_: Any, **__: Any) -> None:
    pass


_BLANK = {"subplots": _subplots, "savefig": _save, "legend": _legend}
_DRAWN = {name: getattr(Figure, name) for name in _BLANK}


def leave_blank() -> None:
    """From now on, in this process, have every figure saved as a small white PNG, without drawing it."""
    for name, method in _BLANK.items():
        setattr(Figure, name, method)


@contextmanager
def rendered() -> Iterator[None]:
    """Inside this context, figures are drawn and saved by matplotlib."""
    before = {name: getattr(Figure, name) for name in _BLANK}
    for name, method in _DRAWN.items():
        setattr(Figure, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Figure, name, method)
