"""The console that tables are printed on."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def console(width: int = 160, soft_wrap: bool = False, **options: Any) -> Console:
    """Return a console as wide as the terminal, or of ``width`` columns where there is none; ``options`` are rich's.

    Markup is off, because a set may be called "[red]". With ``soft_wrap`` a long line is broken in a terminal alone,
    and stays whole in a file or pipe.
    """
    # rich takes 80 columns for a file or pipe, which would break most lines of a table.
    terminal = Console().is_terminal
    return Console(width=None if terminal else width, soft_wrap=soft_wrap and not terminal, markup=False, **options)
