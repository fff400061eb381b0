"""CIFAR-10 and CIFAR-100 as released for Python, alone or in torchvision's folder."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatlab.data.sets import Layout
from qatlab.errors import UserError

FOLDERS = ("cifar-10-batches-py", "cifar-100-python")
TESTS = ("test_batch", "test")
# The first of each is CIFAR-10's, the second CIFAR-100's fine labels.
LABELS, NAMES, META = ("labels", "fine_labels"), ("label_names", "fine_label_names"), ("batches.meta", "meta")
# All that these pickles hold besides plain values: numpy arrays, under the names of three generations of numpy.
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
        self.path = batch_file(Path(path).expanduser()) or Path(path).expanduser()
        content = _load(self.path)
        labels = next((content[key] for key in LABELS if key in content), ())
        data = content.get("data")
        if not isinstance(data, np.ndarray) or data.shape != (len(labels), 3072) or data.dtype != np.uint8:
            raise UserError(
                f"{self.path} is no CIFAR batch: it holds {', '.join(map(str, content)) or 'nothing'}, expected data of "
                "shape (N, 3072) uint8 and N labels or fine_labels."
            )
        self.images = data.reshape(-1, 3, 32, 32)
        self.keys = [int(label) for label in labels]
        self.groups = [""] * len(self.keys)
        self._checksum = hashlib.sha256(data.tobytes()).hexdigest()[:32]
        meta = next((self.path.parent / name for name in META if (self.path.parent / name).is_file()), None)
        if meta is not None:
            self.class_names = next(([*names] for key, names in _load(meta).items() if key in NAMES), None)

    def name(self, place: int) -> str:
        """Return the number of the image in its file."""
        return f"image {place}"

    def identity(self, place: int) -> str:
        """Return the number with the checksum of all pixels."""
        return f"{self._checksum}/{place}"

    def pixels(self, place: int) -> Tensor:
        """Return an image of 32 x 32 pixels."""
        return torch.from_numpy(self.images[place])


def batch_file(path: Path) -> Path | None:
    """Return the pickle that ``path`` stands for: itself, or a folder's test batch; None where there is none."""
    if path.is_file():
        beside = any((path.parent / name).is_file() for name in META)
        return path if beside and path.name.startswith((*TESTS, "data_batch_", "train")) else None
    for folder in (path, *(path / name for name in FOLDERS)):
        for test, meta in zip(TESTS, META, strict=True):
            if (folder / test).is_file() and ((folder / meta).is_file() or test == "test_batch"):
                return folder / test
    return None


class _Arrays(pickle.Unpickler):
    """Reads plain values and numpy arrays; a pickle may else run any program."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SAFE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, ImportError, IndexError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a CIFAR pickle: {error}. Unpack the archive again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no CIFAR pickle: it holds a {type(content).__name__}, expected a dict.")
    return content
