"""CIFAR-10-C and CIFAR-100-C as released: one array per corruption, and labels.npy beside them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatlab.core.contents import array_hash, hashes, is_young, part, stamp
from qatlab.core.errors import UserError
from qatlab.core.files import user_path
from qatlab.data.images.imageset import Layout

# Hendrycks and Dietterich 2019: one file holds the 10 000 test images of CIFAR at severity 1, then at 2, up to 5.
SEVERITIES = 5
PER_SEVERITY = 10_000


class CorruptionArray(Layout):
    """The images of ``<corruption>.npy``, (N, H, W, 3) uint8, with the labels of ``labels.npy`` beside it, (N,).

    Severities follow one another: 50 000 images are 5 x 10 000 (Hendrycks and Dietterich 2019), and each image's group
    is its severity, "1" to "5"; arrays of another length have no groups. The file is mapped into memory, not read.
    Raises UserError for other shapes, and for labels that are missing, of another number or no whole numbers.
    """

    kind = "npy"

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self._images: np.ndarray | None = None
        # The status is read before the file is mapped. If the file is replaced in between, hashes are stored under the
        # status of the old file, which no later run will look up.
        self._status = _status(self.path)
        images = self.images
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise UserError(
                f"{self.path} holds {images.dtype} of shape {images.shape}, expected images of shape (N, 32, 32, 3) uint8."
            )
        file = self.path.with_name("labels.npy")
        if not file.is_file():
            raise UserError(f"{file} is not there; CIFAR-C's labels lie beside its corruptions.")
        labels = _mapped(file)
        if labels.shape != images.shape[:1]:
            raise UserError(
                f"{file} has the shape {labels.shape}, but {self.path.name} {images.shape}; expected one label per image."
            )
        self.keys = _whole(labels, file)
        severe = len(images) == SEVERITIES * PER_SEVERITY
        self.groups = [str(place // PER_SEVERITY + 1) if severe else "" for place in range(len(images))]

    def __getstate__(self) -> dict[str, Any]:
        # pickle would send the content of the mapped file to each worker. The worker maps the file itself instead.
        return {**self.__dict__, "_images": None}

    @property
    def images(self) -> np.ndarray:
        """Return the array, (N, H, W, 3) uint8, mapped into memory when a process first asks for it."""
        if self._images is None:
            self._images = _mapped(self.path)
        return self._images

    def name(self, place: int) -> str:
        """Return the number of the image in its array."""
        return f"image {place}"

    def hash(self, places: Sequence[int]) -> np.ndarray:
        """Return the sha256 of the pixels of the images at ``places``, (n, 32) uint8."""
        whole = stamp(str(self.path.resolve()), self._status)
        stamps = [part(whole, place) for place in places]
        # No hash is stored for a file that was written a moment ago, because it may change again without a new time
        # stamp.
        kept = not is_young(self._status, time.time_ns())
        return hashes(
            self.path.resolve(),
            stamps,
            lambda i: (stamps[i] if kept else None, array_hash(self.images[places[i]])),
        )

    def pixels(self, place: int) -> Tensor:
        """Return the image at ``place`` at its own size, (3, H, W) uint8."""
        # np.array copies: torch would warn about the mapped memory, which is read only.
        return torch.from_numpy(np.array(self.images[place])).permute(2, 0, 1)


def _whole(labels: np.ndarray, file: Path) -> list[int]:
    """Return the labels as integers; a float counts as one where it is whole (3.0)."""
    if labels.dtype.kind not in "iuf":
        raise UserError(
            f"{file} holds {labels.dtype} (first {labels[:1].tolist()}), expected a whole number for each image."
        )
    if labels.dtype.kind == "f" and len(broken := np.flatnonzero(~np.isfinite(labels) | (labels != np.floor(labels)))):
        raise UserError(
            f"{file} labels image {broken[0]} with {labels[broken[0]]}, expected a whole number ({len(broken)} such labels)."
        )
    return [int(label) for label in labels]


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as a numpy array: {error}. Unpack the archive again.")


def _mapped(path: Path) -> np.ndarray:
    try:
        # Pickled objects are refused, because loading them would run code in the file.
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise _unreadable(path, error) from error
