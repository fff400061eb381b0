"""Changes of an exported ONNX graph, so that the runtime which is to run it multiplies integers and computes what is meant."""

from __future__ import annotations

from typing import Any

import numpy as np

from qatlab.core.extras import require

SHIFT = 128  # the uint8 code of a weight is its int8 code plus this number


def pack(graph: Any) -> None:
    """Store weights whose codes fit in four bits as INT4, in half the bytes."""
    onnx, ml_dtypes = require("onnx"), require("ml_dtypes")
    casts = []
    for tensor in [tensor for tensor in graph.initializer if tensor.name.endswith(".codes")]:
        codes = onnx.numpy_helper.to_array(tensor)
        if fits_in_four_bits(codes):
            packed = onnx.numpy_helper.from_array(codes.astype(ml_dtypes.int4), f"{tensor.name}.int4")
            # Runtimes multiply int8, so a node unpacks the weight when the model is opened.
            casts.append(onnx.helper.make_node("Cast", [packed.name], [tensor.name], to=onnx.TensorProto.INT8))
            graph.initializer.remove(tensor)
            graph.initializer.append(packed)
    # ONNX requires that a node stands after the nodes whose outputs it reads, so the casts are put first.
    _set_nodes(graph, [*casts, *graph.node])


def fits_in_four_bits(codes: np.ndarray) -> bool:
    """Return whether all of the int8 ``codes``, of any shape, fit in int4."""
    return bool(codes.min() >= -8 and codes.max() <= 7)


def shift(graph: Any, names: set[str]) -> None:
    """Store the int8 weights of ``names`` as uint8 codes that are 128 larger, with 128 as their zero point."""
    onnx = require("onnx")
    tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.name.removeprefix("visual.") in names}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and (tensor := tensors.get(node.input[0])) is not None:
            # The sum is made in int16, because int8 cannot hold 128.
            codes = onnx.numpy_helper.to_array(tensor).astype(np.int16) + SHIFT
            tensor.CopyFrom(onnx.numpy_helper.from_array(codes.astype(np.uint8), tensor.name))
            node.input[2] = f"{tensor.name}.zero"
            zeros = np.full(len(codes), SHIFT, np.uint8)
            graph.initializer.append(onnx.numpy_helper.from_array(zeros, node.input[2]))
    _drop_unused(graph)


def multiply_convolutions(graph: Any) -> None:
    """Put ConvInteger, a cast, and the scales in the place of each convolution of dequantized codes.

    ONNX Runtime makes an integer product of a convolution only where its output is rounded too (QLinearConv), which would
    be another model. ConvInteger adds the products of the codes in int32, and the scales are multiplied afterwards.
    """
    makers = {value: node for node in graph.node for value in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    for node in graph.node:
        sources = [makers.get(value) for value in node.input[:2]]
        integer = node.op_type == "Conv" and all(of is not None and of.op_type == "DequantizeLinear" for of in sources)
        nodes += _of_integers(graph, constants, node, *sources) if integer else [node]
    used = {value for node in nodes for value in node.input}
    # A dequantization that only the convolution read is left over.
    _set_nodes(graph, [node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in used])
    _drop_unused(graph)


def _of_integers(graph: Any, constants: dict[str, Any], convolution: Any, act: Any, weight: Any) -> list[Any]:
    """Return the nodes that compute a convolution from the codes which ``act`` and ``weight`` dequantize."""
    onnx = require("onnx")
    result = convolution.output[0]

    def constant(part: str, values: np.ndarray) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(values, f"{result}.{part}"))
        return f"{result}.{part}"

    def array(name: str) -> np.ndarray:
        return onnx.numpy_helper.to_array(constants[name])

    # All channels have one zero point: 0 of int8 codes, 128 of the codes that ``shift`` made.
    zero = constant("zero", array(weight.input[2]).reshape(-1)[0])
    scales = array(act.input[1]) * array(weight.input[1])
    scale = constant("scale", scales.astype(np.float32).reshape(-1, 1, 1))
    sums, floats, product = f"{result}.sums", f"{result}.floats", f"{result}.product"
    inputs = [act.input[0], weight.input[0], act.input[2], zero]
    made = [
        onnx.helper.make_node("ConvInteger", inputs, [sums]),
        onnx.helper.make_node("Cast", [sums], [floats], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Mul", [floats, scale], [result]),
    ]
    made[0].attribute.extend(convolution.attribute)
    if len(convolution.input) > 2:
        bias = constant("bias", array(convolution.input[2]).reshape(-1, 1, 1))
        made[-1].output[0] = product
        made.append(onnx.helper.make_node("Add", [product, bias], [result]))
    for node in made:  # the layer to which a node belongs stands in its metadata
        node.metadata_props.extend(convolution.metadata_props)
    return made


def add_biases_apart(graph: Any) -> None:
    """Let a node of its own add the bias of each product of two matrices.

    ONNX Runtime makes no integer product of a Gemm with a bias in floats, and a bias rounded to integers is another one.
    """
    nodes: list[Any] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Gemm" and len(node.input) > 2:
            bias = node.input[2]
            del node.input[2]
            nodes.append(_behind(node, "product", "Add", bias))
    _set_nodes(graph, nodes)


def drop_weight_zeros(graph: Any) -> None:
    """Take the zero points, which are all 0, from the dequantizations of weights.

    Where a model has integer convolutions, OpenVINO 2026.4 takes a zero point of weights, even of 0, for one that it
    cannot take out of a product, and multiplies floats in half of the layers.
    """
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0].endswith(".codes"):
            del node.input[2:]
    _drop_unused(graph)


def keep_averaged_axes(graph: Any) -> None:
    """Let every average keep the axes over which it goes, with a length of 1, and drop them in a node of its own.

    OpenVINO 2026.4 fuses the rounding of an average into the average itself. Behind a norm the rounding has a step for
    each channel there, and where the average drops an axis the steps go to the wrong channels: the features are 0.3 off.
    """
    nodes: list[Any] = []
    for node in graph.node:
        nodes.append(node)
        kept = [attribute for attribute in node.attribute if attribute.name == "keepdims"]
        if node.op_type == "ReduceMean" and kept and kept[0].i == 0:
            kept[0].i = 1
            nodes.append(_behind(node, "kept", "Squeeze", node.input[1]))
    _set_nodes(graph, nodes)


def bound_convolutions(graph: Any) -> None:
    """Clip the output of every convolution at the largest floats, which changes no value that a model computes.

    OpenVINO 2026.4 moves the scale of an integer convolution behind the sum with a residual stream, divides the stream by
    it, and then multiplies before it adds: blocks are 0.5 to 1 off. It moves no scale of several channels past a clip.
    """
    onnx = require("onnx")
    end = np.array(np.finfo(np.float32).max, np.float32)
    ends = {"lowest": -end, "highest": end}
    nodes: list[Any] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Conv":
            nodes.append(_behind(node, "unbounded", "Clip", *ends))
    if len(nodes) > len(graph.node):
        graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in ends.items())
        _set_nodes(graph, nodes)


def _behind(node: Any, part: str, kind: str, *inputs: str) -> Any:
    """Return a node that reads the output of ``node``, which is called <output>.<part> from now on, and takes over its name.

    ``kind`` is the operator, ``inputs`` are what it reads besides. It belongs to the same layer.
    """
    result = node.output[0]
    node.output[0] = f"{result}.{part}"
    behind = require("onnx").helper.make_node(kind, [node.output[0], *inputs], [result])
    behind.metadata_props.extend(node.metadata_props)
    return behind


def _set_nodes(graph: Any, nodes: list[Any]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)


def _drop_unused(graph: Any) -> None:
    """Remove the constants that no node reads any more."""
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
