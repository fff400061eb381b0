from __future__ import annotations

import copy
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from open_clip.transformer import QuickGELU
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from qatlab.config import ModelConfig
from qatlab.core.errors import UserError
from qatlab.models.clip import load
from qatlab.quant import MinMax, calibrate, layer_report, quant_layers, quantize, verify
from qatlab.quant.quantizers.dynamic import DynamicMinMax
from qatlab.quant.quantizers.gptq import GPTQ
from qatlab.quant.quantizers.lr_qat import LRQAT
from qatlab.quant.quantizers.lsq_plus import LSQPlus
from qatlab.quant.quantizers.raana import RaanA
from qatlab.quant.rewrites.inputs import ROWS
from qatlab.quant.rewrites.smoothquant import SmoothQuant, smoothing_scale
from qatlab.towers.edges import edges_of

GROUPS = ("in_proj", "out_proj", "c_fc", "c_proj")
WEIGHT, ACT = partial(MinMax, 8, per_channel=True), partial(MinMax, 8)


def uneven(visual: nn.Module) -> nn.Module:
    """The model with channels of unlike range and biases, as trained ones have."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in visual.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if name.endswith(("ln_1.weight", "ln_2.weight", "c_fc.weight")):
                factor = (torch.randn(len(parameter), generator=generator) * 1.2).exp()
                parameter.mul_(factor.reshape(-1, *[1] * (parameter.ndim - 1)))
    return visual


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float(((y - reference).norm() / reference.norm()).detach())


def inputs_of(visual: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of every layer by name, as the quantized model's layers get them in full precision."""
    inputs: dict[str, torch.Tensor] = {}
    model = quantize(copy.deepcopy(visual), None, ACT)
    calibrate(model, [images])
    for name, layer in quant_layers(model).items():
        layer.act_quantizer = None
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
    model(images)
    return inputs


@pytest.mark.parametrize("alpha", [0, 0.5, 1.0, "search", {"out_proj": 0.3}, {"c_proj": 0.7, "c_fc": None}])
@pytest.mark.parametrize("vision", [{}, {"ls_init_value": 0.5}])
@pytest.mark.parametrize("quick", [True, False])
def test_the_rewrite_is_exact(build_visual: Callable, images: torch.Tensor, alpha, vision, quick: bool) -> None:
    visual = uneven(build_visual(**vision))
    if quick:
        for block in visual.transformer.resblocks:
            block.mlp.gelu = QuickGELU()
    rewritten = copy.deepcopy(visual)
    assert SmoothQuant(alpha, WEIGHT, ACT)(rewritten, images.split(2)) is rewritten
    other = images.flip(0) * 1.5
    assert relative_error(rewritten(other), visual(other)) < 1e-5
    changed = {name for name, value in visual.state_dict().items() if not rewritten.state_dict()[name].equal(value)}
    if isinstance(alpha, dict):
        ends = (".attn.in_proj_weight", ".attn.in_proj_bias", ".attn.out_proj.weight")
        assert {name[len("transformer.resblocks.0") :] for name in changed} == set(
            ends if "out_proj" in alpha else [".mlp.c_proj.weight"]
        )
    else:
        assert len(changed) == 2 * 9


def test_the_rewrite_of_the_embedded_model_is_exact() -> None:
    visual = load(ModelConfig()).visual
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    rewritten = SmoothQuant(0.5)(copy.deepcopy(visual), [images])
    with torch.no_grad():
        assert relative_error(rewritten(images), visual(images)) < 1e-5


@pytest.mark.vit_b16
def test_the_rewrite_of_a_real_model_is_exact(shared_data: Path, vit_b16_weights: Path) -> None:
    shards = sorted((shared_data / "flickr8k").glob("*.tar"))
    clip = load(ModelConfig(name="ViT-B-16", pretrained="openai", checkpoint=str(vit_b16_weights)))
    with tarfile.open(shards[0]) as tar:
        files = [member for member in tar if member.name.endswith(".jpg")][:4]
        pixels = torch.stack([clip.preprocess.decode(tar.extractfile(file).read()) for file in files])
    images = clip.preprocess.normalize(pixels)
    with torch.no_grad():
        reference = clip.visual(images)
        rewritten = SmoothQuant(0.6)(clip.visual, images.split(2))
        assert relative_error(rewritten(images), reference) < 1e-5


@pytest.mark.parametrize("alpha", [0.0, 0.35, 1.0])
def test_scales_against_a_float64_loop(build_visual: Callable, images: torch.Tensor, alpha: float) -> None:
    visual = uneven(build_visual())
    inputs = inputs_of(visual, images)
    before = visual.state_dict()
    after = SmoothQuant(alpha)(copy.deepcopy(visual), images.split(1)).state_dict()
    for block in range(2):
        name = f"transformer.resblocks.{block}"
        scales = {}
        keys = {"in_proj": "attn.in_proj_weight", "out_proj": "attn.out_proj.weight"}
        for group in GROUPS:
            layer = f"{name}.{'attn' if 'in_proj' in group or 'out' in group else 'mlp'}.{group}"
            x = inputs[layer].reshape(-1, inputs[layer].shape[-1]).numpy()
            w = before[f"{name}.{keys.get(group, f'mlp.{group}.weight')}"].numpy()
            scale = []
            for j in range(x.shape[1]):
                of_x = max(1e-5, max(abs(float(value)) for value in x[:, j]))
                of_w = max(1e-5, max(abs(float(value)) for value in w[:, j]))
                scale.append(of_x**alpha / of_w ** (1 - alpha))
            scales[group] = np.array(scale)
        ratio = {key: (after[key] / before[key]).double().numpy() for key in before if key.startswith(name)}
        close = partial(np.testing.assert_allclose, rtol=1e-4)
        width = 32
        close(ratio[f"{name}.ln_1.weight"], 1 / scales["in_proj"])
        close(ratio[f"{name}.ln_1.bias"], 1 / scales["in_proj"])
        close(ratio[f"{name}.ln_2.weight"], 1 / scales["c_fc"])
        close(ratio[f"{name}.ln_2.bias"], 1 / scales["c_fc"])
        rows = np.concatenate([np.ones(2 * width), 1 / scales["out_proj"]])
        close(ratio[f"{name}.attn.in_proj_weight"], rows[:, None] * scales["in_proj"])
        close(ratio[f"{name}.attn.in_proj_bias"], rows)
        close(ratio[f"{name}.attn.out_proj.weight"], np.tile(scales["out_proj"], (width, 1)))
        close(ratio[f"{name}.mlp.c_fc.weight"], np.tile(scales["c_fc"], (4 * width, 1)))
        close(ratio[f"{name}.mlp.c_proj.weight"], np.tile(scales["c_proj"], (width, 1)))
        close(after[f"{name}.mlp.smooth.factor"].numpy(), 1 / scales["c_proj"])
        close(ratio[f"{name}.mlp.c_fc.bias"], 1)


def test_alpha_one_evens_the_inputs_and_alpha_zero_the_weights(build_visual: Callable, images: torch.Tensor) -> None:
    visual = uneven(build_visual())
    of_inputs = SmoothQuant(1.0)(copy.deepcopy(visual), [images])
    for x in inputs_of(of_inputs, images).values():
        torch.testing.assert_close(x.abs().flatten(0, -2).amax(0), torch.ones(x.shape[-1]), rtol=1e-4, atol=1e-4)
    of_weights = SmoothQuant({"c_fc": 0.0, "c_proj": 0.0})(copy.deepcopy(visual), [images])
    for block in of_weights.transformer.resblocks:
        for layer in (block.mlp.c_fc, block.mlp.c_proj):
            torch.testing.assert_close(layer.weight.abs().amax(0), torch.ones(layer.in_features))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, "search"])
def test_dead_channels_stay_finite(build_visual: Callable, images: torch.Tensor, alpha) -> None:
    visual = uneven(build_visual())
    with torch.no_grad():
        block = visual.transformer.resblocks[0]
        for norm in (block.ln_1, block.ln_2):
            norm.weight[3] = norm.bias[3] = 0
        block.mlp.c_proj.weight[:, 5] = 0
        block.attn.in_proj_weight[2 * 32 + 7] = block.attn.in_proj_bias[2 * 32 + 7] = 0
    rewritten = SmoothQuant(alpha, WEIGHT, ACT)(copy.deepcopy(visual), [images])
    assert all(value.isfinite().all() for value in rewritten.state_dict().values())
    assert relative_error(rewritten(images), visual(images)) < 1e-5
    quantize(rewritten, WEIGHT, ACT)
    calibrate(rewritten, [images])
    assert rewritten(images).isfinite().all()


def test_four_layers_per_block_are_found_and_all_quantizers_run(visual: nn.Module, images: torch.Tensor) -> None:
    names = list(quant_layers(quantize(copy.deepcopy(visual), WEIGHT, ACT)))
    SmoothQuant(0.5)(visual, [images])
    quantize(visual, WEIGHT, ACT)
    calibrate(visual, [images])
    assert list(quant_layers(visual)) == names
    assert len(names) == 4 * 2
    rows = verify(visual, images)
    assert len(rows) == 2 * 4 * 2
    assert {row["calls"] for row in rows} == {1}
    assert {row["kind"] for row in layer_report(visual, images)} == set(GROUPS)
    mlp, x = visual.transformer.resblocks[0].mlp, torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(8))
    seen: list[torch.Tensor] = []
    mlp.c_proj.act_quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mlp(x)
    torch.testing.assert_close(seen[0], mlp[:2](x) * mlp.smooth.factor)


def test_a_rewritten_and_quantized_state_dict_loads(build_visual: Callable, images: torch.Tensor) -> None:
    smooth = SmoothQuant(0.5)
    saved = quantize(smooth(uneven(build_visual()), [images]), WEIGHT, ACT)
    calibrate(saved, [images])
    loaded = quantize(smooth.prepare(build_visual()), WEIGHT, ACT)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded(images), saved(images))
    plain = build_visual()
    assert torch.equal(smooth.prepare(copy.deepcopy(plain))(images), plain(images))
    assert set(SmoothQuant({"c_fc": 0.5}).prepare(copy.deepcopy(plain)).state_dict()) == set(plain.state_dict())


def test_the_rewrite_can_be_repeated(build_visual: Callable, images: torch.Tensor) -> None:
    visual = uneven(build_visual())
    twice = SmoothQuant(1.0)(SmoothQuant(0.25)(copy.deepcopy(visual), [images]), [images])
    assert relative_error(twice(images), visual(images)) < 1e-5
    assert [name for name, _ in twice.transformer.resblocks[0].mlp.named_children()] == [
        "c_fc",
        "gelu",
        "smooth",
        "c_proj",
    ]


def test_modes_and_attention_are_restored_and_gradients_flow(build_visual: Callable, images: torch.Tensor) -> None:
    visual = build_visual().train()
    visual.ln_pre.eval()
    attentions = [block.attn for block in visual.transformer.resblocks]
    SmoothQuant("search", WEIGHT, ACT)(visual, [images])
    assert visual.training
    assert not visual.ln_pre.training
    assert all(
        block.attn is attention for block, attention in zip(visual.transformer.resblocks, attentions, strict=True)
    )
    visual(images).sum().backward()
    assert all(parameter.grad is not None for parameter in visual.parameters())
    assert not any(module._forward_pre_hooks for module in visual.modules())


def test_batches_do_not_matter(build_visual: Callable) -> None:
    visual = uneven(build_visual())
    images = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    states = []
    for size in (7, 1, 3):
        smooth = SmoothQuant("search", WEIGHT, ACT)
        states.append((smooth(copy.deepcopy(visual), images.split(size)).state_dict(), smooth.alphas))
    for state, alphas in states[1:]:
        assert alphas == states[0][1]
        for name, value in state.items():
            torch.testing.assert_close(value, states[0][0][name], rtol=1e-4, atol=1e-6)


def test_the_search_against_an_exhaustive_one(build_visual: Callable) -> None:
    """All tokens fit into the sample here, so the even images set s and scale and the odd ones give the error."""
    visual = uneven(build_visual())
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    assert ROWS >= 4 * 5
    inputs = {name: x.double() for name, x in inputs_of(visual, images).items()}
    weights = {
        name: layer.weight.detach()
        for name, layer in quant_layers(quantize(copy.deepcopy(visual), WEIGHT, ACT)).items()
    }
    smooth = SmoothQuant("search", partial(MinMax, 4, per_channel=True), partial(MinMax, 4))
    smooth(visual, images.split(3))
    assert set(smooth.alphas) == set(weights)
    for name, w in weights.items():
        even, odd, w = inputs[name][0::2].flatten(0, 1), inputs[name][1::2].flatten(0, 1), w.double()
        errors = []
        for k in range(21):
            s = smoothing_scale(even.abs().amax(0), w, k / 20)
            step, steps = (even / s).abs().max() / 7, (w * s).abs().amax(1, keepdim=True) / 7
            x_q = (odd / s / step).round().clamp(-8, 7) * step
            w_q = (w * s / steps).round().clamp(-8, 7) * steps
            errors.append(float((x_q @ w_q.T - odd @ w.T).square().sum()))
        found = round(smooth.alphas[name] * 20)
        tried = {*range(0, 21, 4), max(0, found - 1), min(20, found + 1)}
        assert errors[found] <= min(errors[k] for k in tried) * (1 + 1e-3), name
        assert errors[found] <= min(errors) * 1.25, name


def test_the_search_quantizes_only_what_the_run_quantizes(build_visual: Callable, images: torch.Tensor) -> None:
    visual = uneven(build_visual())
    weight_only, act_only = SmoothQuant("search", weight=WEIGHT), SmoothQuant("search", act=ACT)
    weight_only(copy.deepcopy(visual), [images])
    act_only(copy.deepcopy(visual), [images])
    # Rounding weights alone wants even weights, rounding inputs alone even inputs.
    assert np.mean(list(weight_only.alphas.values())) < np.mean(list(act_only.alphas.values()))


@pytest.mark.parametrize(
    "act",
    [
        partial(MinMax, 8, symmetric=False),
        partial(MinMax, 8, observer="ema"),
        partial(MinMax, 8, observer="percentile", percentile=99.99),
        partial(MinMax, 8, observer="mse"),
        partial(MinMax, 8, per_channel=True),
        partial(LSQPlus, 8),
        partial(DynamicMinMax, 8),
    ],
)
def test_the_search_takes_any_quantizer(build_visual: Callable, images: torch.Tensor, act: partial) -> None:
    visual = uneven(build_visual())
    smooth = SmoothQuant("search", WEIGHT, act)
    rewritten = smooth(copy.deepcopy(visual), [images])
    assert relative_error(rewritten(images), visual(images)) < 1e-5
    assert len(smooth.alphas) == 4 * 2
    quantize(rewritten, WEIGHT, act)
    calibrate(rewritten, [images])
    assert relative_error(rewritten(images), visual(images)) < 0.1


@pytest.mark.parametrize(
    "weight",
    [partial(MinMax, 4, group_size=4), partial(RaanA, 4), partial(LRQAT, 4, rank=2), partial(GPTQ, 4)],
    ids=["group", "raana", "lr_qat", "gptq"],
)
def test_the_search_takes_any_weight_quantizer(
    build_visual: Callable, images: torch.Tensor, weight: partial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alpha is the one that loses least of those tried, with the errors of the output computed here."""
    monkeypatch.setattr("qatlab.quant.rewrites.inputs.ROWS", 10**6)
    visual = uneven(build_visual())
    inputs = {name: x.double() for name, x in inputs_of(visual, images).items()}
    smooth = SmoothQuant({"c_fc": "search"}, weight)
    rewritten = smooth(copy.deepcopy(visual), [images])
    assert relative_error(rewritten(images), visual(images)) < 1e-5
    assert len(smooth.alphas) == 2
    for name, alpha in smooth.alphas.items():
        w = visual.get_submodule(name).weight.detach()
        even, odd = inputs[name][0::2].flatten(0, 1), inputs[name][1::2].flatten(0, 1)
        errors = {}
        for k in range(0, 21, 4):
            s = smoothing_scale(even.abs().amax(0), w, k / 20)
            twin = calibrated_twin(weight, (w.double() * s).float()).double()
            errors[k] = float((odd / s @ twin.T - odd @ w.double().T).square().sum())
        s = smoothing_scale(even.abs().amax(0), w, alpha)
        twin = calibrated_twin(weight, (w.double() * s).float()).double()
        assert float((odd / s @ twin.T - odd @ w.double().T).square().sum()) <= min(errors.values()) * (1 + 1e-3)


def calibrated_twin(weight: partial, rows: torch.Tensor) -> torch.Tensor:
    """What the quantizer ``weight`` makes of a layer's ``rows``, as ``quantize`` and ``calibrate`` give it."""
    layer = nn.Linear(rows.shape[1], rows.shape[0])
    layer.weight = nn.Parameter(rows.clone())
    model = quantize(nn.Sequential(layer), weight, None)
    calibrate(model, [torch.ones(1, rows.shape[1])])
    quantizer = quant_layers(model)["0"].weight_quantizer
    with torch.no_grad():
        # The grid alone counts here: GPTQ's own rounding needs the inputs of all layers before.
        return quantizer(rows)


def test_groups_that_do_not_divide_a_layer_are_told_by_its_name(build_visual: Callable, images: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"layer transformer\.resblocks\.0\.mlp\.c_fc: group_size=5 does not divide"):
        SmoothQuant({"c_fc": "search"}, partial(MinMax, 4, group_size=5))(build_visual(), [images])


def test_outliers_outside_the_sample_count(build_visual: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample of the search misses the largest values; the range that it gives the quantizer must not."""
    monkeypatch.setattr("qatlab.quant.rewrites.inputs.ROWS", 2)
    visual = uneven(build_visual())
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    seen = []

    def make(*, channels: int, batched: bool):
        class Watched(MinMax):
            def fit(self) -> None:
                super().fit()
                seen.append(float(self.scale))

        return Watched(8, channels=channels, batched=batched)

    inputs = inputs_of(visual, images)["transformer.resblocks.0.mlp.c_proj"][0::2].flatten(0, 1)
    weight = visual.transformer.resblocks[0].mlp.c_proj.weight.detach().clone()
    SmoothQuant({"c_proj": "search"}, act=make)(visual, [images])
    expected = [
        float((inputs / smoothing_scale(inputs.abs().amax(0), weight, k / 20)).abs().max()) / 127
        for k in range(0, 21, 4)
    ]
    assert seen[:6] == pytest.approx(expected, rel=1e-5)


def test_smoothing_helps_where_channels_differ(build_visual: Callable) -> None:
    visual = uneven(build_visual())
    with torch.no_grad():
        visual.transformer.resblocks[0].mlp.c_fc.bias[:3] = 40.0
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    reference = visual(images)
    errors = {}
    for name, alpha in {"none": {}, "half": 0.5, "search": "search"}.items():
        model = SmoothQuant(alpha, WEIGHT, ACT)(copy.deepcopy(visual), [images])
        quantize(model, WEIGHT, ACT)
        calibrate(model, [images])
        errors[name] = relative_error(model(images), reference)
    assert errors["half"] < 0.5 * errors["none"]
    assert errors["search"] < 0.5 * errors["none"]


@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan"), True, "Search", "0.5", [0.5], {"c_fc": 2}])
def test_an_alpha_outside_its_range_is_told(alpha) -> None:
    with pytest.raises(UserError, match=r"alpha=.*: it takes a number from 0 to 1 or search"):
        SmoothQuant(alpha)


def test_unknown_groups_and_a_search_without_quantizers_are_told() -> None:
    with pytest.raises(UserError, match=r"alpha has the group 'cproj' \(did you mean 'c_proj'\?\)"):
        SmoothQuant({"cproj": 0.5})
    with pytest.raises(UserError, match="without quantizers"):
        SmoothQuant({"c_fc": 0.5, "c_proj": "search"})


def test_bad_calibration_is_told_and_changes_nothing(build_visual: Callable, images: torch.Tensor) -> None:
    visual = build_visual()
    before = copy.deepcopy(visual.state_dict())
    for batches in ([], [images[:0]]):
        with pytest.raises(UserError, match=r"got no images .* at least 1"):
            SmoothQuant()(visual, batches)
    with pytest.raises(UserError, match=r"got one image .* at least 2"):
        SmoothQuant("search", WEIGHT)(visual, [images[:1]])
    for alpha, layer in ((0.5, r"0\.attn\.in_proj"), ({"c_proj": "search"}, r"0\.mlp\.c_proj")):
        with pytest.raises(UserError, match=rf"layer transformer\.resblocks\.{layer}: .*NaN"):
            SmoothQuant(alpha, WEIGHT, ACT)(visual, [images, torch.full_like(images, float("nan"))])
    assert list(visual.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in visual.state_dict().items())
    with torch.no_grad():
        visual.transformer.resblocks[1].mlp.c_proj.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"layer transformer\.resblocks\.1\.mlp\.c_proj: .*infinite"):
        SmoothQuant(0.5)(visual, [images])


def test_towers_without_such_blocks_are_told(build_visual: Callable, images: torch.Tensor) -> None:
    quantized = quantize(build_visual(), WEIGHT, ACT)
    for tower in (quantized, nn.Linear(3, 3)):
        with pytest.raises(UserError, match=rf"cannot rewrite {type(tower).__name__}: .*blocks of open_clip or timm"):
            SmoothQuant()(tower, [images])
        with pytest.raises(UserError, match="cannot rewrite"):
            SmoothQuant().prepare(tower)


# -- other families --------------------------------------------------------------------------------------------------

EVA = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 8}
# a small tower of each family, the size of its images, and how many edges a block has
OTHERS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "timm vit": (lambda: timm.create_model("test_vit", num_classes=8), 160, 4),
    "timm norms in between": (
        lambda: VisionTransformer(
            28, 14, embed_dim=32, depth=2, num_heads=2, scale_attn_norm=True, scale_mlp_norm=True
        ),
        *(28, 4),
    ),
    "eva, packed": (lambda: Eva(**EVA, qkv_fused=True), 28, 4),
    "eva, apart, gated": (lambda: Eva(**EVA, qkv_fused=False, swiglu_mlp=True, scale_mlp=True), 28, 4),
    "eva, swiglu": (lambda: Eva(**EVA, swiglu_mlp=True), 28, 4),
    "eva, norms behind": (lambda: Eva(**EVA, use_post_norm=True), 28, 2),
    "pe": (lambda: Eva(**EVA, use_rot_pos_emb=True, attn_type="rope", global_pool="map"), 28, 4),
    "relative positions": (
        lambda: timm.create_model("vit_relpos_small_patch16_224", depth=2, embed_dim=48, num_heads=2),
        224,
        4,
    ),
    "swin": (
        lambda: SwinTransformer(64, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 2), num_classes=8),
        *(64, 4),
    ),
    "vitamin": (lambda: timm.create_model("vitamin_small_224", img_size=64, num_classes=8), 64, 4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_compute_the_same(name: str) -> None:
    make, size, each = OTHERS[name]
    torch.manual_seed(0)
    model, images = make().eval().requires_grad_(False), torch.randn(4, 3, size, size)
    for path, parameter in model.named_parameters():
        # as after a training: norms and layer scales that do something, and inputs with a few large channels
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape))
        if "norm" in path and path.endswith("weight"):
            parameter[0] *= 20
    exact, before = model(images), copy.deepcopy(model.state_dict())
    rewrite = SmoothQuant()
    assert rewrite(model, [images[:1], images[1:]]) is model
    torch.testing.assert_close(model(images), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    blocks = {path.split(".attn")[0] for path in rewrite.alphas if ".attn." in path and "pool" not in path}
    assert len([edge for edge in edges_of(model) if "pool" not in edge.readers[0].name]) == each * len(blocks)
    assert len(blocks) >= 2
    for reader in rewrite.alphas:  # something was done to every layer
        assert not torch.equal(model.get_submodule(reader).weight, before[f"{reader}.weight"])
    fresh = SmoothQuant().prepare(make().eval().requires_grad_(False))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images), model(images))
    # and the input of every layer is as wide as the formula has it
    quantize(model, WEIGHT, ACT)
    calibrate(model, [images])
    assert rewrite.alphas.keys() <= quant_layers(model).keys()
