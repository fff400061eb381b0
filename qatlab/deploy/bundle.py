"""The files of an exported folder: the model, and what is needed to use it without qatlab."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qatlab.core.hashing import file_digest
from qatlab.deploy.certified import runtime
from qatlab.deploy.contents import ABOUT
from qatlab.deploy.cpu import cpu
from qatlab.deploy.formats.onnx import OPSET
from qatlab.deploy.integer import integer_layers
from qatlab.deploy.saturation import wide_layers

if TYPE_CHECKING:
    from torch import nn

CLASSES = "classes.npz"


def write_classes(folder: Path, classes: Mapping[str, tuple[np.ndarray, Sequence[str]]]) -> None:
    """Write classes.npz: for every ID reference r its class embeddings r (C, D) float32 and their names r.names (C,)."""
    arrays: dict[str, Any] = {}
    for reference, (features, names) in classes.items():
        # The names are stored as an array of strings, which np.load reads without unpickling.
        arrays |= {reference: features, f"{reference}.names": np.array(names)}
    np.savez(folder / CLASSES, allow_pickle=False, **arrays)


def describe(folder: Path, file: Path, form: str, integer: nn.Module, exact: bool, **facts: Any) -> None:
    """Write export.json beside the model ``file``: what it is, what runs it, and the checksum of every file that is there.

    ``exact`` is whether exact products were asked for, ``facts`` is what the run says of its model and how images are
    prepared.
    """
    layers = {name: [layer.weight_bits, layer.act_bits] for name, layer in integer_layers(integer).items()}
    update(
        folder,
        format=form,
        file=file.name,
        runtime=runtime(form),
        cpu=cpu(),
        # Products with weights of up to 7 bits fit into sixteen bits: such a model is exact without being asked to be.
        exact=exact or not wide_layers(integer),
        **facts,
        opset=OPSET if form == "onnx" else None,
        layers=layers,
        # export.json cannot hold its own checksum.
        sha256={path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.name != ABOUT},
    )


def update(folder: Path, **facts: Any) -> dict[str, Any]:
    """Add ``facts`` to export.json, and return all that it holds."""
    path = folder / ABOUT
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | facts, indent=1))
    return {**known, **facts}
