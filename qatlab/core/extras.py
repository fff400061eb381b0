"""The libraries of the extras ``deploy``, ``bench`` and ``tensorboard``, imported only when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from qatlab.core.errors import UserError


def require(*names: str, extra: str = "deploy") -> Any:
    """Return the first of the named modules, all of them imported; UserError where one is not installed."""
    try:
        return next(iter([importlib.import_module(name) for name in names]))
    except ModuleNotFoundError as error:
        # An installed module that fails to import a part of its own
        # is broken, and the advice to install it would not help.
        if error.name not in names:
            raise
        raise UserError(f"{error.name} is not installed, which this needs: pip install 'qatlab[{extra}]'.") from error
