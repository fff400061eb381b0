"""ONNX with quantize and dequantize nodes, and ONNX Runtime that runs it."""

from __future__ import annotations

import ast
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qatlab.core.errors import UserError
from qatlab.core.extras import require
from qatlab.deploy.formats import graphs

if TYPE_CHECKING:  # opening an export must not need torch
    from torch import nn

    from qatlab.deploy.parity import Part

OPSET = 21  # the first opset with INT4 tensors
# Names of the graph's inputs and outputs, which users of the file pass to a runtime.
INPUT, OUTPUTS = "images", ("features", "probabilities")
FILE = "model.onnx"
# The key under which torch's exporter stores the module that a node came from.
_SCOPES = "pkg.torch.onnx.name_scopes"
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvInteger")
INTEGER_OPS = (
    "QLinearMatMul",
    "QGemm",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "QLinearConv",
    "ConvInteger",
)
"""The operators of integer products in ONNX Runtime's graph."""


def write(model: nn.Module, folder: Path, size: int, exact: bool = False) -> Path:
    """Return the file that an ``integer_copy`` was written to for ONNX Runtime: opset 21, int8 weights, any number of images.

    Weights of at most four bits are stored as INT4, two to a byte, and become int8 when the model is opened. ``exact``
    stores the weights whose products a CPU without VNNI would cut off as uint8 with the zero point 128; those products
    are added in 32 bits. Raises UserError where onnx or onnxscript is not installed.
    """
    from qatlab.deploy.saturation import wide_layers

    traced = trace(model, size)
    graphs.pack(traced.graph)
    if exact:
        graphs.shift(traced.graph, {f"{name}.codes" for name in wide_layers(model)})
    graphs.multiply_convolutions(traced.graph)
    graphs.add_biases_apart(traced.graph)
    (folder / FILE).write_bytes(traced.SerializeToString())
    return folder / FILE


def trace(model: nn.Module, size: int) -> Any:
    """Return an ``integer_copy`` as an ONNX model of opset 21 that quantizes, dequantizes and multiplies floats.

    The value that a block gives is named as the block is. Raises UserError where onnx or onnxscript is not installed.
    """
    require("onnx", "onnxscript")
    import torch

    from qatlab.deploy.blocks import with_blocks
    from qatlab.deploy.integer import Classifier

    images = torch.zeros(2, 3, size, size)  # two images, because torch.export takes a size of one for a constant
    outputs = list(OUTPUTS) if isinstance(model, Classifier) else [OUTPUTS[0]]
    with warnings.catch_warnings(), with_blocks(model, images) as blocks:
        warnings.simplefilter("ignore")  # torch.export warns of changes of its own, on which no user can act
        program: Any = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            dynamic_shapes=({0: "batch"},),
            input_names=[INPUT],
            output_names=[*outputs, *blocks],
        )
    traced = program.model_proto
    # As outputs the blocks got their names. What is served has the outputs alone that were asked for.
    traced.graph.value_info.extend(traced.graph.output[len(outputs) :])
    del traced.graph.output[len(outputs) :]
    return traced


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
        except Exception as error:  # onnxruntime's errors have no other common class
            raise unreadable(model, error) from error

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the features (B, D) float32 of ``images`` (B, 3, S, S) float32; probabilities are left out."""
        first, given = self.session.get_outputs()[0], self.session.get_inputs()[0]
        (features,) = self.session.run([first.name], {given.name: images})
        return features


def unreadable(model: Path | bytes, error: Exception) -> UserError:
    """Return the UserError for a model that a runtime refuses, with the runtime's reason and a remedy."""
    reason = " ".join(str(error).replace(str(model), "it").split())[:600]
    return UserError(
        f"{'a layer' if isinstance(model, bytes) else model} cannot be run ({reason}): it is cut short, or made for "
        "another runtime; export it again with `python -m qatlab.export`."
    )


def integer_products(path: Path) -> int:
    """Return how many integer products ONNX Runtime makes of a model, counted in the graph that it runs."""
    onnx, runtime = require("onnx"), require("onnxruntime")
    # ONNX Runtime shows the graph that it runs only by writing it to a file.
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / FILE)
        options.log_severity_level = 3  # errors only, because ONNX Runtime would warn that the file is for this machine
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return sum(node.op_type in INTEGER_OPS for node in onnx.load(options.optimized_model_filepath).graph.node)


def block_outputs(file: Path, names: Sequence[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """Return what the blocks ``names`` of a model in ``file`` give in ONNX Runtime's graph for ``images`` (B, 3, S, S)."""
    onnx = require("onnx")
    model = onnx.load(file)
    known = {value.name: value for value in [*model.graph.value_info, *model.graph.output]}
    model.graph.output.extend(known[name] for name in names)
    session = OnnxModel(model.SerializeToString()).session
    return dict(zip(names, session.run([*names], {INPUT: images}), strict=True))


class LayerModels:
    """Each integer layer of ``model``, cut out of the exported graph as an ONNX model of its own."""

    def __init__(self, path: Path, model: nn.Module) -> None:
        from qatlab.deploy.integer import IntegerLayer

        onnx = require("onnx")
        self.path, graph = path, onnx.load(path)
        self.extractor, self.nodes = onnx.utils.Extractor(graph), graph.graph.node
        self.known = {tensor.name for tensor in graph.graph.initializer}
        # Weights, and tensors that nodes compute from weights alone
        # (such as weights unpacked from INT4), are no input of a layer.
        for node in self.nodes:
            if {*node.input} <= self.known:
                self.known |= {*node.output}
        paths = {path: of.name for path, of in model.named_modules() if isinstance(of, IntegerLayer)}
        self.inside: dict[str, list[Any]] = {name: [] for name in paths.values()}
        for node in self.nodes:
            for scope in _scopes(node):
                if scope in paths:
                    self.inside[paths[scope]].append(node)
        self.made = {name: _from_product(nodes) for name, nodes in self.inside.items()}
        self.rounding = {
            value: node
            for name, nodes in self.inside.items()
            for node in nodes
            for value in node.output
            if value not in self.made[name]
        }

    def part(self, name: str) -> Part:
        """Return a layer as ONNX Runtime runs it.

        The layer counts as one in integers here; the graph of the whole model tells how many layers really are.
        """
        from qatlab.deploy.parity import Part

        return Part(OnnxModel(self.output(name)), OnnxModel(self.codes(name)), True)

    def write(self, name: str, x: np.ndarray, path: Path) -> None:
        """Write the layer ``name`` as a model of its own to ``path``, for inputs (..., K) like ``x`` of any size."""
        path.write_bytes(self.output(name))

    def output(self, name: str) -> bytes:
        """Return the ONNX model of a layer, from its input to its output."""
        # The layer's output is the value that its product makes and a node
        # outside reads. Nodes are known by id, because a node cannot be hashed.
        mine = {id(node) for node in self.inside[name]}
        used = {value for node in self.nodes if id(node) not in mine for value in node.input} | {*OUTPUTS}
        return self._cut(name, self.made[name] & used)

    def codes(self, name: str) -> bytes:
        """Return the ONNX model of a layer's rounding, from its input to the codes of its input."""
        _, rounding = self._sources(name, self.made[name])
        return self._cut(name, {node.output[0] for node in rounding if node.op_type == "QuantizeLinear"})

    def _sources(self, name: str, results: set[str]) -> tuple[set[str], list[Any]]:
        """Return the values from outside that ``results`` of a layer are computed from, and the nodes that round them."""
        products = {value: node for node in self.inside[name] for value in node.output if value in self.made[name]}
        given, rounding = set[str](), list[Any]()
        pending = [*results]
        seen = {*results, ""} | self.known
        while pending:
            value = pending.pop()
            # Layers that round one input alike, as queries and keys do, share the nodes, which belong to the first of
            # them: so the rounding of every layer is gone through.
            node = products.get(value) or self.rounding.get(value)
            if node is None:
                given.add(value)
                continue
            if value in self.rounding:
                rounding.append(node)
            pending += [each for each in node.input if each not in seen]
            seen |= {*node.input}
        return given, rounding

    def _cut(self, name: str, results: set[str]) -> bytes:
        given, _ = self._sources(name, results)
        if results and not given:
            raise UserError(
                f"'{name}' reads a constant and not the image, so a runtime multiplies it once and keeps floats: leave it in "
                f"full precision with '+quant.rules={{{name}: null}}'."
            )
        # A linear layer or convolution has one input and one output.
        if len(given) != 1 or len(results) != 1:
            raise UserError(
                f"'{name}' cannot be told apart in {self.path}, so its parity cannot be measured: this release of torch "
                "or onnxscript names nodes otherwise."
            )
        return self.extractor.extract_model([*given], [*results]).SerializeToString()


def _from_product(nodes: list[Any]) -> set[str]:
    """Return the values that the product of a layer makes, or that its nodes compute from the product."""
    made: set[str] = set()
    for node in nodes:  # a node stands after those whose values it reads
        if node.op_type in _PRODUCTS or made & {*node.input}:
            made |= {*node.output}
    return made


def _scopes(node: Any) -> list[str]:
    """Return the names of the modules around a node, the outermost first."""
    # The exporter stores the names as text: a Python list.
    texts = [entry.value for entry in node.metadata_props if entry.key == _SCOPES]
    return ast.literal_eval(texts[0]) if texts else []
