"""OpenVINO's intermediate representation, made of the ONNX model, and its runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qatlab.deploy.extras import require
from qatlab.deploy.onnx import LayerModels, fits_in_four_bits, unreadable
from qatlab.deploy.parity import Part

FILE = "model.xml"


def write(onnx_file: Path, folder: Path) -> Path:
    """Return the file that the ONNX model was written to as IR, its weights in the .bin beside it."""
    openvino = require("openvino", "openvino.opset13")
    model = openvino.convert_model(onnx_file)
    _pack(openvino, model)
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)
    return folder / FILE


def _pack(openvino: Any, model: Any) -> None:
    """Store the weights that fit in four bits in four: they are int8 again where the model is compiled."""
    for node in model.get_ordered_ops():
        weights = (
            node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8 and node.data.ndim > 1
        )
        if weights and fits_in_four_bits(node.data):
            packed = openvino.opset13.constant(node.data, dtype=openvino.Type.i4)
            node.output(0).replace(openvino.opset13.convert(packed, "i8").output(0))


class OpenVinoModel:
    """Features (B, D) float32 of preprocessed images (B, 3, S, S) float32, by OpenVINO on the CPU.

    What is not integer is computed in float32: left to itself, OpenVINO takes bfloat16 on some CPUs.
    """

    def __init__(self, model: Path | bytes, threads: int | None = None, precision: str = "f32") -> None:
        openvino = require("openvino")
        core = openvino.Core()
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision}
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            self.compiled = core.compile_model(core.read_model(model), "CPU", options)
        except RuntimeError as error:
            raise unreadable(model, error) from error

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the features."""
        return self.compiled(np.ascontiguousarray(images))[0].copy()

    def integer_products(self) -> tuple[int, int]:
        """Return how many products with weights run, and how many of them in integers, in the runtime's own graph."""
        every = integers = 0
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            facts = node.get_rt_info()
            if str(facts["layerType"].value) in ("FullyConnected", "Convolution"):
                every += 1
                integers += str(facts["runtimePrecision"].value) in ("u8", "i8")
        return every, integers


def part(models: LayerModels, name: str) -> Part:
    """Return a layer of the ONNX model as OpenVINO runs it."""
    layer = OpenVinoModel(models.output(name))
    return Part(layer, OpenVinoModel(models.codes(name)), layer.integer_products() == (1, 1))
