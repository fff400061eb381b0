"""Every format gives back what was exported, in integers, for any number of images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from encoders import encoder_of, made
from scipy.special import softmax

from qatlab.core.errors import UserError
from qatlab.core.extras import require
from qatlab.deploy.formats import inductor as torch_format
from qatlab.deploy.formats import onnx as onnx_format
from qatlab.deploy.formats import openvino as openvino_format
from qatlab.deploy.integer import Classifier, integer_copy, integer_layers
from qatlab.deploy.parity import LIMIT, Part, compare_layers
from qatlab.quant import quant_layers

QUICK = ("absmax", "zero point", "lsq", "outliers")
METHODS = ["absmax", "zero point", "lsq", "lsq_plus", "lr_qat", "four bits", "rotation", "outliers", "outliers, moved"]
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METHODS]


@cache
def written(name: str) -> tuple[Any, Any, bytes]:
    """An encoder, its integer form and the content of its file, made once for all tests: most of their time is tracing."""
    simulated = encoder_of(name)
    integer = integer_copy(simulated)
    with TemporaryDirectory() as folder:
        return simulated, integer, onnx_format.write(integer, Path(folder), 16).read_bytes()


def exported(name: str, folder: Path) -> tuple[Any, Any, Path]:
    simulated, integer, content = written(name)
    path = folder / "model.onnx"
    path.write_bytes(content)
    return simulated, integer, path


def close(found: np.ndarray, simulated: Any, images: torch.Tensor) -> None:
    with torch.no_grad():
        reference = simulated(images)
    assert found.shape == reference.shape
    assert found.dtype == np.float32
    assert np.linalg.norm(found - reference.numpy()) <= 2e-2 * float(reference.norm())


@pytest.mark.parametrize("name", EACH)
def test_onnx_and_openvino_run_every_layer_in_integers(name: str, tmp_path: Path) -> None:
    simulated, integer, path = exported(name, tmp_path)
    layers = len(integer_layers(integer))
    model = onnx_format.OnnxModel(path, 1)
    assert onnx_format.integer_products(path) == layers == 8
    served = openvino_format.OpenVinoModel(openvino_format.write(path, tmp_path), 1)
    assert served.integer_products()[1] == layers
    for n in (1, 5):
        close(model(made(n).numpy()), simulated, made(n))
        close(served(made(n).numpy()), simulated, made(n))


@pytest.mark.parametrize("name", EACH)
def test_layer_by_layer_they_are_the_simulation(name: str, tmp_path: Path) -> None:
    simulated, integer, path = exported(name, tmp_path)
    models = onnx_format.LayerModels(path, integer)

    for part in (models.part, partial(openvino_format.part, models)):
        found = compare_layers(simulated, made(16), part)
        assert [layer.layer for layer in found] == list(integer_layers(integer))
        assert all(layer.integer and layer.product_error <= 1e-6 and layer.mismatch <= 1e-3 for layer in found)


def test_outlier_channels_are_floats_beside_the_integer_product(tmp_path: Path) -> None:
    simulated, integer, path = exported("outliers", tmp_path)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    for name, layer in quant_layers(simulated).items():
        if "mlp" in name:
            # Runtimes see no code of these columns, so that their inputs may be cut off.
            assert not weights[f"{name}.codes"][:, layer.outliers.channels].any()
    models = onnx_format.LayerModels(path, integer)
    for part in (models.part, partial(openvino_format.part, models)):
        found = compare_layers(simulated, made(4), part)
        assert {layer.layer: layer.outlier_channels for layer in found} == {
            name: 2 if "mlp" in name else 0 for name in integer_layers(integer)
        }
        assert all(layer.passed for layer in found)


def test_a_layer_in_floats_beside_outlier_channels_is_found(tmp_path: Path) -> None:
    """The side product is no layer, but a layer whose rounding is gone counts as one that is not in integers."""
    _, integer, _ = exported("outliers", tmp_path)
    integer = copy.deepcopy(integer)
    for layer in integer_layers(integer).values():
        layer.forward = partial(_in_floats, layer)
    path = onnx_format.write(integer, tmp_path, 16)
    served = openvino_format.OpenVinoModel(openvino_format.write(path, tmp_path), 1)
    assert served.integer_products() == (9, 0)  # and the projection to the features


def _in_floats(layer: Any, x: torch.Tensor) -> torch.Tensor:
    y = layer.shell.compute(x, layer.codes.float() * layer.scales.reshape(-1, 1))
    return y if layer.outliers is None else y + layer.outliers(x)


def test_a_layer_that_computes_something_else_is_found(tmp_path: Path) -> None:
    """Parity is worth something: a scale that is off by a thousandth, or one code, fails it."""
    simulated, integer, path = exported("absmax", tmp_path)
    models = onnx_format.LayerModels(path, integer)

    def part(layer: str) -> Part:
        exact, codes = onnx_format.OnnxModel(models.output(layer)), onnx_format.OnnxModel(models.codes(layer))
        if "c_fc" in layer:
            return Part(lambda x: exact(x) * np.float32(1.001), codes, True)
        if "c_proj" in layer:
            return Part(exact, lambda x: codes(x) + (np.arange(x.shape[-1]) == 0).astype(np.uint8), True)
        return Part(exact, codes, "in_proj" not in layer)

    passed = {layer.layer: layer.passed for layer in compare_layers(simulated, made(4), part)}
    assert {name for name, fine in passed.items() if fine} == {name for name in passed if "out_proj" in name}
    assert LIMIT == 1e-4


def test_the_file_holds_int8_weights_per_channel_in_opset_21(tmp_path: Path) -> None:
    _, integer, path = exported("absmax", tmp_path)
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 21)]
    weights = {tensor.name: tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    for name, layer in integer_layers(integer).items():
        stored = onnx.numpy_helper.to_array(weights[f"{name}.codes"])
        assert np.array_equal(stored, layer.codes.numpy())
    nodes = [node.op_type for node in graph.graph.node]
    assert nodes.count("QuantizeLinear") == 8
    assert nodes.count("DequantizeLinear") == 16


def test_four_bit_weights_take_four_bits(tmp_path: Path) -> None:
    """Two to a byte in the files of both formats; the runtimes unpack them and multiply integers."""
    _, integer, path = exported("lr_qat", tmp_path)
    weights = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    for name, layer in integer_layers(integer).items():
        packed = weights[f"{name}.codes.int4"]
        assert packed.data_type == onnx.TensorProto.INT4
        assert len(packed.raw_data) == layer.codes.numel() // 2
        assert np.array_equal(onnx.numpy_helper.to_array(packed).astype(np.int8), layer.codes.numpy())
    sizes = []
    for name in ("absmax", "lr_qat"):
        folder = tmp_path / name
        folder.mkdir()
        openvino_format.write(exported(name, folder)[2], folder)
        sizes.append((folder / "model.bin").stat().st_size)
    assert sizes[0] - sizes[1] == sum(layer.codes.numel() for layer in integer_layers(integer).values()) // 2


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN, whose int8 products inductor calls")
def test_torch_runs_every_layer_in_integers(tmp_path: Path) -> None:
    simulated = encoder_of("absmax")
    integer = integer_copy(simulated)
    path = torch_format.write(integer, tmp_path, 16)
    model = torch_format.TorchModel(path)
    assert torch_format.integer_products(model, made(3).numpy()) == 8
    for n in (3, 6):
        close(model(made(n).numpy()), simulated, made(n))


def test_probabilities_are_a_second_output(tmp_path: Path) -> None:
    simulated = encoder_of("absmax")
    classes = torch.nn.functional.normalize(torch.randn(7, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    model = Classifier(integer_copy(simulated), classes, 20.0).eval()
    path = onnx_format.write(model, tmp_path, 16)
    plain = onnx_format.OnnxModel(path, 1)
    features, probabilities = plain.session.run(None, {"images": made(3).numpy()})
    logits = 20 * features @ classes.numpy().T / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, softmax(logits, axis=1), atol=1e-5)
    close(plain(made(3).numpy()), simulated, made(3))
    close(openvino_format.OpenVinoModel(openvino_format.write(path, tmp_path), 1)(made(3).numpy()), simulated, made(3))
    models = onnx_format.LayerModels(path, model)
    assert list(models.inside) == list(integer_layers(model)) == list(integer_layers(integer_copy(simulated)))


@pytest.mark.parametrize("opener", [onnx_format.OnnxModel, openvino_format.OpenVinoModel])
def test_a_file_cut_short_is_named(opener: Callable[[Path], Any], tmp_path: Path) -> None:
    _, _, path = exported("absmax", tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(
        UserError, match=r"model\.onnx cannot be run \(.*\): it is cut short, or made for another runtime"
    ):
        opener(path)


def test_an_opset_that_the_runtime_does_not_know_is_told(tmp_path: Path) -> None:
    _, _, path = exported("absmax", tmp_path)
    graph = onnx.load(path)
    graph.opset_import[0].version = 999
    onnx.save(graph, path)
    with pytest.raises(UserError, match=r"cannot be run \(.*999.*\)"):
        onnx_format.OnnxModel(path)


def test_a_runtime_that_is_not_installed_is_told() -> None:
    with pytest.raises(UserError, match=r"no_such_runtime is not installed.*pip install 'qatlab\[deploy\]'"):
        require("no_such_runtime")
