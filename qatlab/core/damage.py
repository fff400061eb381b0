"""Files that were cut off or changed on the disk: set aside and named, so that they are made again."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from polars.exceptions import PolarsError
from safetensors import SafetensorError

from qatlab.core.ranks import is_first

T = TypeVar("T")

# Errors that readers (torch, safetensors, zipfile, json, polars) raise for a file that is cut off, empty or has flipped
# bits. OSError is not among them, because a disk that does not answer says nothing about the file.
DAMAGES = (
    *(ValueError, LookupError, TypeError, ArithmeticError, EOFError, RuntimeError),
    *(zipfile.BadZipFile, pickle.UnpicklingError, SafetensorError, PolarsError),
)


def whole(path: Path, read: Callable[[Path], T]) -> T | None:
    """Return ``read(path)``, or None for a missing or damaged file; a damaged file is set aside with a message."""
    try:
        return read(path) if path.exists() else None
    except FileNotFoundError:  # another process set the file aside after ``exists``
        return None
    except DAMAGES as error:
        # torch also raises RuntimeError when memory runs out, and the file may be whole then.
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        set_aside(path, error)
        return None


def set_aside(path: Path, error: Exception) -> None:
    """Rename a damaged file to <name>.damaged, and print a message in the first process."""
    # The file is not deleted, because whoever looks for a fault of the disk needs it.
    aside = path.with_suffix(".damaged")
    try:
        path.rename(aside)
        outcome = f"it is kept as {aside.name}, and made again"
    except FileNotFoundError:  # another process has set the file aside, and printed the message
        return
    except OSError as refused:
        # On a disk that is mounted read-only the run still goes on, because the caller makes the content again.
        outcome = f"it cannot be set aside ({refused.strerror}) and is not used"
    if is_first():
        print(f"{path} is damaged ({reason(error)}): {outcome}", flush=True)


def reason(error: BaseException) -> str:
    """Return what is wrong with a damaged file: the first line of the reader's message, else the name of its error."""
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
