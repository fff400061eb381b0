"""CIFAR-10 and CIFAR-100 as released for Python, alone or in torchvision's folder."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatlab.core.contents import HASH, array_hash
from qatlab.core.errors import UserError
from qatlab.core.files import user_path
from qatlab.data.images.imageset import Layout

FOLDERS = ("cifar-10-batches-py", "cifar-100-python")
TESTS = ("test_batch", "test")
# In each pair the first name is that of CIFAR-10 and the second that of CIFAR-100, whose fine labels are used.
LABELS, NAMES, META = ("labels", "fine_labels"), ("label_names", "fine_label_names"), ("batches.meta", "meta")
# The functions that a CIFAR pickle may call. They rebuild numpy arrays, under the names of numpy 1 and of numpy 2.
SAFE = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class Cifar(Layout):
    """The images of one CIFAR pickle: a file (``data_batch_1``), or the test batch of a folder that holds it.

    Keys are the (fine) labels, with the names of ``batches.meta`` or ``meta`` where that lies beside. Raises UserError
    for a file that is no such pickle.
    """

    kind = "cifar"

    def __init__(self, path: str | Path) -> None:
        self.path = batch_file(user_path(path)) or user_path(path)
        content = _load(self.path)
        # Without labels the check of the shape below fails, whose message names what the file holds.
        labels = next((content[key] for key in LABELS if key in content), ())
        if not isinstance(labels, list | tuple | np.ndarray):
            raise UserError(f"{self.path} has {str(labels)[:40]} for its labels, expected a list of numbers.")
        data = content.get("data")
        if not isinstance(data, np.ndarray) or data.shape != (len(labels), 3072) or data.dtype != np.uint8:
            raise UserError(
                f"{self.path} is no CIFAR batch: it holds {', '.join(map(str, content)) or 'nothing'}, expected data of "
                "shape (N, 3072) uint8 and N labels or fine_labels."
            )
        # A row is the red plane, then the green, then the blue one, as (3, 32, 32) has it.
        self.images = data.reshape(-1, 3, 32, 32)
        self.keys = [_label(label, place, self.path) for place, label in enumerate(labels)]
        self.groups = [""] * len(self.keys)
        meta = next((self.path.parent / name for name in META if (self.path.parent / name).is_file()), None)
        if meta is not None:
            self.class_names = next((_text(names, meta) for key, names in _load(meta).items() if key in NAMES), None)

    def name(self, place: int) -> str:
        """Return the number of the image in its file."""
        return f"image {place}"

    def hash(self, places: Sequence[int]) -> np.ndarray:
        """Return the sha256 of the pixels of the images at ``places``, (n, 32) uint8; all pixels are in memory."""
        found = b"".join(array_hash(self.images[place]) for place in places)
        return np.frombuffer(found, np.uint8).reshape(-1, HASH)

    def pixels(self, place: int) -> Tensor:
        """Return the image at ``place``, (3, 32, 32) uint8."""
        return torch.from_numpy(self.images[place])


def batch_file(path: Path) -> Path | None:
    """Return the pickle that ``path`` stands for: itself, or a folder's test batch; None where there is none."""
    if path.is_file():
        # A file called "test" or "train" may be anything, so CIFAR's list of class names must be in the same folder.
        beside = any((path.parent / name).is_file() for name in META)
        return path if beside and path.name.startswith((*TESTS, "data_batch_", "train")) else None
    for folder in (path, *(path / name for name in FOLDERS)):
        for test, meta in zip(TESTS, META, strict=True):
            # "test" is a common name, so CIFAR-100 needs its meta file; "test_batch" is clear without one.
            if (folder / test).is_file() and ((folder / meta).is_file() or test == "test_batch"):
                return folder / test
    return None


def _label(label: Any, place: int, path: Path) -> int:
    # bool is a subclass of int, and True would pass as the label 1.
    if isinstance(label, bool) or not isinstance(label, int | np.integer):
        raise UserError(
            f"{path} labels image {place} with {str(label)[:40]!r}, expected a number; unpack the archive again."
        )
    return int(label)


def _text(names: Any, path: Path) -> list[str]:
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{path} names its classes {str(names)[:60]}, expected a list of text; unpack the archive again."
        )
    return [*names]


class _Arrays(pickle.Unpickler):
    """An unpickler that accepts only plain values and numpy arrays: a general pickle may call any function of Python."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SAFE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            # The files were written by Python 2, whose byte strings and arrays are read with latin1 without loss.
            content = _Arrays(file, encoding="latin1").load()
    except OSError:
        raise
    # A damaged pickle raises errors of any class (MemoryError, LookupError, OverflowError, ...).
    except Exception as error:
        said = str(error) or type(error).__name__
        raise UserError(f"{path} cannot be read as a CIFAR pickle: {said}. Unpack the archive again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no CIFAR pickle: it holds a {type(content).__name__}, expected a dict.")
    return content
