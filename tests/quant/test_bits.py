"""What rows say of the bits of a quantized model: those that its layers have."""

from __future__ import annotations

import pytest
from torch import nn

from qatlab.config import ModelConfig, compose
from qatlab.models.clip import load
from qatlab.models.quantized import quantized_copy
from qatlab.quant import quant_layers
from qatlab.quant.inspect.bits import average_bits


@pytest.fixture(scope="module")
def visual() -> nn.Module:
    return load(ModelConfig()).visual


def bits(visual: nn.Module, *overrides: str) -> tuple[float | None, float | None]:
    layers = list(quant_layers(quantized_copy(visual, compose("recipe=ptq", *overrides).quant)).values())
    return average_bits(layers, "weight"), average_bits(layers, "act")


def test_using_a10_rules_that_change_every_layer_are_what_counts(visual: nn.Module) -> None:
    """The options say 8 and 8."""
    assert bits(visual, "+quant.rules={*: {weight: {bits: 4}, act: {bits: 5}}}") == (4, 5)
    assert bits(visual) == (8, 8)


def test_using_a10_mixed_bits_are_averaged_over_the_weights(visual: nn.Module) -> None:
    found = bits(visual, "+quant.rules={*.c_proj: {weight: {bits: 4}, act: {bits: 6}}, *.out_proj: {act: null}}")
    # of a block, in widths squared: in_proj 3, out_proj 1, c_fc 4 and c_proj 4
    assert found == (pytest.approx((3 * 8 + 8 + 4 * 8 + 4 * 4) / 12), pytest.approx((3 * 8 + 4 * 8 + 4 * 6) / 11))


def test_using_a10_what_is_in_full_precision_has_no_bits(visual: nn.Module) -> None:
    assert bits(visual, "+quant.rules={*: {act: null}}") == (8, None)
    assert average_bits([], "weight") is None
