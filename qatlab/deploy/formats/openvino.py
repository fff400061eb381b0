"""OpenVINO's intermediate representation, made of the ONNX model, and its runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qatlab.core.extras import require
from qatlab.deploy.formats import graphs
from qatlab.deploy.formats.onnx import LayerModels, trace, unreadable

if TYPE_CHECKING:  # opening an export must not need torch
    from torch import nn

    from qatlab.deploy.parity import Part

FILE = "model.xml"
_BYTES = ("u8", "i8")


def source(model: nn.Module, folder: Path, size: int) -> Path:
    """Return the ONNX file, written to ``folder``, that ``write`` makes a model for OpenVINO of an ``integer_copy`` of."""
    traced = trace(model, size)
    graphs.drop_weight_zeros(traced.graph)
    graphs.keep_averaged_axes(traced.graph)
    graphs.bound_convolutions(traced.graph)
    path = folder / "source.onnx"
    path.write_bytes(traced.SerializeToString())
    return path


def write(onnx_file: Path, folder: Path) -> Path:
    """Return the file to which the ONNX model was written as IR, with its weights in a .bin file beside it."""
    openvino = require("openvino", "openvino.opset13")
    model = openvino.convert_model(onnx_file)
    _pack(openvino, model)
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)  # fp16 would round scales and biases
    return folder / FILE


def _pack(openvino: Any, model: Any) -> None:
    """Store weights that fit in four bits as i4; a node of the graph turns them into int8 again."""
    for node in model.get_ordered_ops():
        weights = (
            node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8 and node.data.ndim > 1
        )
        # Constants of one dimension are zero points, which are too small to matter.
        if weights and graphs.fits_in_four_bits(node.data):
            packed = openvino.opset13.constant(node.data, dtype=openvino.Type.i4)
            unpacked = openvino.opset13.convert(packed, "i8")
            unpacked.set_friendly_name(node.get_friendly_name())  # by which a running layer is known
            node.output(0).replace(unpacked.output(0))


class OpenVinoModel:
    """Features (B, D) float32 of preprocessed images (B, 3, S, S) float32, by OpenVINO on the CPU.

    Everything that is not integer is computed in float32, because OpenVINO takes bfloat16 on some CPUs by default.
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
        """Return the features (B, D) float32 of ``images`` (B, 3, S, S) float32."""
        # The result is copied, because the next call may write to the same memory.
        return self.compiled(np.ascontiguousarray(images))[0].copy()

    def integer_products(self) -> tuple[int, int]:
        """Return how many layers with weights run, and how many of them in integers, in the runtime's own graph.

        The runtime may split a layer into several products, which then have the weight of one layer; it is a layer of integers
        where all of them are. Outlier channels, whose product in floats stands beside that of their layer, are no layer.
        """
        layers: dict[str, bool] = {}
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            facts = node.get_rt_info()
            if str(facts["layerType"].value) in ("FullyConnected", "Convolution"):
                weight = node.input(1).get_source_output().get_node().get_friendly_name()
                # runtimePrecision alone does not show an integer product: for float inputs
                # and int8 weights OpenVINO reports i8 or u8 too, although it unpacks the
                # weights and multiplies floats. The input must be of bytes as well.
                given = str(node.input(0).get_element_type().to_string())
                integer = str(facts["runtimePrecision"].value) in _BYTES and given in _BYTES
                if not integer and _is_gathered(node):
                    continue
                layers[weight] = layers.get(weight, True) and integer
        return len(layers), sum(layers.values())


def _is_gathered(node: Any) -> bool:
    """Return whether a product of the running graph multiplies some channels that were gathered from a layer's input."""
    # The constants of such a product have no names of their own. A layer that a runtime computes in floats reads the layer's
    # input itself, so it is not taken for one.
    source = node.input(0).get_source_output().get_node()
    return str(source.get_rt_info()["layerType"].value) == "Gather"


def block_outputs(file: Path, names: Sequence[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """Return what the blocks ``names`` of a model in ``file`` give in OpenVINO's running graph for ``images`` (B, 3, S, S).

    A block is left out if the file has no tensor of its name: a reshape at the end of a block, as in Swin, is merged with the
    reshape that follows it when the model is converted.
    """
    openvino = require("openvino")
    core = openvino.Core()
    model = core.read_model(file)
    known = {name for node in model.get_ops() for output in node.outputs() for name in output.get_names()}
    kept = [name for name in names if name in known]
    model.add_outputs(kept)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(np.ascontiguousarray(images))
    return {name: found[compiled.output(name)].copy() for name in kept}


def part(models: LayerModels, name: str) -> Part:
    """Return a layer of the ONNX model as OpenVINO runs it."""
    from qatlab.deploy.parity import Part

    # OpenVINO also opens ONNX models, so the layer is cut out of the ONNX graph that the IR was made of.
    layer = OpenVinoModel(models.output(name))
    return Part(layer, OpenVinoModel(models.codes(name)), layer.integer_products() == (1, 1))
