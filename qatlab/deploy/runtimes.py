"""Opening of exported models: the runtime of each format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qatlab.core.errors import UserError, nearest
from qatlab.core.files import user_path
from qatlab.deploy.certified import require_same
from qatlab.deploy.contents import FILES, read_about

FORMATS = tuple(FILES)


class Runtime(Protocol):
    """Maps preprocessed images (B, 3, S, S) float32, normalised, to features (B, D) float32, any B."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the features (B, D) float32 of ``images`` (B, 3, S, S) float32."""
        ...


def load(path: str | Path, threads: int | None = None, allow_inexact: bool = False, trust: bool = False) -> Runtime:
    """Return the integer model in an exported folder, runs/<id>/export/<format>, ready to be called.

    ``threads`` is the number of CPU threads, by default the runtime's choice. The stored input has to give the same
    features as on the machine that certified the export; with ``allow_inexact`` there is only a warning if it does not.
    ``trust`` allows a model for torch, whose file can run code. Raises UserError for a folder or file that is missing,
    damaged or names files elsewhere, for other features, and if the runtime is not installed.
    """
    folder = user_path(path)
    about = read_about(folder)
    # Files of the folder are opened only here, after read_about has checked every name and checksum.
    model = opened(folder, about, threads, trust)
    require_same(model, opener(about["format"]), folder, about, allow_inexact)
    return model


def opened(folder: Path, about: dict[str, Any], threads: int | None = None, trust: bool = False) -> Runtime:
    """Return the model of a folder, without a check of what it computes; ``about`` is what ``read_about`` returned.

    Raises UserError for a model for torch without ``trust``.
    """
    if about["format"] == "torch" and not trust:
        raise UserError(
            f"{folder / about['file']} is a program that torch unpickles and compiles, so it can run code of whoever made it: "
            "if that was you, or somebody you trust, say trust=true (trust=True in deploy.load). Exports for onnx and "
            "openvino hold no code."
        )
    return opener(about["format"])(folder / about["file"], threads)


def opener(format: str) -> Callable[..., Runtime]:
    """Return the class that opens the model files of a format; it is called with the path and the number of threads."""
    # Each runtime is imported only when it is needed, because it may not be installed, and torch is slow to import.
    if format == "onnx":
        from qatlab.deploy.formats.onnx import OnnxModel

        return OnnxModel
    if format == "openvino":
        from qatlab.deploy.formats.openvino import OpenVinoModel

        return OpenVinoModel
    from qatlab.deploy.formats.inductor import TorchModel

    return TorchModel


def require_format(format: str) -> None:
    """Raise UserError for a ``format`` that nothing can be exported to."""
    if format not in FORMATS:
        raise UserError(
            f"format={format} is no format to export to{nearest(format, FORMATS)}; there are {', '.join(FORMATS)}."
        )
