"""Registers against attention to repeated tokens in float64, and a tower in which outlier tokens are planted."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.config import ModelConfig, compose
from qatlab.core.errors import UserError
from qatlab.models.quantized import fitted_copy, load_quantized, quantized_copy, save_quantized
from qatlab.quant import CachedRegisters, MinMax, Rotation, SmoothQuant, calibrate, quant_layers, quantize
from qatlab.quant.inspect.hooks import on_inputs
from qatlab.quant.inspect.registers import registers_of, silent_neurons, told
from qatlab.quant.layers.attention import QuantAttention, RegisteredAttention
from qatlab.quant.layers.registers import Registers, no_registers
from qatlab.quant.rewrites.registers import COUNTS

VISION = {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "head_width": 16}
PLACES, NEURON = (4, 9), 5  # the tokens that become outliers, and the neuron of the first block that makes them


@pytest.fixture
def images() -> Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def planted(build_visual: Any) -> nn.Module:
    """A tower in whose first block one neuron makes outliers of two tokens; the others hardly heed what it writes."""
    visual = build_visual(**VISION)
    torch.manual_seed(3)
    found, written = F.normalize(torch.randn(2, 32), dim=-1)
    with torch.no_grad():
        visual.positional_embedding[list(PLACES)] += 20 * found
        first = visual.transformer.resblocks[0].mlp
        first.c_fc.weight[NEURON] = 10 * found
        first.c_fc.bias[NEURON] = -20
        first.c_proj.weight[:, NEURON] = 5 * written
    return visual


def widest(visual: nn.Module, images: Tensor) -> dict[str, float]:
    """The largest |x| that goes into each mlp's last layer."""
    found: dict[str, float] = {}

    def look(name: str, layer: nn.Module, given: tuple[Any, ...]) -> None:
        found[name] = float(given[0].abs().max())

    layers = {name: part for name, part in visual.named_modules() if name.endswith("c_proj")}
    with torch.no_grad(), on_inputs(layers, look):
        visual(images)
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_a_register_counts_as_often_as_it_stands_for_tokens(masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    keys, values = torch.randn(2, 32, 2, dtype=torch.float64)
    registers = Registers(keys, values, torch.tensor([3, 1], dtype=torch.float64).log())
    mask = torch.full((5, 5), -math.inf, dtype=torch.float64).triu(1) if masked else None
    found = F.scaled_dot_product_attention(q, *registers(k, v, mask))
    # The first register three times, and the second once, as tokens that every query may see.
    own = [part.unflatten(0, (4, 8)).mT.expand(2, -1, -1, -1)[:, :, [0, 0, 0, 1]] for part in (keys, values)]
    logits = q @ torch.cat([k, own[0]], 2).mT / math.sqrt(8)
    if mask is not None:
        logits = logits + F.pad(mask, (0, 4))
    expected = logits.softmax(-1) @ torch.cat([v, own[1]], 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_without_registers_it_is_the_attention_itself(batch_first: bool) -> None:
    torch.manual_seed(0)
    source = nn.MultiheadAttention(32, 4, batch_first=batch_first).eval()
    registered = RegisteredAttention(source, no_registers(32, source.in_proj_weight)).eval()
    x = torch.randn(5, 6, 32)
    with torch.no_grad():
        torch.testing.assert_close(registered(x, x, x)[0], source(x, x, x, need_weights=False)[0], rtol=1e-5, atol=1e-6)
    assert registered.in_proj_weight is source.in_proj_weight


def test_the_neuron_that_makes_outliers_is_found_and_hardly_missed(planted: nn.Module, images: Tensor) -> None:
    before, name = widest(planted, images), "transformer.resblocks.0.mlp.c_proj"
    with torch.no_grad():
        features = planted(images)
    rewrite = CachedRegisters(neurons=1)
    model = rewrite(copy.deepcopy(planted), [images[:5], images[5:]])
    first = model.transformer.resblocks[0].mlp
    assert not first.c_fc.weight[NEURON].any()
    assert first.c_fc.bias[NEURON] == 0
    assert not first.c_proj.weight[:, NEURON].any()
    assert widest(model, images)[name] < before[name] / 10
    registers = [block.attn.registers for block in model.transformer.resblocks]
    assert [len(each) for each in registers] == [1, 1, 1] or [len(each) for each in registers] == [0, 1, 1]
    assert float(registers[1].log_count.exp()) == pytest.approx(len(PLACES))
    with torch.no_grad():
        changed = F.cosine_similarity(model(images), features, dim=-1).mean()
    assert changed > 0.98


def test_the_register_is_the_mean_of_the_outlier_tokens(planted: nn.Module, images: Tensor) -> None:
    """By hand: the tokens before the second block, its norm and its packed projection, in float64."""
    tokens: list[Tensor] = []
    block = planted.transformer.resblocks[1]
    with torch.no_grad(), on_inputs({"block": block}, lambda name, module, given: tokens.append(given[0])):
        planted(images)
    kept = torch.arange(8) % 4 != 3
    x = tokens[0][kept][:, list(PLACES)].double()
    norm = F.layer_norm(x, (32,), block.ln_1.weight.double(), block.ln_1.bias.double(), block.ln_1.eps)
    packed = norm @ block.attn.in_proj_weight.double().T + block.attn.in_proj_bias.double()
    _, key, value = packed.mean((0, 1)).chunk(3)
    model = CachedRegisters(neurons=1)(copy.deepcopy(planted), [images])
    registers = model.transformer.resblocks[1].attn.registers
    torch.testing.assert_close(registers.keys[:, 0].double(), key, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(registers.values[:, 0].double(), value, rtol=1e-4, atol=1e-4)


def test_the_search_takes_the_number_that_loses_least(planted: nn.Module, images: Tensor) -> None:
    held_out = images[3::4]
    with torch.no_grad():
        full = planted(held_out)
        found = CachedRegisters()(copy.deepcopy(planted), [images])(held_out)
        cosines = []
        for neurons in COUNTS:
            each = CachedRegisters(neurons=neurons)(copy.deepcopy(planted), [images])
            cosines.append(F.cosine_similarity(each(held_out), full, dim=-1).mean())
    assert F.cosine_similarity(found, full, dim=-1).mean() == pytest.approx(float(max(cosines)), abs=1e-6)


@pytest.mark.parametrize("rewrite", [Rotation(seed=3), SmoothQuant(0.5)], ids=["rotation", "smoothquant"])
def test_rewrites_behind_it_stay_exact(planted: nn.Module, images: Tensor, rewrite: Any) -> None:
    model = CachedRegisters(neurons=1)(planted.double(), [images.double()])
    with torch.no_grad():
        before = model(images.double())
        after = rewrite(model, [images.double()])(images.double())
    torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-8)


def test_quantized_it_keeps_its_registers_and_loads_bit_for_bit(planted: nn.Module, images: Tensor) -> None:
    config = compose("recipe=ptq", "quant/rewrite=[registers,rotation]").quant
    model, _ = fitted_copy(planted, config, lambda: [images])
    attention = model.transformer.resblocks[1].attn
    assert isinstance(attention, QuantAttention)
    assert len(attention.registers) == 1
    neurons = sum(silent_neurons(model).values())
    assert neurons in COUNTS
    assert told(model).startswith(f"registers in {len(registers_of(model))} attentions in place of {neurons} neurons")
    empty = quantized_copy(planted, config)
    empty.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(empty.eval()(images), model.eval()(images))


def test_a_run_file_is_read_back(
    monkeypatch: pytest.MonkeyPatch, planted: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    config = compose("recipe=ptq", "quant/rewrite=registers").quant
    model, config = fitted_copy(planted, config, lambda: [images])
    save_quantized(model, tmp_path / "quantized.safetensors", ModelConfig(name="ViT-B-32"), config)

    class Towers:
        visual = planted

    monkeypatch.setattr("qatlab.models.quantized.untrained", lambda model, text: (Towers, None))
    with torch.no_grad():
        assert torch.equal(load_quantized(tmp_path / "quantized.safetensors")(images), model.eval()(images))


def test_registers_of_another_width_are_refused() -> None:
    registers = no_registers(8, torch.zeros(1))
    state = {"keys": torch.zeros(6, 1), "values": torch.zeros(6, 1), "log_count": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"keys, values and log_count are \(6, 1\)"):
        registers.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        registers.load_state_dict({"keys": torch.zeros(8, 1)})


def test_towers_that_it_does_not_take(planted: nn.Module, build_visual: Any, images: Tensor) -> None:
    rewrite = CachedRegisters(neurons=1)
    with pytest.raises(UserError, match="no outlier tokens"):
        rewrite(build_visual(**VISION), [images])
    with pytest.raises(UserError, match="at least two"):
        rewrite(planted, [images[:1]])
    with pytest.raises(UserError, match="open_clip's own"):
        rewrite(nn.Sequential(nn.Linear(3, 3)), [images])
    model = quantize(copy.deepcopy(planted), partial(MinMax, 8), partial(MinMax, 8))
    calibrate(model, [images])
    with pytest.raises(UserError, match="full-precision"):
        rewrite(model, [images])
    # Nothing was changed by any of them.
    assert not any(isinstance(part, Registers) for part in planted.modules())
    assert quant_layers(model)
