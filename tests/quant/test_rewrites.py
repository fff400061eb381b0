"""Every rewrite leaves what every family computes: to 1e-5 in float32, to 1e-10 in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny_towers
import torch
from torch import Tensor, nn

from qatlab.core.errors import UserError
from qatlab.quant import MinMax, calibrate, quant_layers, quantize, verify
from qatlab.quant.inspect.hooks import on_inputs
from qatlab.quant.layers.walk import evaluating, full_precision
from qatlab.quant.quantizers.hadamard import RandomHadamard
from qatlab.quant.rewrites.rotation import Rotation
from qatlab.quant.rewrites.smoothquant import SmoothQuant
from qatlab.towers.batch_norms import fold_batch_norms

# The part of a rotation that is refused, and what the sentence says of it; all other towers take every part.
REFUSED: dict[str, tuple[str, str]] = {
    "timm vit, norms in between": ("heads", r"'blocks\.0' has a norm between the values and out_proj"),
    "gated": ("heads", r"'blocks\.0' has a gate between the values and out_proj"),
    "eva02": ("heads", r"'blocks\.0' has a norm between the values and out_proj"),
    "eva02-e": ("residual", r"'blocks\.0' has norms between its layers and the residual stream"),
    "vitamin": ("residual", r"'blocks\.0' has a norm of its mlp behind a norm of the block"),
    "swin": ("residual", r"patch merging takes the mean of four tokens together"),
}


def features(visual: nn.Module, images: Tensor) -> Tensor:
    output = visual(images)
    return output[0] if isinstance(output, tuple) else output


def rotation_of(name: str) -> Rotation:
    """The rotation of all parts that are exact."""
    return Rotation(seed=3, **({REFUSED[name][0]: False} if name in REFUSED else {}))


@torch.no_grad()
def error(rewrite: Callable[..., Any], name: str, dtype: torch.dtype) -> tuple[float, nn.Module]:
    """The largest distance between the features of an image, relative to their norm, and the rewritten tower."""
    visual, images = fold_batch_norms(tiny_towers.tower(name)).to(dtype), tiny_towers.images(name).to(dtype)
    rewritten = copy.deepcopy(visual)
    assert rewrite(rewritten, images.split(2)) is rewritten
    other = images.flip(0) * 1.5
    before, after = features(visual, other).flatten(1), features(rewritten, other).flatten(1)
    return float(((after - before).norm(dim=1) / before.norm(dim=1)).max()), rewritten


@pytest.mark.parametrize("name", tiny_towers.TRANSFORMERS)
def test_a_rotation_is_exact(name: str) -> None:
    rewrite = rotation_of(name)
    assert error(rewrite, name, torch.float32)[0] < 1e-5
    distance, rotated = error(rewrite, name, torch.float64)
    assert distance < 1e-10
    # every layer behind an activation function has a rotation in front, and the stream one at each end
    blocks = {"timm vit": 6, "swin": 4}.get(name, 2)
    poolers = [part for part, module in rotated.named_modules() if part.endswith("pool.mlp")]
    ends = 2 if rewrite.residual else 0
    rotations = [module for module in rotated.modules() if isinstance(module, RandomHadamard)]
    assert len(rotations) == blocks + len(poolers) + ends
    # what a run stores loads into a tower that was rotated with other weights
    make, _ = tiny_towers.FAMILIES[name]
    fresh = Rotation(seed=9, **{part: getattr(rewrite, part) for part in ("residual", "heads", "mlp")})
    prepared = fresh.prepare(fold_batch_norms(make().double().requires_grad_(False).eval()))
    prepared.load_state_dict(rotated.state_dict())
    images = tiny_towers.images(name)
    assert torch.equal(features(prepared, images), features(rotated, images))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused_and_changes_nothing(name: str) -> None:
    visual = tiny_towers.tower(name)
    before = copy.deepcopy(visual.state_dict())
    part, sentence = REFUSED[name]
    with pytest.raises(UserError, match=rf"{sentence}.*: set {part}=false"):
        Rotation()(visual)
    assert list(visual.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in visual.state_dict().items())


@pytest.mark.parametrize("name", tiny_towers.TRANSFORMERS)
def test_a_rotated_tower_is_quantized_whole(name: str) -> None:
    """The layers keep their names and all of them run."""
    eight = partial(MinMax, 8)
    make, _ = tiny_towers.FAMILIES[name]
    names = list(quant_layers(quantize(make(), eight, eight)))
    rotated = rotation_of(name)(tiny_towers.tower(name).float())
    model = quantize(rotated, eight, eight)
    images = tiny_towers.images(name).float()
    calibrate(model, [images])
    assert list(quant_layers(model)) == names
    verify(model, images)


@pytest.mark.parametrize("name", tiny_towers.TRANSFORMERS)
def test_what_a_rotation_leaves_alone(name: str) -> None:
    """The layers that it names are those whose inputs change."""
    rewrite, visual, images = rotation_of(name), tiny_towers.tower(name), tiny_towers.images(name)
    said = rewrite.rewritten(visual)
    before, after = inputs_of(visual, images), inputs_of(rewrite(copy.deepcopy(visual)), images)
    changed = {key for key in before if not torch.allclose(before[key], after[key], rtol=1e-6, atol=1e-6)}
    assert said == changed


def inputs_of(visual: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The inputs of all layers by name, in full precision."""
    model = quantize(copy.deepcopy(visual), partial(MinMax, 8), None)
    found: dict[str, Tensor] = {}

    def look(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        found[name] = given[0].clone()

    with evaluating(model), full_precision(model), on_inputs(quant_layers(model), look):
        model(images)
    return found


@pytest.mark.parametrize("alpha", [0.5, "search"])
@pytest.mark.parametrize("name", tiny_towers.FAMILIES)
def test_smoothquant_is_exact(name: str, alpha: Any) -> None:
    act = partial(MinMax, 8)
    smooth = SmoothQuant(alpha, act, act)
    assert error(smooth, name, torch.float32)[0] < 1e-5
    distance, rewritten = error(smooth, name, torch.float64)
    assert distance < 1e-10
    plain = fold_batch_norms(tiny_towers.tower(name))
    # what it says that it did is what it did
    assert smooth.alphas
    layers = dict(rewritten.named_modules())
    changed = {reader for reader in smooth.alphas if reader in layers}
    assert all(not torch.equal(layers[reader].weight, plain.get_submodule(reader).weight) for reader in changed)
    prepared = smooth.prepare(plain)
    prepared.load_state_dict(rewritten.state_dict())
    images = tiny_towers.images(name)
    torch.testing.assert_close(features(prepared, images), features(rewritten, images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@torch.no_grad()
def test_scales_of_convolutions_against_a_float64_loop(alpha: float) -> None:
    """Rows of one convolution are divided by what the channels of the next are multiplied by, also where a kernel is 3 x 3."""
    plain, images = fold_batch_norms(tiny_towers.tower("resnet")), tiny_towers.images("resnet")
    inputs = inputs_of(plain, images)
    rewritten = SmoothQuant({"conv": alpha})(copy.deepcopy(plain), images.split(3))
    for block in ("layer2.0", "layer3.0"):
        maker, reader = (plain.get_submodule(f"{block}.{part}") for part in ("conv1", "conv2"))
        assert reader.weight.shape[2:] == (3, 3)
        x, scales = inputs[f"{block}.conv2"], []
        for channel in range(x.shape[1]):
            of_x = max(abs(float(value)) for value in x[:, channel].flatten())
            of_w = max(abs(float(value)) for value in reader.weight[:, channel].flatten())
            scales.append(max(of_x, 1e-5) ** alpha / max(of_w, 1e-5) ** (1 - alpha))
        scale = torch.tensor(scales, dtype=torch.float64)
        new = rewritten.get_submodule(f"{block}.conv1")
        torch.testing.assert_close(new.weight, maker.weight / scale[:, None, None, None])
        torch.testing.assert_close(new.bias, maker.bias / scale)
    stem = rewritten.get_submodule("layer1.0.downsample.0").weight / plain.get_submodule("layer1.0.downsample.0").weight
    both = rewritten.get_submodule("layer1.0.conv1").weight
    # Two layers read the stem, and both have its scale; conv1 was divided by that of conv2 besides.
    ratio = both / plain.get_submodule("layer1.0.conv1").weight
    torch.testing.assert_close(ratio / ratio[:, :1], stem[:1].expand_as(ratio) / stem[:1, :1])


@torch.no_grad()
def test_equalization_mends_a_scale_for_a_whole_tensor() -> None:
    """Channels of a depthwise convolution with ranges 1 to 100: lost on one grid for the tensor, kept after equalization."""
    plain, images = fold_batch_norms(tiny_towers.tower("fastvit")), tiny_towers.images("fastvit")
    for name, module in plain.named_modules():
        if name.endswith("mlp.conv.conv"):
            factors = torch.logspace(0, 2, len(module.weight), dtype=torch.float64)
            module.weight *= factors[:, None, None, None]
            module.bias *= factors
            plain.get_submodule(name.replace("conv.conv", "fc1")).weight /= factors[:, None, None]
    exact, errors = features(plain, images), []
    for model in (copy.deepcopy(plain), SmoothQuant({"conv": 0.5})(copy.deepcopy(plain), [images])):
        quantize(model, partial(MinMax, 8), partial(MinMax, 8))
        calibrate(model, [images])
        errors.append(float((features(model, images) - exact).norm() / exact.norm()))
    assert errors[1] < 0.5 * errors[0]


def test_what_smoothquant_leaves_alone_in_convolutional_towers() -> None:
    """Behind a GELU, a sum or a gate no factor passes: these layers stay."""
    left = {}
    for name in tiny_towers.CONVOLUTIONS:
        visual = fold_batch_norms(tiny_towers.tower(name))
        layers = quant_layers(quantize(copy.deepcopy(visual), partial(MinMax, 8), None))
        left[name] = set(layers) - SmoothQuant().rewritten(visual)
    assert {name.rsplit(".", 1)[1] for name in left["convnext"]} == {"conv_dw", "fc"}
    # a block's first convolution and its shortcut read the sum before them, but for those that read the stem
    sums = {f"layer{stage}.0.{part}" for stage in (2, 3, 4) for part in ("conv1", "downsample.0")}
    assert left["resnet"] == sums | {f"attnpool.{part}_proj" for part in "kqv"}
    assert not {
        name for name in left["fastvit"] if name.endswith(("qkv", "token_mixer.proj", "fc1")) and "se." not in name
    }
