"""CIFAR-10-C and CIFAR-100-C as released: one array per corruption, and labels.npy beside them."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatlab.data.sets import Layout
from qatlab.errors import UserError

SEVERITIES = 5
PER_SEVERITY = 10_000
SAMPLED = 500  # images that the checksum of an array looks at


class CorruptionArray(Layout):
    """The images of ``<corruption>.npy``, (N, H, W, 3) uint8, with the labels of ``labels.npy`` beside it, (N,).

    Severities follow one another: 50 000 images are 5 x 10 000 (Hendrycks and Dietterich 2019), and each image's group
    is its severity, "1" to "5"; arrays of another length have no groups. The file is mapped into memory, not read.
    Raises UserError for other shapes, and for labels that are missing or of another number.
    """

    kind = "npy"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._images: np.ndarray | None = None
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
        self.keys = [int(label) for label in labels]
        severe = len(images) == SEVERITIES * PER_SEVERITY
        self.groups = [str(place // PER_SEVERITY + 1) if severe else "" for place in range(len(images))]
        sample = images[:: max(1, len(images) // SAMPLED)]
        self._checksum = f"{images.shape}-{zlib.crc32(sample.tobytes()):08x}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}  # a mapping would travel to other processes as a copy of its content

    @property
    def images(self) -> np.ndarray:
        """Return the array, mapped when a process first asks for it."""
        if self._images is None:
            self._images = _mapped(self.path)
        return self._images

    def name(self, place: int) -> str:
        """Return the number of the image in its array."""
        return f"image {place}"

    def identity(self, place: int) -> str:
        """Return the file's name and the number, with the shape and a checksum of some images."""
        return f"{self.path.name}/{self._checksum}/{place}"

    def pixels(self, place: int) -> Tensor:
        """Return an image at its own size."""
        return torch.from_numpy(np.array(self.images[place])).permute(2, 0, 1)


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a numpy array: {error}. Unpack the archive again.") from error
