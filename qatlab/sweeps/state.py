"""How far each cell of a sweep is, told from its run folder and its log alone."""

from __future__ import annotations

import re
import shutil
import signal
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from qatlab.cache import cache_dir, is_locked
from qatlab.results import LOCK, Run, Took
from qatlab.stopping import EXIT_INTERRUPTED, EXIT_REQUEUE, SIGNALS
from qatlab.sweeps.grid import Cell

LEFT = ("new", "interrupted")
# Told to stop, by its own word or by a signal before it listened; and finished, but for another suite than is asked for.
STOPPED = (EXIT_REQUEUE, EXIT_INTERRUPTED, *(-number for number in SIGNALS), *(128 + number for number in SIGNALS), 0)
EXIT = "exit code "  # the last line of a log of a process that ended by itself
_ENDED = re.compile(rf"{EXIT}(-?\d+)")


@dataclass(frozen=True)
class State:
    """``kind``: finished | running | failed | interrupted | new | impossible; ``why`` it failed; what it ``took``."""

    kind: str
    why: str = ""
    took: Took | None = None


def log_of(run: Run) -> Path:
    """Return the file that the output of a cell goes to."""
    return run.folder.parent / "logs" / f"{run.folder.name}.log"


def state_of(cell: Cell) -> State:
    """Return how far a cell is."""
    if cell.run is None:
        return State("impossible", cell.mistake)
    if (finished := cell.run.finished()) is not None:
        return State("finished", took=finished)
    if is_locked(cell.run.folder / LOCK):
        return State("running")
    log = log_of(cell.run)
    if not log.exists():
        return State("interrupted" if cell.run.folder.exists() else "new")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    found = _ENDED.fullmatch(lines[-1]) if lines else None
    if found is None or int(found[1]) in STOPPED:
        return State("interrupted")
    reason = _reason(lines[:-1], int(found[1]))
    if " is in use by " in reason:  # refused, as another process had it, which then ended without a word
        return State("interrupted")
    return State("failed", f"{reason} ({log})")


def _reason(lines: list[str], code: int) -> str:
    """Return what a process ended with: its first sentence, else a signal, else the last line of its traceback."""
    # Earlier processes said in the same log how they ended.
    before = [i for i, line in enumerate(lines) if _ENDED.fullmatch(line)]
    lines = lines[before[-1] + 1 :] if before else lines
    told = [line.removeprefix("qatlab: ") for line in lines if line.startswith("qatlab: ")]
    # What follows is of ranks that lost one; a stop is of a job before, which the scheduler ended without a last line.
    if said := [sentence for sentence in told if not sentence.startswith("stopped by ")]:
        return said[0]
    number = -code if code < 0 else code - 128  # as Python tells it, and as a shell does
    if number in {entry.value for entry in signal.Signals}:
        return f"killed by {signal.Signals(number).name}"
    return lines[-1].strip() if lines else f"{EXIT}{code}"


def show(cells: Sequence[Cell], states: Sequence[State], jobs: int) -> None:
    """Print the cells with how far each is, how many are where, and the time and disk that what is left may take.

    Options that all of several cells have are left out.
    """
    common = set.intersection(*(set(cell.overrides) for cell in cells)) if len(cells) > 1 else set()
    terminal = Console().is_terminal
    console = Console(width=None if terminal else 160)
    table = Table(title_justify="left")
    for name in ("run", "state", "options"):
        table.add_column(name, overflow="fold")
    for cell, state in zip(cells, states, strict=True):
        told = f"{state.kind}: {state.why}" if state.why else state.kind
        table.add_row(
            cell.run.folder.name if cell.run else "-",
            told,
            " ".join(option for option in cell.overrides if option not in common),
        )
    console.print(table)
    counts = Counter(state.kind for state in states)
    console.print(f"{len(cells)} runs: {', '.join(f'{n} {kind}' for kind, n in counts.items())}", highlight=False)
    for line in _left(cells, states, jobs):
        console.print(line, highlight=False)


def _left(cells: Sequence[Cell], states: Sequence[State], jobs: int) -> list[str]:
    """What is left, measured by what is finished: the time of a recipe by its own runs where it has some."""
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
        *_room({output: runs, cache_dir("features"): features}),
    ]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _room(needed: dict[Path, float]) -> list[str]:
    """What comes to each folder and is free there; folders on one disk share it."""
    there = {folder: next(path for path in (folder, *folder.parents) if path.exists()) for folder in needed}
    on_disk: dict[int, float] = defaultdict(float)
    for folder, size in needed.items():
        on_disk[there[folder].stat().st_dev] += size
    lines = []
    for folder, size in needed.items():
        free = shutil.disk_usage(there[folder]).free
        short = ": TOO LITTLE" if on_disk[there[folder].stat().st_dev] > free else ""
        lines.append(f"{folder}: about {size / 2**20:.0f} MiB to come, {free / 2**20:.0f} MiB free{short}")
    return lines


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
