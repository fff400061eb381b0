"""What the closing report tells about runs that were scored on one suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qatlab.results.rowfile import Row
from qatlab.results.run import Run


@dataclass(frozen=True)
class RunSummary:
    """One run: its ``rows`` of the requested suite, and the names of the ID sets that have pictures, in the suite's order.

    ``computed`` says whether this process scored anything. ``skipped`` is a sentence on training data that could not be
    read, "" where all of them could.
    """

    run: Run
    recipe: str
    rows: Sequence[Row]
    id_sets: Sequence[str]
    computed: bool
    skipped: str = ""


@dataclass(frozen=True)
class Summary:
    """Runs side by side: whether their table is the ``full`` one, and the file that takes all rows in ``format``.

    The path is ``file``, or without it ``table.<suffix>`` in the folder of the first run; without a ``format`` no file
    is written. ``notes`` are sentences on images and scores that were left out. ``work`` says how many images were
    decoded and embedded, None where none were.
    """

    runs: Sequence[RunSummary]
    full: bool
    format: str | None
    file: str | None
    notes: Sequence[str]
    work: str | None
