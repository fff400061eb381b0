"""Registers in exported models: constants of the graph, which the runtimes attend to as the simulation does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import PLAIN, made, plain_encoder

from qatlab.deploy.formats import onnx, openvino
from qatlab.deploy.integer import integer_copy
from qatlab.quant import calibrate, quantize
from qatlab.quant.layers.attention import RegisteredAttention
from qatlab.quant.layers.registers import Registers


@pytest.fixture
def simulated() -> torch.nn.Module:
    visual = plain_encoder()
    torch.manual_seed(2)
    for block in visual.transformer.resblocks:
        registers = Registers(torch.randn(32, 1), 3 * torch.randn(32, 1), torch.tensor([9.0]).log())
        block.attn = RegisteredAttention(block.attn, registers)
    model = quantize(visual, **PLAIN)
    calibrate(model, [made(16)])
    return model.eval()


def test_runtimes_find_them(simulated: torch.nn.Module, tmp_path: Path) -> None:
    images = made(4)
    with torch.no_grad():
        expected = simulated(images).numpy()
        for block in simulated.transformer.resblocks:
            block.attn.registers.log_count -= 100  # a register that nothing attends to
        without = simulated(images).numpy()
        for block in simulated.transformer.resblocks:
            block.attn.registers.log_count += 100
    assert np.abs(expected - without).max() > 0.1 * np.abs(expected).max()
    integer = integer_copy(simulated)
    served = onnx.OnnxModel(onnx.write(integer, tmp_path, 16))
    other = openvino.OpenVinoModel(openvino.write(openvino.source(integer, tmp_path, 16), tmp_path), 1)
    for runtime in (served, other):
        found = runtime(images.numpy())
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.02
