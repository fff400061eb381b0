"""ONNX with quantize and dequantize nodes, and ONNX Runtime that runs it."""

from __future__ import annotations

import ast
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qatlab.deploy.extras import require
from qatlab.deploy.integer import Classifier, IntegerLayer
from qatlab.deploy.parity import Part
from qatlab.errors import UserError

OPSET = 21
INPUT, OUTPUTS = "images", ("features", "probabilities")
FILE = "model.onnx"
_SCOPES = "pkg.torch.onnx.name_scopes"
INTEGER_OPS = (
    "QLinearMatMul",
    "QGemm",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "QLinearConv",
)
"""What ONNX Runtime's graph calls a product of integers."""


def write(model: nn.Module, folder: Path, size: int) -> Path:
    """Return the file that an ``integer_copy`` was written to: opset 21, weights int8 per channel, any number of images.

    Weights of at most four bits are stored as INT4, two to a byte, and become int8 when the model is opened. Raises
    UserError where onnx or onnxscript are not installed.
    """
    require("onnx", "onnxscript")
    images = torch.zeros(2, 3, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export about itself
        program: Any = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            dynamic_shapes=({0: "batch"},),
            input_names=[INPUT],
            output_names=list(OUTPUTS) if isinstance(model, Classifier) else [OUTPUTS[0]],
        )
    packed = _packed(program.model_proto)
    (folder / FILE).write_bytes(packed.SerializeToString())
    return folder / FILE


def _packed(model: Any) -> Any:
    """Return ``model`` with the weights that fit in four bits in four."""
    onnx, ml_dtypes = require("onnx"), require("ml_dtypes")
    graph, casts = model.graph, []
    for tensor in [tensor for tensor in graph.initializer if tensor.name.endswith(".codes")]:
        codes = onnx.numpy_helper.to_array(tensor)
        if fits_in_four_bits(codes):
            packed = onnx.numpy_helper.from_array(codes.astype(ml_dtypes.int4), f"{tensor.name}.int4")
            casts.append(onnx.helper.make_node("Cast", [packed.name], [tensor.name], to=onnx.TensorProto.INT8))
            graph.initializer.remove(tensor)
            graph.initializer.append(packed)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def fits_in_four_bits(codes: np.ndarray) -> bool:
    """Return whether int8 codes are all ones that int4 has."""
    return bool(codes.min() >= -8 and codes.max() <= 7)


class OnnxModel:
    """Features (B, D) float32 of preprocessed images (B, 3, S, S) float32, by ONNX Runtime on the CPU."""

    def __init__(self, model: Path | bytes, threads: int | None = None) -> None:
        runtime = require("onnxruntime")
        options = runtime.SessionOptions()
        if threads:
            options.intra_op_num_threads = threads
        given = model if isinstance(model, bytes) else str(model)
        try:
            self.session = runtime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes share no other base
            raise unreadable(model, error) from error

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the features."""
        first, given = self.session.get_outputs()[0], self.session.get_inputs()[0]
        (features,) = self.session.run([first.name], {given.name: images})
        return features


def unreadable(model: Path | bytes, error: Exception) -> UserError:
    """Return what a runtime's refusal of a model means."""
    reason = " ".join(str(error).replace(str(model), "it").split())[:600]
    return UserError(
        f"{'a layer' if isinstance(model, bytes) else model} cannot be run ({reason}): it is cut short, or made for "
        "another runtime; export it again with `python -m qatlab.export`."
    )


def integer_products(path: Path) -> int:
    """Return how many products of integers ONNX Runtime makes of a model, counted in its own graph."""
    onnx, runtime = require("onnx"), require("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / FILE)
        options.log_severity_level = 3  # it warns that such a file is for this machine alone
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return sum(node.op_type in INTEGER_OPS for node in onnx.load(options.optimized_model_filepath).graph.node)


class LayerModels:
    """Each integer layer of ``model`` cut out of the graph it was exported to, as ONNX models of their own."""

    def __init__(self, path: Path, model: nn.Module) -> None:
        onnx = require("onnx")
        self.path, graph = path, onnx.load(path)
        self.extractor, self.nodes = onnx.utils.Extractor(graph), graph.graph.node
        self.known = {tensor.name for tensor in graph.graph.initializer}
        for node in self.nodes:  # constants, and weights unpacked
            if {*node.input} <= self.known:
                self.known |= {*node.output}
        paths = {path: of.name for path, of in model.named_modules() if isinstance(of, IntegerLayer)}
        self.inside: dict[str, list[Any]] = {name: [] for name in paths.values()}
        for node in self.nodes:
            for scope in _scopes(node):
                if scope in paths:
                    self.inside[paths[scope]].append(node)

    def part(self, name: str) -> Part:
        """Return a layer as ONNX Runtime runs it; which are products of integers is counted in the whole graph."""
        return Part(OnnxModel(self.output(name)), OnnxModel(self.codes(name)), True)

    def output(self, name: str) -> bytes:
        """Return the model of a layer: its input to its output."""
        nodes = self.inside[name]
        mine = {id(node) for node in nodes}
        made = {value for node in nodes for value in node.output}
        used = {value for node in self.nodes if id(node) not in mine for value in node.input} | {*OUTPUTS}
        return self._cut(name, made & used)

    def codes(self, name: str) -> bytes:
        """Return the model of a layer's rounding: its input to its input's codes."""
        return self._cut(name, {node.output[0] for node in self.inside[name] if node.op_type == "QuantizeLinear"})

    def _cut(self, name: str, results: set[str]) -> bytes:
        nodes = self.inside[name]
        made = {value for node in nodes for value in node.output}
        given = {value for node in nodes for value in node.input if value} - made - self.known
        if len(given) != 1 or len(results) != 1:
            raise UserError(
                f"'{name}' cannot be told apart in {self.path}, so its parity cannot be measured: this release of torch "
                "or onnxscript names nodes otherwise."
            )
        return self.extractor.extract_model([*given], [*results]).SerializeToString()


def _scopes(node: Any) -> list[str]:
    texts = [entry.value for entry in node.metadata_props if entry.key == _SCOPES]
    return ast.literal_eval(texts[0]) if texts else []
