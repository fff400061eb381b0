"""Every family is exported whole: all products of integers, each layer the simulation's, and each block in the running graph."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from families import FAMILIES, images, quantized
from torch import nn

from qatlab.deploy.formats import graphs
from qatlab.deploy.formats import onnx as onnx_format
from qatlab.deploy.formats import openvino as openvino_format
from qatlab.deploy.integer import integer_copy, integer_layers
from qatlab.deploy.parity import FEATURES, compare_blocks, compare_layers
from qatlab.quant import MinMax, calibrate, quantize

QUICK = ("vit", "convnext")
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("name", EACH)
def test_every_product_is_one_of_integers_and_every_layer_and_block_the_simulations(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(name).eval()
    integer, seen = integer_copy(model), images(model)
    layers = len(integer_layers(integer))
    assert layers >= 10
    # The graph is traced once for both runtimes: what torch exports takes most of the time.
    traced = onnx_format.trace(integer, seen.shape[-1]).SerializeToString()
    for module in (onnx_format, openvino_format):
        monkeypatch.setattr(module, "trace", lambda *_: onnx.load_from_string(traced))

    file = onnx_format.write(integer, tmp_path, seen.shape[-1])
    assert onnx_format.integer_products(file) == layers
    layer = onnx_format.LayerModels(file, integer).part
    require_parity(model, seen, onnx_format.OnnxModel(file, 1), layer, partial(onnx_format.block_outputs, file))

    source = openvino_format.source(integer, tmp_path, seen.shape[-1])
    served = openvino_format.OpenVinoModel(openvino_format.write(source, tmp_path), 1)
    assert served.integer_products() == (layers, layers)  # a layer that is split, as in pools, counts once
    part = partial(openvino_format.part, onnx_format.LayerModels(source, integer))
    require_parity(model, seen, served, part, partial(openvino_format.block_outputs, tmp_path / "model.xml"))


def require_parity(model: nn.Module, seen: torch.Tensor, served: Any, part: Any, blocks: Any) -> None:
    for layer in compare_layers(model, seen, part):
        assert layer.passed, layer
    found = compare_blocks(model, seen, blocks, torch.from_numpy(served(seen.numpy())))
    assert found[-1].block == FEATURES
    assert len(found) >= 3
    for block in found:
        assert block.passed, block
        assert block.simulated > 1e-3


# -- what OpenVINO does with a plain graph ------------------------------------------------------------------------------


class Averaged(nn.Module):
    """The mean of the tokens behind a norm, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.norm(x.flatten(2).transpose(1, 2)).mean(1))


def off(graph: Any, model: nn.Module, x: torch.Tensor) -> float:
    """How far OpenVINO's output of ``graph`` is from the simulation's."""
    found = openvino_format.OpenVinoModel(graph.SerializeToString(), 1)(x.numpy())
    with torch.no_grad():
        reference = model(x).numpy()
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


def test_openvino_fuses_the_rounding_of_an_average_wrongly(tmp_path: Path) -> None:
    """A reproducer: where its first half fails, this release of OpenVINO needs ``keep_averaged_axes`` no more."""
    torch.manual_seed(0)
    model, x = Averaged().eval().requires_grad_(False), torch.randn(8, 32, 6, 6)
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    quantize(model, partial(MinMax, 7, per_channel=True), partial(MinMax, 8))
    calibrate(model, [x])
    program: Any = torch.onnx.export(integer_copy(model), (x,), dynamo=True, verbose=False, opset_version=21)
    graph = program.model_proto
    assert off(graph, model, x) > 0.1
    graphs.keep_averaged_axes(graph.graph)
    assert off(graph, model, x) < 1e-5


def test_openvino_adds_a_stream_before_the_scale_of_a_convolution(tmp_path: Path) -> None:
    """A reproducer: where its first half fails, this release of OpenVINO needs ``bound_convolutions`` no more."""
    model = quantized("vitamin").eval()
    seen = images(model)
    traced = onnx_format.trace(integer_copy(model), seen.shape[-1])
    graphs.drop_weight_zeros(traced.graph)
    assert off(traced, model, seen) > 0.3
    graphs.bound_convolutions(traced.graph)
    assert off(traced, model, seen) < 0.05
