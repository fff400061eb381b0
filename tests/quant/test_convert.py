from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from qatlab.core.errors import UserError
from qatlab.quant import LSQ, MinMax, QuantConv2d, QuantLinear, calibrate, layer_report, quant_layers, quantize, verify
from qatlab.quant.layers.lora import LoRA
from qatlab.quant.quantizers.lr_qat import LRQAT

WEIGHT, ACT = partial(LSQ, 8, per_channel=True), partial(MinMax, 8)
KINDS = ["attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"]
NAMES = [f"transformer.resblocks.{block}.{kind}" for block in range(2) for kind in KINDS]


def test_every_linear_and_attention_projection_is_quantized(visual: nn.Module) -> None:
    assert quantize(visual, WEIGHT, ACT) is visual
    assert list(quant_layers(visual)) == NAMES
    layer = quant_layers(visual)["transformer.resblocks.0.attn.in_proj"]
    assert layer.weight_quantizer.scale.shape == (96, 1)
    assert (layer.act_quantizer.channels, layer.act_quantizer.batched) == (32, True)


def test_the_parameters_stay_the_models(visual: nn.Module) -> None:
    before = {id(parameter) for parameter in visual.parameters()}
    quantize(visual, WEIGHT, ACT)
    assert before <= {id(parameter) for parameter in visual.parameters()}
    scales = [name for name, parameter in visual.named_parameters() if id(parameter) not in before]
    assert len(scales) == 8
    assert all(name.endswith("weight_quantizer.log_step") for name in scales)


def test_patch_convolution_and_final_projection(build_visual, images: torch.Tensor) -> None:
    model = build_visual()
    original = copy.deepcopy(model)
    quantize(model, WEIGHT, ACT, patch_conv=True, final_proj=True)
    calibrate(model, [images])
    assert set(quant_layers(model)) == {"conv1", "proj", *NAMES}
    assert isinstance(model.conv1, QuantConv2d)
    assert len(verify(model, images)) == 20
    result = model(images)
    assert result.shape == (3, 24)
    assert nn.functional.cosine_similarity(result, original(images)).min() > 0.99
    expected = quant_layers(model)["proj"]
    torch.testing.assert_close(expected.weight, original.proj.t(), rtol=0, atol=0)
    assert torch.equal(copy.deepcopy(model)(images), result)
    model.output_tokens = True
    assert torch.equal(model(images)[0], result)


def test_a_state_dict_loads_into_a_freshly_quantized_model(build_visual, quantized, images: torch.Tensor) -> None:
    fresh = quantize(build_visual(), WEIGHT, ACT, patch_conv=True, final_proj=True)
    fresh.load_state_dict(quantized.state_dict())
    assert torch.equal(fresh(images), quantized(images))


def test_only_weights_or_only_activations(build_visual, images: torch.Tensor) -> None:
    for weight, act in ((WEIGHT, None), (None, ACT)):
        model = quantize(build_visual(), weight, act)
        calibrate(model, [images])
        assert len(verify(model, images)) == 8
        assert len(layer_report(model, images)) == 8
    model = build_visual()
    kept = copy.deepcopy(model.state_dict())
    assert list(quantize(model, None, None).state_dict()) == list(kept)


def test_rules_the_first_match_wins(visual: nn.Module) -> None:
    rules = {
        "*.0.mlp.c_proj": {"act": None},
        "*.c_proj": {"act": {"bits": 6}, "weight": {"bits": 4, "init": "mse"}},
        "*.0.attn.*": None,
        "*.1.attn.out_proj": None,
    }
    quantize(visual, WEIGHT, ACT, rules)
    layers = quant_layers(visual)
    assert sorted(layers) == sorted(name for name in NAMES if ".0.attn." not in name and ".1.attn.out" not in name)
    first, second = (layers[f"transformer.resblocks.{block}.mlp.c_proj"] for block in range(2))
    assert first.act_quantizer is None
    assert first.weight_quantizer.bits == 8
    assert (second.act_quantizer.bits, second.weight_quantizer.bits, second.weight_quantizer.observer.name) == (
        6,
        4,
        "mse",
    )
    assert isinstance(visual.transformer.resblocks[0].attn, nn.MultiheadAttention)
    assert type(visual.transformer.resblocks[1].attn.out_proj) is nn.Linear


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"transformer.resblocks.0.mlp.c_porj": None}, "did you mean 'transformer.resblocks.0.mlp.c_proj'"),
        ({"zzz": None}, "matches no layer; the first layer is"),
        ({"*.c_fc": {"wieght": None}}, "did you mean 'weight'"),
        ({"*.c_fc": {"act": {"bit": 4}}}, r"rules\['\*\.c_fc'\]\.act has the option 'bit'.*did you mean 'bits'"),
        ({"*.c_fc": "skip"}, "write null"),
        ({"*.c_fc": {"weight": {"bits": 1}}}, "2 to 8"),
    ],
    ids=str,
)
def test_mistakes_in_rules_change_nothing(visual: nn.Module, rules: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantize(visual, WEIGHT, ACT, rules)
    assert not quant_layers(visual)
    assert isinstance(visual.transformer.resblocks[0].attn, nn.MultiheadAttention)


def test_options_for_a_quantizer_that_is_null(visual: nn.Module) -> None:
    with pytest.raises(UserError, match=r"act sets options, but there is none to change: quant\.act is null"):
        quantize(visual, WEIGHT, None, {"*.c_fc": {"act": {"bits": 4}}})


def test_models_that_cannot_be_quantized(quantized: nn.Module) -> None:
    with pytest.raises(UserError, match="already quantized"):
        quantize(quantized, WEIGHT, ACT)
    with pytest.raises(UserError, match="holds no layer"):
        quantize(nn.Sequential(nn.GELU()), WEIGHT, ACT)
    linear = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(UserError, match=r"quant\.first"):
        quantize(linear, WEIGHT, ACT, patch_conv=True)
    with pytest.raises(UserError, match=r"quant\.last"):
        quantize(linear, WEIGHT, ACT, final_proj=True)
    assert type(linear[0]) is nn.Linear


def test_train_mode_and_frozen_parameters_are_kept(build_visual) -> None:
    model = build_visual().train()
    model.transformer.resblocks[0].mlp.c_fc.weight.requires_grad_(False)
    model.proj.requires_grad_(False)
    quantize(model, WEIGHT, ACT, patch_conv=True, final_proj=True)
    assert all(module.training for module in model.modules())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert sorted(frozen) == ["proj.weight", "transformer.resblocks.0.mlp.c_fc.weight"]
    assert isinstance(model.proj, QuantLinear)


# -- adapters --------------------------------------------------------------------------------------------------------


def test_every_linear_layer_gets_an_adapter_and_the_rest_is_frozen(visual: nn.Module) -> None:
    visual.ln_pre.requires_grad_(True)
    quantize(visual, WEIGHT, ACT, adapter=partial(LoRA, rank=4, alpha=2), patch_conv=True, final_proj=True)
    layers = quant_layers(visual)
    assert layers["conv1"].adapter is None
    for name in ("proj", *NAMES):
        adapter, layer = layers[name].adapter, layers[name]
        assert (adapter.in_features, adapter.out_features) == (layer.in_features, layer.out_features)
        assert (adapter.rank, adapter.alpha) == (4, 2)
    learned = {name for name, parameter in visual.named_parameters() if parameter.requires_grad}
    scales = {f"{name}.weight_quantizer.log_step" for name in layers}
    assert learned == scales | {f"{name}.adapter.{factor}" for name in ("proj", *NAMES) for factor in ("up", "down")}


def test_rules_for_adapters(visual: nn.Module) -> None:
    rules = {
        "*.0.mlp.c_fc": {"adapter": None},
        "*.0.mlp.c_proj": {"adapter": {"rank": 2}},
        "*.0.attn.*": None,
        "*.1.mlp.*": {"weight": None, "act": None},
        "*.1.attn.*": {"weight": {"bits": 4}},
    }
    quantize(visual, WEIGHT, ACT, rules, adapter=partial(LoRA, rank=4))
    layers = {name.removeprefix("transformer.resblocks."): layer for name, layer in quant_layers(visual).items()}
    assert {name: layer.adapter and layer.adapter.rank for name, layer in layers.items()} == {
        "0.mlp.c_fc": None,
        "0.mlp.c_proj": 2,
        "1.attn.in_proj": 4,
        "1.attn.out_proj": 4,
        "1.mlp.c_fc": 4,
        "1.mlp.c_proj": 4,
    }
    assert layers["1.mlp.c_fc"].weight_quantizer is None
    assert not visual.transformer.resblocks[0].attn.in_proj_weight.requires_grad


def test_the_width_is_told_to_a_weight_quantizer_that_takes_it(visual: nn.Module) -> None:
    quantize(visual, partial(LRQAT, bits=4, rank=2), ACT, patch_conv=True)
    layers = quant_layers(visual)
    assert layers["conv1"].weight_quantizer.low_rank.down.shape == (2, 3 * 8 * 8)
    assert layers["transformer.resblocks.0.mlp.c_proj"].weight_quantizer.low_rank.down.shape == (2, 128)
    learned = [name for name, parameter in visual.named_parameters() if parameter.requires_grad]
    assert all("weight_quantizer" in name for name in learned)
    assert len(learned) == 9 * 3


@pytest.mark.parametrize(
    ("rules", "adapter", "message"),
    [
        ({"*": {"adapter": None}}, LoRA, "no linear layer gets one"),
        ({"transformer.*": None}, LoRA, "no linear layer gets one"),
        ({"*.c_fc": {"adapter": {"rank": 2}}}, None, r"adapter sets options.*quant\.adapter is null"),
        ({"*.c_fc": {"adapter": {"rnk": 2}}}, LoRA, r"adapter has the option 'rnk'.*did you mean 'rank'"),
        ({"*.c_fc": {"adaptor": None}}, LoRA, "did you mean 'adapter'"),
        ({}, partial(LoRA, rank=64), r"quant\.adapter of transformer\.resblocks\.0\.attn\.in_proj: rank=64"),
    ],
    ids=str,
)
def test_mistakes_with_adapters_change_nothing(visual: nn.Module, rules: dict, adapter, message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantize(visual, WEIGHT, ACT, rules, patch_conv=True, adapter=adapter)
    assert not quant_layers(visual)
    assert all(parameter.requires_grad for parameter in visual.parameters())
