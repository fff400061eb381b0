"""The files of an exported folder: the model, and what is needed to use it without qatlab."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qatlab.deploy.integer import integer_layers
from qatlab.deploy.onnx import OPSET
from qatlab.deploy.runtimes import ABOUT, hash_of

if TYPE_CHECKING:
    from torch import nn

    from qatlab.study import Study

CLASSES = "classes.npz"
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch"}


def describe(study: Study, integer: nn.Module, folder: Path, file: Path, form: str) -> None:
    """Write export.json and classes.npz beside the model ``file``: how images are prepared, and what they are told from.

    classes.npz holds, for every ID reference r, its class embeddings r (C, D) float32 and their names r.names (C,).
    """
    heads = study.module.heads
    arrays: dict[str, Any] = {name: head.classes.features.numpy() for name, head in heads.items()}
    arrays |= {f"{name}.names": np.array(head.classes.names) for name, head in heads.items()}
    np.savez(folder / CLASSES, allow_pickle=False, **arrays)
    layers = {name: [of.weight_bits, of.act_bits] for name, of in integer_layers(integer).items()}
    update(
        folder,
        format=form,
        file=file.name,
        runtime=f"{RUNTIMES[form]} {version(RUNTIMES[form])}",
        run=study.run.id,
        **study.facts(study.stages[-1]),
        opset=OPSET if form == "onnx" else None,
        layers=layers,
        features=int(next(iter(heads.values())).classes.features.shape[1]),
        preprocess=asdict(study.clip.preprocess),
        logit_scale=served_scale(study),
        sha256={path.name: hash_of(path) for path in sorted(folder.iterdir()) if path.name != ABOUT},
    )


def served_scale(study: Study) -> float:
    """Return the logit scale that probabilities are to be computed with: the refitted one where the run has it."""
    scales = study.state()
    fitted = [scale for name, scale in scales.items() if name.startswith("temperature")]
    return fitted[-1] if fitted else study.module.logit_scale


def update(folder: Path, **facts: Any) -> dict[str, Any]:
    """Add ``facts`` to export.json, and return all that it holds."""
    path = folder / ABOUT
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | facts, indent=1))
    return {**known, **facts}
