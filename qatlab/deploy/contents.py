"""The files of an exported folder: export.json is checked before any file that it names is opened."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qatlab.core.errors import UserError
from qatlab.core.hashing import digest

ABOUT, CHECK = "export.json", "check.npz"
FILES = {"onnx": ("model.onnx",), "openvino": ("model.xml", "model.bin"), "torch": ("model.pt2",)}
"""The files of a model by its format, first the one that is opened: it reads the others."""
LAYER = {"onnx": "check.onnx", "openvino": "check.onnx", "torch": "check.pt2"}
"""The file of the layer that is checked."""
AGAIN = "export again with `python -m qatlab.export`."
# Names without a slash or a leading dot: no path out of the folder, and no hidden file.
_PLAIN = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"
_LARGEST = 2**24  # bytes of export.json: a few thousand are usual, and a huge file would fill the memory


def read_about(folder: Path) -> dict[str, Any]:
    """Return the content of an exported folder's export.json, after its files were compared with their checksums.

    Raises UserError for an export.json that is missing, damaged or names anything but plain files of this folder, for a
    file that is missing or changed, and for one that would be read and has no checksum.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise UserError(f"{folder} has no {ABOUT}: give the folder that `python -m qatlab.export` made.")
    about = _read(path)
    for key, expected, fits in _EXPECTED:
        if not fits(about.get(key)):
            raise UserError(f"{path} says {key}={str(about.get(key))[:80]!r}, where {expected} is expected: {AGAIN}")
    # export.json may come from anywhere: a name that is not the format's own is refused, not opened.
    files = FILES[about["format"]]
    if about["file"] != files[0]:
        raise UserError(
            f"{path} names file={about['file']!r}, where a model for {about['format']} is {files[0]}: {AGAIN}"
        )
    for name in (*files, *([CHECK, LAYER[about["format"]]] if about.get("check") else [])):
        if name not in about["sha256"]:
            raise UserError(f"{path} has no checksum of {name}, which would be read: {AGAIN}")
    # All listed files are checked, also those that are not read now, because an export counts as a whole.
    for name, stored in about["sha256"].items():
        _require_same(folder, name, stored)
    return about


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST:
        raise UserError(f"{path} has {path.stat().st_size} bytes, and what an export writes has thousands: {AGAIN}")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8 or no JSON; RecursionError: lists nested without end
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:80]}): {AGAIN}") from error
    if not isinstance(about, dict):
        raise UserError(f"{path} holds a {type(about).__name__}, where names with values are expected: {AGAIN}")
    return about


def _require_same(folder: Path, name: str, stored: str) -> None:
    path = folder / name
    if not re.fullmatch(_PLAIN, name):
        raise UserError(f"{folder / ABOUT} lists {name!r}: files are named as they lie in the folder itself. {AGAIN}")
    # A link may have a plain name too, and lead to a file elsewhere on this machine.
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
        raise UserError(f"{path} is a link that leaves the folder: copy the file itself there, or {AGAIN}")
    if not path.is_file():
        raise UserError(f"{path} is missing: {AGAIN}")
    data = path.read_bytes()
    if digest(data) != stored:
        raise UserError(f"{path} is cut short or changed: {AGAIN}")
    # ONNX may keep weights in other files, which its TensorProto.external_data names under the key "location": the
    # runtime would open whatever path stands there. The weights of an export lie in the model file itself.
    if path.suffix == ".onnx" and b"location" in data:
        raise UserError(f"{path} keeps weights in other files, which an export does not: {AGAIN}")


def _number(value: Any) -> bool:
    # JSON's true is an int to Python, and 1e400 is infinite.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30


def _hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(re.fullmatch("[0-9a-f]{64}", str(digest)) for digest in value.values())


def _limits(value: Any) -> bool:
    layer = value.get("layer") if isinstance(value, dict) else None
    return isinstance(layer, dict) and "name" in layer and _number(layer.get("limit")) and _number(value.get("limit"))


# (key of export.json, what is expected there, whether a value is that), in the order in which mistakes are told.
_EXPECTED: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("format", f"one of {', '.join(FILES)}", lambda value: isinstance(value, str) and value in FILES),
    ("file", "a file's name", lambda value: isinstance(value, str)),
    ("runtime", "a runtime and its version", lambda value: isinstance(value, str)),
    ("logit_scale", "a positive number", _number),
    ("sha256", "the sha256 of every file by its name", _hashes),
    ("check", "what the stored input is held to", lambda value: value is None or _limits(value)),
)
