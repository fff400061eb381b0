"""How far each cell of a sweep is, read from its run folder and its log alone."""

from __future__ import annotations

import re
import shutil
import signal
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.table import Table

from qatlab.core.console import console
from qatlab.core.files import FEATURES, cache_dir, is_locked
from qatlab.core.secrets import shown
from qatlab.core.signals import EXIT_INTERRUPTED, EXIT_REQUEUE, SIGNALS
from qatlab.results.completed import Took
from qatlab.results.run import LOCK, Run
from qatlab.sweeps.grid import Cell

LEFT = ("new", "interrupted")
# Exit codes that are no failure: that of a run that said it was stopped; those of a signal before the run listened, as
# Python (-15) and shells (143) give them; and 0, for a finished run that was not scored on the suite asked for now.
STOPPED = (EXIT_REQUEUE, EXIT_INTERRUPTED, *(-number for number in SIGNALS), *(128 + number for number in SIGNALS), 0)
EXIT = "exit code "  # begins the last line of a log, which is written when a cell has ended
_ENDED = re.compile(rf"{EXIT}(-?\d+)")


@dataclass(frozen=True)
class State:
    """``kind``: finished | running | failed | interrupted | new | impossible; ``why`` it failed; what it ``took``."""

    kind: str
    why: str = ""
    took: Took | None = None


def log_of(run: Run) -> Path:
    """Return the file to which the output of a cell is written."""
    # The log lies beside the run folders, because a process has output before it makes its run's folder.
    return run.folder.parent / "logs" / f"{run.folder.name}.log"


def state_of(cell: Cell) -> State:
    """Return how far a cell is, from its run folder, its lock and its log."""
    # The order matters: a finished run keeps the log of an earlier
    # failure, and a running one the log of an interruption.
    if cell.run is None:
        return State("impossible", cell.mistake)
    if (finished := cell.run.finished()) is not None:
        return State("finished", took=finished)
    if is_locked(cell.run.folder / LOCK):
        return State("running")
    log = log_of(cell.run)
    # A run without a log was never started, or started by hand. A log
    # without an exit code at its end belongs to a killed process.
    if not log.exists():
        return State("interrupted" if cell.run.folder.exists() else "new")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    found = _ENDED.fullmatch(lines[-1]) if lines else None
    if found is None or int(found[1]) in STOPPED:
        return State("interrupted")
    reason = _reason(lines[:-1], int(found[1]))
    # This process gave up because another one held the run, and the other one has ended without finishing the run.
    if " is in use by " in reason:
        return State("interrupted")
    return State("failed", f"{reason} ({log})")


def _reason(lines: list[str], code: int) -> str:
    """Return why a process ended: its first sentence, else a signal, else the last line of its traceback."""
    # The log also holds the output of earlier processes of the run, each closed by a line with its exit code.
    before = [i for i, line in enumerate(lines) if _ENDED.fullmatch(line)]
    lines = lines[before[-1] + 1 :] if before else lines
    told = [line.removeprefix("qatlab: ") for line in lines if line.startswith("qatlab: ")]
    # The first sentence is the cause; later ones come from ranks that lost their partner. "stopped by" comes from an
    # earlier job that the scheduler ended before it could write its exit code.
    if said := [sentence for sentence in told if not sentence.startswith("stopped by ")]:
        return said[0]
    number = -code if code < 0 else code - 128  # a killed process has the code -9 in Python, 137 in a shell
    if number in {entry.value for entry in signal.Signals}:
        return f"killed by {signal.Signals(number).name}"
    return lines[-1].strip() if lines else f"{EXIT}{code}"


def show(cells: Sequence[Cell], states: Sequence[State], jobs: int) -> None:
    """Print a table of the cells and their states, the number of cells by state, and the time and disk still needed.

    Options that all of several cells have in common are left out of the table.
    """
    common = set.intersection(*(set(cell.overrides) for cell in cells)) if len(cells) > 1 else set()
    out = console()
    table = Table(title_justify="left")
    for name in ("run", "state", "options"):
        table.add_column(name, overflow="fold")
    for cell, state in zip(cells, states, strict=True):
        told = f"{state.kind}: {state.why}" if state.why else state.kind
        table.add_row(
            cell.run.folder.name if cell.run else "-",
            told,
            shown(" ".join(option for option in cell.overrides if option not in common)),
        )
    out.print(table)
    counts = Counter(state.kind for state in states)
    out.print(f"{len(cells)} runs: {', '.join(f'{n} {kind}' for kind, n in counts.items())}", highlight=False)
    for line in _left(cells, states, jobs):
        out.print(line, highlight=False)


def _left(cells: Sequence[Cell], states: Sequence[State], jobs: int) -> list[str]:
    """Return lines on the time and disk that the remaining cells may take, estimated from the finished cells.

    The time of a recipe is the mean of its own finished runs, or of all finished runs where it has none.
    """
    pairs = list(zip(cells, states, strict=True))
    left = [cell for cell, state in pairs if state.kind in LEFT]
    finished = [(cell, state.took) for cell, state in pairs if state.took]
    if not left:
        return []
    if not finished:
        return [f"{len(left)} to run; the time and disk they take is known once one is finished"]
    taken: dict[str, list[float]] = defaultdict(list)
    for cell, took in finished:
        taken[cell.recipe].append(took.seconds)
    every = mean(took.seconds for _, took in finished)
    seconds = sum(mean(taken[cell.recipe]) if cell.recipe in taken else every for cell in left) / jobs
    runs = mean(_size(cell.run.folder) for cell, _ in finished if cell.run is not None) * len(left)
    features = mean(took.feature_bytes for _, took in finished) * len(left)
    output = next(cell.run.folder.parent for cell in left if cell.run is not None)
    return [
        f"{len(left)} to run: about {_duration(seconds)}, {jobs} at a time",
        *_room({output: runs, cache_dir(FEATURES): features}),
    ]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _room(needed: dict[Path, float]) -> list[str]:
    """Return a line for each folder on the bytes that will be written to it and the bytes free on its disk.

    ``needed`` is {folder: bytes to come}. The bytes for folders on one disk are added up before they are compared.
    """
    there = {folder: _nearest_existing(folder) for folder in needed}
    on_disk: dict[int, float] = defaultdict(float)
    for folder, size in needed.items():
        on_disk[there[folder].stat().st_dev] += size
    lines = []
    for folder, size in needed.items():
        free = shutil.disk_usage(there[folder]).free
        short = ": TOO LITTLE" if on_disk[there[folder].stat().st_dev] > free else ""
        lines.append(f"{folder}: about {size / 2**20:.0f} MiB to come, {free / 2**20:.0f} MiB free{short}")
    return lines


def _nearest_existing(folder: Path) -> Path:
    """Return ``folder`` or the first of its parents that exists, because only an existing path tells its disk."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
