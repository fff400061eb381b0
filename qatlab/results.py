"""The run folder: its id, its lock, and one JSON row per evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from lightning.pytorch.utilities import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from qatlab.cache import atomic, digest, full_disk_named, lock
from qatlab.config import Config, load, save
from qatlab.errors import UserError
from qatlab.evaluation import Row

# What decides the trained model. Where it runs, how it is watched and on what it is scored are left out: the same run may
# go on with other devices, and new evaluations are added to it.
_IDENTITY = ["model", "data", "quant", "objective", "optim", "fit", "seed"]
_NOT_IDENTITY = {
    "fit": ["eval_every", "checkpoint_every", "workers", "micro_batch", "profile"],
    "quant": ["kernels"],
    "data": ["cache"],
}
_NOT_SCORED = ("batch_size", "cache", "check")  # of the suite: how and whether, not what
_ASIDE = re.compile(r"\.\d{8}-\d{6}$")  # the end of the name of a run folder that force=true moved
FINISHED = "finished.json"
LOCK = ".lock"
_KEY = ["run_id", "stage", "step", "dataset", "definition", "score", "prompts"]


def run_id(config: Config) -> str:
    """Return eight hex digits: a hash of ``identity``, equal on every rank."""
    return digest(json.dumps(identity(config), sort_keys=True))[:8]


def evaluation_id(config: Config) -> str:
    """Return eight hex digits: a hash of what a model is scored on, and by which evaluations."""
    suite = {key: value for key, value in dataclasses.asdict(config.suite).items() if key not in _NOT_SCORED}
    asked = {"suite": suite, "callbacks": config.callbacks}
    return digest(json.dumps(asked, sort_keys=True))[:8]


def identity(config: Config) -> Row:
    """Return everything in ``config`` that decides the trained model, by dotted option."""
    options = dataclasses.asdict(config)
    deciding = {name: options[name] for name in _IDENTITY} | {"precision": config.trainer.precision}
    if config.quant.rules:  # the first match wins, so their order counts
        deciding["quant"]["rules"] = list(config.quant.rules.items())
    for group, names in _NOT_IDENTITY.items():
        deciding[group] = {key: value for key, value in deciding[group].items() if key not in names}
    # A file is known by what is in it: the same path may hold other weights tomorrow.
    for file in filter(None, (config.model.checkpoint, (config.model.text_features or "").partition(":")[0])):
        if Path(file).is_file():
            deciding[f"content of {file}"] = _sha256(
                Path(file), Path(file).stat().st_size, Path(file).stat().st_mtime_ns
            )
    return dict(_flat(deciding))


@lru_cache
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    """Return the hash of a file's content; a start asks for it several times, of files of hundreds of megabytes."""
    hashed = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(2**20):
            hashed.update(chunk)
    return hashed.hexdigest()


def is_rank_zero() -> bool:
    """Return whether this process is the one that writes: the first of its group, or a process on its own."""
    return getattr(rank_zero_only, "rank", 0) == 0


def read_rows(path: Path) -> list[Row]:
    """Return the rows of one results.jsonl; a half-written last line (a killed process) is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def read(folders: Iterable[str | Path] | str | Path = "runs") -> pl.DataFrame:
    """Return every row below one folder or several as one polars frame, see ``frame``.

    The flat config is left out; read ``config.yaml`` beside the rows for it. Runs that ``force=true`` moved aside count
    only where their own folder is named.
    """
    roots = [folders] if isinstance(folders, (str, Path)) else list(folders)
    files = sorted({file for root in roots for file in _result_files(Path(root))})
    return frame([row for file in files for row in read_rows(file)])


def frame(rows: Iterable[Row]) -> pl.DataFrame:
    """Return rows as a polars frame: a column per metric <m>, and of its interval and its difference from FP32.

    These are <m>_low, <m>_high, <m>_difference, <m>_difference_low, <m>_difference_high and <m>_p, uncorrected.
    """
    return pl.DataFrame(list(map(_wide, rows)), infer_schema_length=None)


def _wide(row: Row) -> Row:
    nested = ("metrics", "intervals", "paired", "config", "versions")
    wide = {key: value for key, value in row.items() if key not in nested} | row["metrics"]
    for name, (low, high) in row.get("intervals", {}).items():
        wide |= {f"{name}_low": low, f"{name}_high": high}
    for name, found in row.get("paired", {}).items():
        wide |= {
            f"{name}_difference": found["value"],
            f"{name}_difference_low": found["low"],
            f"{name}_difference_high": found["high"],
            f"{name}_p": found["p_value"],
        }
    return wide


def _result_files(root: Path) -> Iterable[Path]:
    for file in root.rglob("results.jsonl"):
        if not any(_ASIDE.search(part) for part in file.relative_to(root).parts):
            yield file


class Took(NamedTuple):
    """What the last process of a run took: ``seconds``, and ``feature_bytes`` that it left in the cache."""

    seconds: float
    feature_bytes: int


class Run:
    """One run folder, ``<output>/<recipe>-<run id>``, held by one process at a time (rank zero of its group)."""

    def __init__(self, config: Config, name: str, folder: Path | None = None) -> None:
        # As they are asked for, before they are filled in.
        self.id, self._evaluation = run_id(config), evaluation_id(config)
        self.config = config
        self.folder = folder or Path(config.output) / f"{name}-{self.id}"
        self._lock: Any = None

    def __enter__(self) -> Run:
        if is_rank_zero():
            self._take()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            if {path.name for path in self.folder.iterdir()} <= {LOCK, "config.yaml"}:
                # A mistake ended it before anything was computed; NFS keeps an open file a moment longer.
                shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()

    def _take(self) -> None:
        """Make and lock the folder; raises UserError naming the holder when another process has it."""
        self._lock_folder()
        again = int(os.environ.get("SLURM_RESTART_COUNT", "0"))  # a requeued job goes on with what it began
        if self.config.force and not again and any(path.name != LOCK for path in self.folder.iterdir()):
            aside = self.folder.with_name(f"{self.folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            self.folder.rename(aside)
            print(f"force=true: the earlier run was moved to {aside}")
            self._lock.close()
            self._lock_folder()

    def _lock_folder(self) -> None:
        for _ in range(10):  # whoever asks whether it is locked holds it for a moment
            held = self._try_lock()
            if held is not False:
                break
            time.sleep(0.05)
        if held is False:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise UserError(f"{self.folder} is in use by {holder}; wait for it, or give this run another output=.")
        if held is None:
            print(f"{self.folder} is on a disk without locks: see to it that no other process is given this run")
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def _try_lock(self) -> bool | None:
        path = self.folder / LOCK
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                self._lock = path.open("a+")
                held = lock(self._lock, wait=False)
                # Its last holder may have removed the folder meanwhile: then this is the lock of nothing.
                if held is False or os.fstat(self._lock.fileno()).st_ino == path.stat().st_ino:
                    return held
                self._lock.close()

    def describe(self, recipe: str) -> None:
        """Write config.yaml: the options of the run, once, on rank zero."""
        path = self.folder / "config.yaml"
        if is_rank_zero() and not path.exists():
            save(self.config, recipe, path)

    def finish(self, took: Took) -> None:
        """Note on rank zero that all was computed and scored that ``config`` asks for, and what it ``took``."""
        if is_rank_zero() and self.finished() is None:
            with atomic(self.folder / FINISHED) as temporary:
                temporary.write_text(json.dumps({**self._finished(), self._evaluation: took}, indent=1))

    def finished(self) -> Took | None:
        """Return what it took to finish what ``config`` asks for, None where that is not finished."""
        found = self._finished().get(self._evaluation)
        return None if found is None else Took(*found)

    def _finished(self) -> dict[str, Any]:
        path = self.folder / FINISHED
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    @property
    def results(self) -> Path:
        """Return the path of the rows."""
        return self.folder / "results.jsonl"

    def rows(self) -> list[Row]:
        """Return what is stored."""
        return read_rows(self.results)

    def done(self, stage: str) -> set[tuple[str, str]]:
        """Return (dataset, definition) of the rows of ``stage`` that are there already."""
        return {(row["dataset"], row["definition"]) for row in self.rows() if row["stage"] == stage}

    def append(self, rows: list[Row]) -> None:
        """Add rows that are not there yet (by ``_KEY``), in one write, on rank zero."""
        if not is_rank_zero():
            return
        common = self._common()
        new = {_key(row): row for row in ({"run_id": self.id, **row, **common} for row in rows)}
        with self.results.open("ab") as file:
            lock(file, wait=True)  # until the file is closed: what is looked at next stays true
            seen = {_key(row) for row in self.rows()}
            text = "".join(json.dumps(row) + "\n" for key, row in new.items() if key not in seen)
            # A line that a killed process left half-written is closed first, so that it spoils no row but itself.
            stored = self.results.read_bytes()
            if stored and not stored.endswith(b"\n"):
                text = "\n" + text
            with full_disk_named(self.results):
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())

    def _common(self) -> Row:
        options = dataclasses.asdict(self.config)
        for name in ("defaults", "hydra", "force", "output"):
            options.pop(name)
        return {
            "seed": self.config.seed,
            "config": dict(_flat(options)),
            "versions": versions(),
            "commit": git_commit(),
        }


def unfinished_beside(run: Run, recipe: str) -> list[str]:
    """Return a line for each interrupted run of ``recipe`` in the same output folder, with what differs from ``run``.

    Whoever changes an option and means to go on with an interrupted run starts one of its own: this says so.
    """
    mine, lines = identity(run.config), []
    for folder in sorted(run.folder.parent.glob(f"{recipe}-????????")):
        if folder == run.folder or not any((folder / "checkpoints").glob("*.ckpt")):
            continue
        try:
            theirs = identity(load(folder / "config.yaml")[0])
        except (UserError, OmegaConfBaseException):
            lines.append(f"{folder} is unfinished and was made by another version of qatlab")
            continue
        differing = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
        shown = ", ".join(f"{key}={theirs.get(key)} there, {mine.get(key)} here" for key in differing[:3])
        lines.append(f"{folder} is unfinished and another run: {shown}{' ...' if len(differing) > 3 else ''}")
    return lines


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in _KEY)


def _flat(options: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(options, dict) and options:
        for key, value in options.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, options


@lru_cache(1)
def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    return {
        name: version(name)
        for name in ("torch", "torchvision", "open_clip_torch", "lightning", "torchmetrics", "numpy")
    }


@lru_cache(1)
def git_commit() -> str | None:
    """Return the commit of the checkout qatlab runs from, with '+' when it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
