"""The run folder: its name, its lock, its options and its rows."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from glob import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from qatlab.config import OF_CALL, Config, add_contents, flat, load, load_contents, read_options, save, told_options
from qatlab.config.named_files import earlier, of_model
from qatlab.core.damage import whole
from qatlab.core.errors import UserError
from qatlab.core.files import atomic, is_read_only, lock, open_lock, refusal_named, release, user_path
from qatlab.core.ranks import is_first
from qatlab.results.completed import FINISHED, Completed, Took
from qatlab.results.identity import _id_of, evaluation_id, identity, stored_id
from qatlab.results.rowfile import Row, RowFile
from qatlab.results.rows import read_rows

LOCK = ".lock"


class Run:
    """A run folder, ``<output>/<recipe>-<run id>``; inside ``with`` rank zero holds its lock, so that one process writes it."""

    def __init__(self, config: Config, name: str, folder: Path | None = None) -> None:
        # Hashed now, with the options as the user gave them, because other code fills in options later.
        known, now = earlier(config), of_model(config)
        self.identity = identity(config, now)
        # ``theirs`` is the identity in an earlier release, which hashed the content of fewer files.
        theirs = self.identity if known == now else identity(config, known)
        self.id = _id_of(self.identity) if folder is None else stored_id(folder)
        self._evaluation = evaluation_id(config)
        self.config = config
        self.folder = folder or user_path(config.output) / f"{name}-{self.id}"
        self.read_only = False  # set when the folder is locked
        self._in_use = ""  # the text in the lock file, where another process holds the lock
        self._lock: Any = None
        self._stored: RowFile | None = None
        if folder is not None:
            self._require_same_contents()
        # os.path.exists, because Path.exists raises for a name that is too long.
        elif not os.path.exists(self.folder) and not config.force:
            self._continue(name, theirs)
        # The files whose content is part of the id, even if config.yaml does not have their hashes.
        self._known = known if self.id in (_id_of(theirs), _id_of(self.identity)) else {}

    def _continue(self, name: str, theirs: Row) -> None:
        """Go on in the folder that an earlier release made for these options, if the named files have not changed since.

        The id of that folder is a hash of ``theirs``, which leaves out the content of some files. A file whose content
        the folder does not record is taken to be unchanged; ``describe`` then records it.
        """
        folder = self.folder.with_name(f"{name}-{_id_of(theirs)}")
        if theirs == self.identity or not (folder / "config.yaml").exists():
            return
        stored, now = load_contents(folder / "config.yaml") or {}, of_model(self.config)
        if all(stored.get(file, sha256) == sha256 for file, sha256 in now.items()):
            self.id, self.folder, self.identity = stored_id(folder), folder, theirs

    def _require_same_contents(self) -> None:
        """Raise UserError where a file that a stored run names has changed, because its rows would then be of two models."""
        stored, now = load_contents(self.folder / "config.yaml") or {}, of_model(self.config)
        if other := [file for file in now if stored.get(file, now[file]) != now[file]]:
            raise UserError(
                f"{other[0]} is not what {self.folder} was made with: put the file of then back, or make a run of its own, "
                "`python -m qatlab.fit recipe=...`."
            )

    def __enter__(self) -> Run:
        if is_first():
            with refusal_named(self.folder):
                self._take()
            self._mend()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            if not self.read_only and {path.name for path in self.folder.iterdir()} <= {LOCK, "config.yaml"}:
                # The run ended before anything was computed, so its folder is removed. Errors are ignored, because NFS
                # keeps the open lock file a moment longer.
                shutil.rmtree(self.folder, ignore_errors=True)
            release(self._lock)

    def _take(self) -> None:
        """Make and lock the folder; raises UserError with the name of the process that holds the lock."""
        self._lock_folder()
        # A job that Slurm has requeued must go on with its own run, and not move it aside by force=true.
        again = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if self.config.force and not again and any(path.name != LOCK for path in self.folder.iterdir()):
            aside = self.folder.with_name(f"{self.folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            self.folder.rename(aside)
            print(f"force=true: the earlier run was moved to {aside}")
            release(self._lock)
            self._lock_folder()

    def _lock_folder(self) -> None:
        for _ in range(10):  # a process that only tests the lock holds it for a moment, so one failure means nothing
            held = self._try_lock()
            if held is not False:
                break
            time.sleep(0.05)
        if held is False:
            self._lock.seek(0)
            self._in_use = self._lock.read().strip() or "another process"
            self._lock.close()
            # A finished run is shown without the lock, because nothing has to be written.
            if self.config.force or self.finished() is None:
                raise UserError(
                    f"{self.folder} is in use by {self._in_use}; wait for it, or give this run another output=."
                )
            self.read_only = True
            print(f"{self.folder} is in use by {self._in_use}: what it holds is shown")
            return
        if self.read_only:
            print(f"{self.folder} cannot be written to: what it holds is shown, and nothing can be added")
            return
        if held is None:
            print(f"{self.folder} is on a disk without locks: see to it that no other process is given this run")
        if self._lock.writable():  # the lock file of another user can be locked even if it cannot be written to
            self._lock.seek(0)
            self._lock.truncate()
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._lock.flush()

    def _try_lock(self) -> bool | None:
        path = self.folder / LOCK
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.read_only = is_read_only(path.parent)
            if self.read_only and not path.exists():
                return None
            with suppress(FileNotFoundError):
                self._lock = open_lock(path)
                held = lock(self._lock, wait=False)
                # The last holder may have removed the folder since the file was opened. Then the locked file is not the
                # one that ``path`` names, and the loop tries again.
                if held is False or os.fstat(self._lock.fileno()).st_ino == path.stat().st_ino:
                    return held
                self._lock.close()

    def _mend(self) -> None:
        """Move damaged rows to another file, and print a line on them or on rows that were lost since an evaluation."""
        stored = RowFile(self.results)
        wrong = sorted([*stored.damaged, *stored.bare_lines])
        if wrong:
            of = "" if stored.damaged else " whose options contexts.jsonl has lost"
            kept = "are left out" if self.read_only else f"are kept in {stored.mend()}"
            told = f"has damaged lines ({', '.join(map(str, wrong[:5]))}){of}: they {kept}"
        elif lost := self._completed.lost():
            told = f"has lost rows: it has {lost} bytes less than when its last evaluation was finished"
        else:
            return
        print(
            f"{self.results} {told}. What they said of a stage is scored again by the command that made them; what they said "
            "of a probe, once the training is over, cannot be."
        )

    def require_writable(self, why: str) -> None:
        """Raise UserError where the folder can only be read; ``why`` says in the message what has to be written."""
        if self._in_use:
            raise UserError(f"{self.folder} is in use by {self._in_use}, and {why}: wait for it.")
        if self.read_only:
            raise UserError(
                f"{self.folder} cannot be written to, and {why}: copy it to a disk that can be written, and name that with "
                "output= or checkpoint=."
            )

    def describe(self, recipe: str) -> None:
        """Write config.yaml on rank zero, once: the options of the run, and hashes of the files that the options name."""
        path, contents = self.folder / "config.yaml", of_model(self.config)
        if not is_first() or self.read_only:
            return
        if whole(path, read_options) is None:
            save(self.config, recipe, self.id, path, contents)
        elif load_contents(path) is None:
            add_contents(path, contents)
            if untold := [file for file in contents if file not in self._known]:
                print(
                    f"{self.folder} does not say what {', '.join(untold)} held when it was made: taken for the same, and known "
                    "by content from now on (force=true makes a run of its own)"
                )

    def finish(self, took: Took) -> None:
        """Store on rank zero that everything that ``config`` asks for was computed and scored, and what it ``took``."""
        if is_first() and not self.read_only:
            self._completed.note(self._evaluation, took)

    def finished(self) -> Took | None:
        """Return the cost of the evaluation that ``config`` asks for; None where it is not finished, or rows were lost since."""
        return self._completed.took(self._evaluation)

    @property
    def _completed(self) -> Completed:
        return Completed(self.folder / FINISHED, self.results)

    @property
    def results(self) -> Path:
        """Return the path of results.jsonl."""
        return self.folder / "results.jsonl"

    def rows(self) -> list[Row]:
        """Return the complete stored rows, read from the disk."""
        return read_rows(self.results)

    def done(self, stage: str) -> dict[tuple[str, str], set[str]]:
        """Return {(dataset, definition): scores} of the stored rows of ``stage``."""
        found: dict[tuple[str, str], set[str]] = {}
        for row in self.rows():
            if row["stage"] == stage:
                found.setdefault((row["dataset"], row["definition"]), set()).add(row["score"])
        return found

    def write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Make the file ``name`` of the run folder by ``write(path)``, on rank zero; an error leaves no half-written file.

        In a folder that cannot be written to nothing happens.
        """
        if is_first() and not self.read_only:
            with atomic(self.folder / name) as temporary:
                write(temporary)

    def append(self, rows: list[Row]) -> None:
        """Add on rank zero the rows whose ``rowfile.KEY`` is not stored yet: all of them, or after an error none.

        Raises UserError where the folder can only be read.
        """
        if is_first():
            self.require_writable("there are rows to add")
            common = self.common()
            if self._stored is None or self._stored.path != self.results:  # the folder changed after the last call
                self._stored = RowFile(self.results)
            self._stored.append([{"run_id": self.id, **row, **common} for row in rows])

    def common(self) -> Row:
        """Return the entries that all rows of the run have in common: seed, options by dotted name, versions and commit."""
        options = told_options(self.config)
        for name in (*OF_CALL, "output"):
            options.pop(name)
        return {
            "seed": self.config.seed,
            "config": dict(flat(options)),
            "versions": versions(),
            "commit": git_commit(),
        }


def unfinished_beside(run: Run, recipe: str) -> list[str]:
    """Return a line for each interrupted run of ``recipe`` in the same output folder, with the options that differ.

    A user who changes an option of an interrupted run and gives the command again starts a new run. The line tells
    that.
    """
    mine, lines = run.identity, []
    for folder in sorted(run.folder.parent.glob(f"{escape(recipe)}-????????")):
        if folder == run.folder or not any((folder / "checkpoints").glob("*.ckpt")):
            continue
        try:
            theirs = identity(load(folder / "config.yaml")[0], load_contents(folder / "config.yaml"))
        except (UserError, OmegaConfBaseException):
            lines.append(f"{folder} is unfinished and was made by another version of qatlab")
            continue
        differing = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
        shown = ", ".join(f"{key}={theirs.get(key)} there, {mine.get(key)} here" for key in differing[:3])
        shown = shown or "its files may have held something else"
        lines.append(f"{folder} is unfinished and another run: {shown}{' ...' if len(differing) > 3 else ''}")
    return lines


@lru_cache(1)
def versions() -> dict[str, str]:
    """Return {package: version} of the packages that the numbers depend on."""
    return {
        name: version(name)
        for name in ("torch", "torchvision", "open_clip_torch", "lightning", "torchmetrics", "numpy")
    }


@lru_cache(1)
def git_commit() -> str | None:
    """Return 12 hex digits, the commit of qatlab's checkout, with "+" behind them if it has changes; None outside of git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
