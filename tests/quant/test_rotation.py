from __future__ import annotations

import copy
import tarfile
from functools import partial
from itertools import islice
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.config import ModelConfig
from qatlab.core.errors import UserError
from qatlab.models.clip import Clip, load
from qatlab.quant import MinMax, calibrate, layer_report, quant_layers, quantize, verify
from qatlab.quant.quantizers.hadamard import RandomHadamard
from qatlab.quant.rewrites.rotation import Rotation

EVERY = {"residual": True, "mlp": True, "heads": True}
PARTS = [EVERY, *({**dict.fromkeys(EVERY, False), part: True} for part in EVERY)]
W8, A8 = partial(MinMax, 8, per_channel=True), partial(MinMax, 8)


def scrambled(model: nn.Module) -> nn.Module:
    """Every norm with its own weight, bias and a large eps, every bias nonzero, and outlier features in the stream."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.class_embedding[[1, 5, 9]] += 20
        model.ln_pre.bias[3] += 30
    for block in model.transformer.resblocks:
        block.ln_1.eps, block.ln_2.eps = 0.3, 0.4
    return model


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "+".join(key for key in parts if parts[key]))
@pytest.mark.parametrize("act", [QuickGELU, nn.GELU])
def test_the_outputs_stay(build_visual, images: Tensor, act: type, parts: dict[str, bool]) -> None:
    visual = scrambled(build_visual(ls_init_value=0.5))
    for block in visual.transformer.resblocks:
        block.mlp.gelu = act()
    original = copy.deepcopy(visual)
    assert Rotation(seed=3, **parts)(visual, [images]) is visual
    for block, before in zip(visual.transformer.resblocks, original.transformer.resblocks, strict=True):
        assert isinstance(block.ln_1, nn.RMSNorm if parts["residual"] else nn.LayerNorm)
        assert torch.equal(block.mlp.c_fc.weight, before.mlp.c_fc.weight) != parts["residual"]
        assert isinstance(block.mlp[2], RandomHadamard) == parts["mlp"]
        changed = not torch.equal(block.attn.out_proj.weight, before.attn.out_proj.weight)
        assert changed == (parts["residual"] or parts["heads"])
    with torch.no_grad():
        assert difference(visual(images), original(images)) < 1e-5
        assert difference(visual.double()(images.double()), original.double()(images.double())) < 2e-6


def test_without_rounding_the_rewrite_is_exact(build_visual, images: Tensor) -> None:
    visual = scrambled(build_visual()).double()
    original = copy.deepcopy(visual)
    Rotation()(visual, [])
    with torch.no_grad():
        assert difference(visual(images.double()), original(images.double())) < 1e-12


@pytest.mark.parametrize(
    "vision",
    [
        {"width": 48, "head_width": 12},
        {"no_ln_pre": True},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"output_tokens": True},
        {"block_type": "custom", "qk_norm": True, "scale_heads": True, "scale_fc": True},
    ],
    ids=lambda vision: next(iter(vision)),
)
def test_the_towers_of_open_clip(build_visual, images: Tensor, vision: dict) -> None:
    visual = build_visual(**vision)
    original = copy.deepcopy(visual)
    Rotation()(visual, [])
    with torch.no_grad():
        for one, other in zip(_tensors(visual(images)), _tensors(original(images)), strict=True):
            assert difference(one, other) < 1e-5


def _tensors(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def test_the_embedded_model() -> None:
    clip = load(ModelConfig())
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = clip.visual(pixels)
        assert difference(Rotation()(clip.visual, [])(pixels), before) < 1e-5


def test_the_text_tower_without_its_residual_stream() -> None:
    text_cfg = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    vision_cfg = {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision_cfg, text_cfg=text_cfg).eval()
    text = torch.randint(1, 50, (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model.encode_text(text)
        with pytest.raises(UserError, match=r"Transformer's residual stream.*not the tower of a known.*residual=false"):
            Rotation()(model.transformer, [])
        Rotation(residual=False)(model.transformer, [])
        assert difference(model.encode_text(text), before) < 1e-5


def test_modes_parameters_and_state(build_visual, images: Tensor) -> None:
    visual = build_visual().train()
    visual.transformer.resblocks[0].mlp.c_proj.weight.requires_grad_(False)
    parameters = dict(visual.named_parameters())
    rotated = Rotation()(visual, [])
    assert all(module.training for module in rotated.modules())
    assert not any(module.training for module in Rotation()(build_visual().eval(), []).modules())
    kept = [name for name, parameter in rotated.named_parameters() if parameter is parameters.get(name)]
    assert {name for name in parameters if ".attn." in name or ".mlp." in name} <= set(kept)
    assert not rotated.transformer.resblocks[0].mlp.c_proj.weight.requires_grad
    fresh = Rotation(seed=9)(build_visual(), [])
    fresh.load_state_dict(rotated.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(images), rotated.eval()(images))


def test_the_seed_decides(build_visual) -> None:
    one, two, other = (Rotation(seed=seed)(build_visual(), []).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    name = "transformer.resblocks.{}.mlp.rotation.first_signs"
    assert not torch.equal(one[name.format(0)], other[name.format(0)])
    assert not torch.equal(one[name.format(0)], one[name.format(1)])


def test_quantized_after_it(build_visual, images: Tensor) -> None:
    """The layers keep their names, all run, and c_proj's quantizer sees what the rotation gives."""
    names = list(quant_layers(quantize(build_visual(), W8, A8)))
    visual = Rotation()(scrambled(build_visual()), [])
    original = scrambled(build_visual())
    assert list(quant_layers(quantize(visual, W8, A8))) == names
    calibrate(visual, [images])
    assert len(verify(visual, images)) == 16
    seen: dict[str, Tensor] = {}
    mlp = visual.transformer.resblocks[0].mlp
    mlp.rotation.register_forward_hook(lambda module, args, output: seen.update(rotated=output))
    mlp.c_proj.act_quantizer.register_forward_pre_hook(lambda module, args: seen.update(quantized=args[0]))
    with torch.no_grad():
        features = visual(images)
        assert F.cosine_similarity(features, original(images)).min() > 0.99
    assert torch.equal(seen["rotated"], seen["quantized"])


def test_a_training_step_keeps_as_much(build_visual, images: Tensor) -> None:
    """The rotations keep nothing for the backward but their signs."""
    kept = []
    for rewrite in (lambda visual: visual, Rotation()):
        visual = quantize(rewrite(build_visual()), W8, A8)
        calibrate(visual, [images])
        own = {tensor.untyped_storage().data_ptr() for tensor in visual.state_dict().values()}
        saved: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(partial(_note, saved), lambda tensor: tensor):
            visual(images).sum().backward()
        kept.append(sum(size for pointer, size in saved.items() if pointer not in own))
    assert kept[1] <= 1.01 * kept[0]
    assert all(parameter.grad is not None for parameter in visual.parameters())


def _note(saved: dict[int, int], tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    saved[storage.data_ptr()] = storage.nbytes()
    return tensor


def test_an_outlier_feature_costs_nothing_after_it(build_visual, images: Tensor) -> None:
    """A stream with outliers: the inputs of in_proj and c_fc are rounded at least 6 dB better."""
    plain, rotated = (scrambled(build_visual(width=128, head_width=32)) for _ in range(2))
    Rotation()(rotated, [])
    rows = []
    for visual in (plain, rotated):
        quantize(visual, W8, A8)
        calibrate(visual, [images])
        rows.append({row["layer"]: row["act_sqnr_db"] for row in layer_report(visual, images)})
    readers = [name for name in rows[0] if name.endswith(("in_proj", "c_fc"))]
    assert min(rows[1][name] - rows[0][name] for name in readers) > 6


def test_towers_that_cannot_be_rotated(build_visual, quantized: nn.Module) -> None:
    timm = build_visual(timm_model_name="test_convnext", timm_pool="", timm_proj="linear", image_size=160)
    with pytest.raises(UserError, match=r"TimmModel has no transformer blocks of a known form.*leave the rotation out"):
        Rotation()(timm, [])
    with pytest.raises(UserError, match="is quantized or rewritten already"):
        Rotation()(quantized, [])
    for parts in ({}, {"mlp": False}):
        with pytest.raises(UserError, match="already"):
            Rotation(**parts)(Rotation(**parts)(build_visual(), []), [])
    for option, key in (("residual", "scale_attn"), ("heads", "scale_attn_inner")):
        visual = build_visual(block_type="custom", **{key: True})
        state = copy.deepcopy(visual.state_dict())
        with pytest.raises(UserError, match=f"{option}=false"):
            Rotation()(visual, [])
        assert all(torch.equal(value, state[name]) for name, value in visual.state_dict().items())
        Rotation(**{option: False})(visual, [])
    visual = build_visual()
    visual.transformer.resblocks[1].ln_2 = nn.Identity()
    with pytest.raises(UserError, match=r"resblocks\.1' reads the residual stream by Identity and not LayerNorm"):
        Rotation()(visual, [])
    with pytest.raises(UserError, match="all false"):
        Rotation(residual=False, mlp=False, heads=False)


@pytest.fixture(scope="module")
def vit_b16(vit_b16_weights: Path) -> Clip:
    return load(ModelConfig("ViT-B-16", "openai", str(vit_b16_weights)))


@pytest.mark.vit_b16
def test_the_real_vit_b16(vit_b16: Clip, shared_data: Path) -> None:
    """W8A8 absmax: the features stay with a rotation and are lost without one.

    Rotation takes the largest input of c_proj, in standard deviations, from 21-150 to 5-14, and every layer's that read
    the residual stream from 10-60 to under 6.
    """
    with tarfile.open(shared_data / "flickr8k/00000.tar") as tar:
        jpegs = (tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg"))
        pixels = [vit_b16.preprocess.decode(jpeg) for jpeg in islice(jpegs, 8)]
    scales, images = vit_b16.preprocess.normalize(torch.stack(pixels)).split(4)
    plain, rotated = vit_b16.visual, Rotation()(copy.deepcopy(vit_b16.visual), [])
    with torch.no_grad():
        features = plain(images)
        assert difference(rotated(images), features) < 1e-5
    cosines, peaks = [], []
    for visual in (plain, rotated):
        layers = quant_layers(quantize(visual, W8, A8))
        calibrate(visual, [scales])
        peaks.append({})
        for name, layer in layers.items():
            layer.register_forward_pre_hook(_peak(name, peaks[-1]))
        with torch.no_grad():
            cosines.append(F.cosine_similarity(visual(images), features).mean())
    assert len(peaks[1]) == 48
    assert all(peaks[1][name] < 0.5 * peaks[0][name] for name in peaks[0] if not name.endswith("out_proj"))
    assert all(peaks[1][name] < 7 for name in peaks[0] if name.endswith(("in_proj", "c_fc")))
    assert max(peaks[0][name] / peaks[1][name] for name in peaks[0] if name.endswith("c_proj")) > 8
    assert cosines[1] > 0.99 > 0.9 > cosines[0]


def _peak(name: str, peaks: dict[str, float]):
    def look(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        peaks[name] = float(inputs[0].abs().max() / inputs[0].std())

    return look
