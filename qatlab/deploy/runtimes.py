"""Exported models by the format they were exported to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qatlab.errors import UserError, nearest

ABOUT = "export.json"
FORMATS = ("onnx", "openvino", "torch")


class Runtime(Protocol):
    """Maps preprocessed images (B, 3, S, S) float32, normalised, to features (B, D) float32, any B."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the features."""
        ...


def load(path: str | Path, threads: int | None = None) -> Runtime:
    """Return the integer model in an exported folder, runs/<id>/export/<format>, ready to be called.

    ``threads`` is the number of CPU threads, by default what the runtime takes. Raises UserError for a folder or file
    that is missing or damaged, and where the runtime is not installed.
    """
    folder = Path(path)
    return opened(folder, read_about(folder), threads)


def opened(folder: Path, about: dict[str, Any], threads: int | None = None) -> Runtime:
    """Return the model of a folder that ``read_about`` was told ``about``."""
    check(about["format"])
    return _opener(about["format"])(folder / about["file"], threads)


def _opener(format: str) -> Callable[..., Runtime]:
    if format == "onnx":
        from qatlab.deploy.onnx import OnnxModel

        return OnnxModel
    if format == "openvino":
        from qatlab.deploy.openvino import OpenVinoModel

        return OpenVinoModel
    from qatlab.deploy.torch import TorchModel

    return TorchModel


def check(format: str) -> None:
    """Raise UserError for a format that nothing is exported to."""
    if format not in FORMATS:
        raise UserError(
            f"format={format} is no format to export to{nearest(format, FORMATS)}; there are {', '.join(FORMATS)}."
        )


def read_about(folder: Path) -> dict[str, Any]:
    """Return what an exported folder says of itself, its files compared with their checksums."""
    if not (folder / ABOUT).exists():
        raise UserError(f"{folder} has no {ABOUT}: give the folder that `python -m qatlab.export` made.")
    about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
    for name, digest in about["sha256"].items():
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing: export again with `python -m qatlab.export`.")
        if hash_of(folder / name) != digest:
            raise UserError(f"{folder / name} is cut short or changed: export again with `python -m qatlab.export`.")
    return about


def hash_of(path: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
