"""The integer form of every method equals its simulation, and what has none says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import EXACT, INEXACT, encoder_of, made
from torch import Tensor, nn

from qatlab.core.errors import UserError
from qatlab.deploy.integer import integer_copy, integer_layers
from qatlab.quant import quant_layers


@torch.no_grad()
@pytest.mark.parametrize("name", [*EXACT, "rotation"])
def test_it_computes_what_the_simulation_does(name: str) -> None:
    simulated = encoder_of(name)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for layer_name, layer in quant_layers(simulated).items():

        def keep(_: Any, inputs: Any, output: Tensor, of: str = layer_name) -> None:
            seen[of] = inputs[0], output

        layer.register_forward_hook(keep)
    simulated(made(8, seed=2))
    found = integer_layers(integer_copy(simulated))
    assert found.keys() == quant_layers(simulated).keys() == seen.keys()
    for layer_name, layer in found.items():
        x, y = seen[layer_name]
        act = quant_layers(simulated)[layer_name].act_quantizer
        assert act is not None
        codes = layer.rounded(x).to(torch.int16) - 128
        same = codes == act.codes(x, torch.int16)
        assert (~same).double().mean() <= 1e-3  # x / s against x * (1 / s), on ties
        if bool(same.all()):
            torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-5 * float(y.abs().max()))
    if name not in ("lsq_plus", "rotation"):  # without a tie the rest follows
        result, reference = integer_copy(simulated)(made(8, seed=2)), simulated(made(8, seed=2))
        assert (result - reference).norm() <= 1e-2 * reference.norm()


@pytest.mark.parametrize("name", list(EXACT))
def test_its_weights_are_eight_bit_integers_and_nothing_else_holds_them(name: str) -> None:
    simulated = encoder_of(name)
    layers = integer_layers(integer_copy(simulated))
    for layer_name, layer in layers.items():
        source = quant_layers(simulated)[layer_name]
        assert layer.codes.dtype == torch.int8
        assert layer.scales.shape == (source.out_features,)
        restored = layer.codes.float() * layer.scales.reshape(-1, *[1] * (layer.codes.ndim - 1))
        torch.testing.assert_close(restored, source.quantized_weight().detach(), rtol=1e-6, atol=0)
        assert not any(tensor.shape == layer.codes.shape for tensor in layer.parameters())


@pytest.mark.parametrize("name", list(INEXACT))
def test_what_has_no_exact_form_is_named_before_anything_is_written(name: str) -> None:
    with pytest.raises(UserError, match=rf"'.*' has no exact integer form: .*{INEXACT[name][1]}"):
        integer_copy(encoder_of(name))


def test_an_encoder_in_full_precision_has_nothing_to_export() -> None:
    with pytest.raises(UserError, match="nothing of this encoder is quantized"):
        integer_copy(nn.Linear(2, 2))


def test_the_simulation_stays_as_it_was() -> None:
    simulated = encoder_of("absmax")
    with torch.no_grad():
        before = simulated(made(2))
        integer_copy(simulated)(made(2))
        assert torch.equal(simulated(made(2)), before)
