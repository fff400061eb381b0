"""Exported folders of small encoders, made without a run: what is stored with them is what the integers give in torch."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoders import built, made, plain_encoder

from qatlab.deploy.certified import runtime
from qatlab.deploy.formats import onnx as onnx_format
from qatlab.deploy.formats import openvino as openvino_format
from qatlab.deploy.integer import integer_copy, integer_layers
from qatlab.deploy.stored import features_of, telling_layer
from qatlab.quant import MinMax


def signed(bits: int) -> dict[str, Any]:
    """The slots of an encoder with weights of some bits, and inputs of eight."""
    return {"weight": partial(MinMax, bits, per_channel=True), "act": partial(MinMax, 8)}


def exported_folder(folder: Path, form: str = "onnx", bits: int = 8, exact: bool = False) -> Path:
    """The folder that an export certified on another machine left, whose CPU cuts nothing off."""
    folder.mkdir(parents=True)
    simulated = built(signed(bits))
    integer = integer_copy(simulated)
    file = onnx_format.write(integer, folder, 16, exact)
    models, layer = onnx_format.LayerModels(file, integer), telling_layer(simulated, integer, made(4))
    models.write(layer.name, layer.x, folder / "check.onnx")
    if form == "openvino":
        openvino_format.write(file, folder)
        file.unlink()
    with torch.no_grad():
        output = integer_layers(integer)[layer.name](torch.from_numpy(layer.x)).numpy()
        arrays, check = features_of(
            lambda images: integer(torch.from_numpy(images)).numpy(), integer, plain_encoder(), made(8)
        )
    np.savez(folder / "check.npz", layer_input=layer.x, layer_output=output, **arrays)
    about = {
        "format": form,
        "file": "model.onnx" if form == "onnx" else "model.xml",
        "runtime": runtime(form),
        "cpu": "a CPU with VNNI (avx512_vnni)",
        "logit_scale": 20.0,
        "check": {**check, "layer": {"name": layer.name, "limit": layer.limit}},
    }
    return written(folder, about)


def written(folder: Path, about: dict[str, Any], **changes: Any) -> Path:
    """The folder with an export.json of its files as they are, and some of it changed."""
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != "export.json"
    }
    (folder / "export.json").write_text(json.dumps({**about, "sha256": hashes, **changes}))
    return folder
