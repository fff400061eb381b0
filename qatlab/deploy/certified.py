"""The check that an exported model computes the same on this machine as on the machine that certified it.

The folder holds images with their features, and one layer of the model with its input and output.
``qatlab.deploy.stored`` chooses them and says why they are enough.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from qatlab.core.errors import UserError
from qatlab.deploy.contents import AGAIN, CHECK, LAYER
from qatlab.deploy.cpu import cpu

RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch"}
Model = Callable[[np.ndarray], np.ndarray]


def runtime(format: str) -> str:
    """Return the name and version of the installed runtime of a format."""
    try:
        return f"{RUNTIMES[format]} {version(RUNTIMES[format])}"
    except PackageNotFoundError:  # a runtime that was built from source has no package to ask
        return RUNTIMES[format]


def difference(found: np.ndarray, stored: np.ndarray) -> float:
    """Return ‖found - stored‖ / ‖stored‖ of two arrays of any shape, infinite where the shapes differ or a NaN is in one."""
    if found.shape != stored.shape:
        return float("inf")
    off = float(np.linalg.norm(found - stored) / np.linalg.norm(stored))
    return float("inf") if np.isnan(off) else off


def require_same(
    model: Model, open_file: Callable[[Path], Model], folder: Path, about: dict[str, Any], allow_inexact: bool
) -> None:
    """Raise UserError where the ``model`` of a folder does not give the stored outputs, or where no outputs are stored.

    ``open_file`` opens the file of the stored layer. With ``allow_inexact`` there is a warning instead of the error. If
    the outputs are right but come from another version of the runtime, there is a warning too.
    """
    if not about.get("check"):
        problem = (
            f"{folder} has no stored input, so nothing says that this machine computes what was certified: "
            f"{AGAIN.removesuffix('.')}"
        )
    else:
        problem = _what_differs(model, open_file, folder, about)
    if problem and not allow_inexact:
        raise UserError(f"{problem}, or take the model as it is: deploy.load(..., allow_inexact=True).")
    here = runtime(about["format"])
    if problem:
        warnings.warn(f"{problem}.", stacklevel=3)  # 3: the line that called deploy.load
    elif here != about["runtime"]:
        # Not refused: the stored input has just shown that this version computes the same.
        warnings.warn(
            f"{folder} was certified with {about['runtime']}, and {here} runs it here: it gives what is stored with it all "
            "the same.",
            stacklevel=3,
        )


def _what_differs(model: Model, open_file: Callable[[Path], Model], folder: Path, about: dict[str, Any]) -> str:
    """Return a sentence on how a model's outputs differ from the stored ones, with a remedy; "" where they are the same."""
    stored, check = _stored(folder / CHECK), about["check"]
    layer = open_file(folder / LAYER[about["format"]])
    # The layer is checked first: it shows for certain whether a CPU cuts off sums, and the features of a deep encoder
    # may not.
    for what, runs, given, expected, limit in (
        (f"the outputs of {check['layer']['name']}", layer, "layer_input", "layer_output", check["layer"]["limit"]),
        ("the features", model, "images", "features", check["limit"]),
    ):
        off = difference(runs(stored[given]), stored[expected])
        if off > limit:
            return (
                f"{folder} does not compute here what it did where it was certified: on the stored input {what} are {off:.1e} "
                f"off, and at most {limit:.1e} is allowed. It was certified on {about.get('cpu')} with {about['runtime']}, and "
                f"this is {cpu()} with {runtime(about['format'])}: without VNNI a CPU cuts off sums of products with 8-bit "
                "weights. Export with exact=true, which every CPU computes alike"
            )
    return ""


def _stored(path: Path) -> dict[str, np.ndarray]:
    """Return the stored arrays by name; raises UserError for a file that is damaged or compressed."""
    try:
        # Looked at before anything is read: a small compressed file can unpack to more than the memory holds.
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which may hide any size")
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in ("images", "features", "layer_input", "layer_output")}
    except Exception as error:  # numpy, zipfile and zlib raise classes of their own, and this file may be anything
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:80]}): {AGAIN}") from error
