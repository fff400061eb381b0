"""Every family's description is checked by what it is for: the parts, put together as it says, compute what the tower does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qatlab
from qatlab.towers import open_clip_text, open_clip_vit
from qatlab.towers.registry import FAMILIES, final_projections, tower_of
from qatlab.towers.structure import Block, Tower, activation, place, reads_image

SMALL = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
TIMM_VIT = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
# vision_cfg and image size of towers whose blocks are known, with what open_clip and timm add to them
TRANSFORMERS: dict[str, tuple[dict[str, Any], int]] = {
    "open_clip": (SMALL, 32),
    "open_clip scaled": ({**SMALL, "ls_init_value": 0.5}, 32),
    "open_clip custom": ({**SMALL, "block_type": "custom", "qk_norm": True, "scale_attn": True, "scale_fc": True}, 32),
    "timm": (TIMM_VIT, 160),
    "timm average": ({**TIMM_VIT, "timm_pool": "avg", "timm_proj": None}, 160),
}
OTHERS: dict[str, tuple[dict[str, Any], int]] = {
    "timm convnext": ({"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp"}, 32),
    "resnet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 32}, 64),
}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}


def clip(vision: dict[str, Any], size: int) -> Any:
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(16, {"image_size": size, **vision}, TEXT).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms, biases and scales that are not those of a fresh layer
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.requires_grad_(False)


def described(module: nn.Module, name: str = "") -> Tower:
    tower = tower_of(module, name)
    assert tower is not None
    return tower


def of_parts(block: Block, x: Tensor) -> Tensor:
    """The block's output for x (B, L, d), written out from the parts that the description names."""
    projections = block.projections
    assert projections is not None
    attention: Any = block.attention.part
    q, k, v = F.linear(block.norm_1.part(x), projections.in_weight, projections.in_bias).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (projections.heads, -1)).transpose(1, 2) for part in (q, k, v))
    if hasattr(attention, "ln_q"):
        q, k = attention.ln_q(q), attention.ln_k(k)
    mixed = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    if projections.inner_norm is not None:
        mixed = projections.inner_norm(mixed)
    mixed = F.linear(mixed, projections.out.weight, projections.out.bias)
    x = x + block.scale_1.part(mixed if block.norm_after is None else block.norm_after.part(mixed))
    return x + block.scale_2.part(block.mlp.part(block.norm_2.part(x)))


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_blocks_are_what_their_parts_compute(kind: str) -> None:
    visual = clip(*TRANSFORMERS[kind]).visual
    tower = described(visual)
    assert tower.stream is not None
    x = torch.randn(2, 5, tower.stream.width, generator=torch.Generator().manual_seed(1))
    assert len(tower.blocks) >= 2
    for block in tower.blocks:
        torch.testing.assert_close(of_parts(block, x), block.module(x), rtol=1e-5, atol=1e-5)
        assert block.projections is not None
        assert block.projections.called == kind.startswith("timm")
        # fc1 and fc2 are all that the mlp multiplies with
        layers = [layer for layer in block.mlp.part.modules() if isinstance(layer, nn.Linear)]
        assert [block.fc1.part, block.fc2.part] == layers


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_tower_is_its_blocks_between_its_ends(kind: str) -> None:
    vision, size = TRANSFORMERS[kind]
    visual = clip(vision, size).visual
    tower = described(visual)
    assert tower.stream is not None
    assert tower.patch_conv is not None
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, inputs, output: seen.update({f"{name} in": inputs[0], f"{name} out": output})

    parts = {"first": tower.stream.first_norm.part, "last": tower.stream.last_norm.part}
    parts |= {"start": tower.blocks[0].module, "end": tower.blocks[-1].module, "patches": tower.patch_conv.part}
    for name, part in parts.items():
        part.register_forward_hook(keep(name))
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    features = visual(images)
    assert torch.equal(seen["first out"], seen["start in"])
    if kind == "timm average":  # the norm lies behind the pooling
        pooled = seen["end out"][:, tower.extra_tokens :].mean(1)
        torch.testing.assert_close(seen["last in"], pooled)
        last = seen["last out"]
    else:
        assert torch.equal(seen["last in"], seen["end out"])
        last = seen["last out"][:, 0]
    assert seen["start in"].shape[1] == tower.extra_tokens + seen["patches out"][0, 0].numel()
    assert seen["start in"].shape[2] == tower.stream.width
    assert reads_image(tower.patch_conv.part)
    projection = tower.projections[0].part
    projected = last @ projection if isinstance(projection, nn.Parameter) else projection(last)
    torch.testing.assert_close(projected, features, rtol=1e-5, atol=1e-5)
    assert tower.output_dim == features.shape[1]
    assert tower.image_size == (size, size)
    assert tower.pool is None


@pytest.mark.parametrize("kind", [*TRANSFORMERS, *OTHERS])
def test_names_are_those_of_the_model(kind: str) -> None:
    vision, size = {**TRANSFORMERS, **OTHERS}[kind]
    model = clip(vision, size)
    tower = described(model.visual, "visual")
    places = [*tower.projections]
    if tower.patch_conv is not None and tower.stream is not None:
        places += [tower.patch_conv, tower.stream.first_norm, tower.stream.last_norm]
    for block in tower.blocks:
        assert model.get_submodule(block.name) is block.module
        places += [block.norm_1, block.attention, block.scale_1, block.norm_2, block.mlp, block.fc1, block.fc2]
        places += [block.scale_2, *([] if block.norm_after is None else [block.norm_after])]
    held = {**dict(model.named_modules()), **dict(model.named_parameters())}
    assert all(held[place.name] is place.part for place in places)
    assert set(final_projections(model)) == {place.name for place in tower.projections} | set(
        final_projections(nn.ModuleDict({"text": model.text}))
    )


@pytest.mark.parametrize("kind", OTHERS)
def test_of_other_towers_the_end_is_known(kind: str) -> None:
    vision, size = OTHERS[kind]
    visual = clip(vision, size).visual
    tower = described(visual)
    assert tower.blocks == ()
    assert tower.output_dim == visual(torch.zeros(1, 3, size, size)).shape[1] == tower.projections[-1].part.out_features
    assert tower.image_size == (size, size)


def test_a_quantized_or_foreign_attention_has_no_projections() -> None:
    visual = clip(*TRANSFORMERS["open_clip"]).visual
    visual.transformer.resblocks[1].attn = nn.Identity()
    first, second = described(visual).blocks
    assert first.projections is not None
    assert second.projections is None


def test_each_tower_is_of_one_family_unless_it_is_any_trunks() -> None:
    for vision, size in [*TRANSFORMERS.values(), *OTHERS.values()]:
        visual = clip(vision, size).visual
        matching = [family.__name__.rsplit(".", 1)[1] for family in FAMILIES if family.matches(visual)]  # type: ignore[attr-defined]
        assert len([name for name in matching if name != "timm_trunk"]) <= 1
        assert matching
    assert tower_of(nn.Linear(2, 2)) is None


def test_a_module_is_put_in_the_place_of_a_parameter_and_before_a_layer() -> None:
    visual = clip(*TRANSFORMERS["open_clip"]).visual
    block, added = described(visual).blocks[0], nn.Identity()
    names = [name for name, _ in block.mlp.part.named_children()]
    block.fc2.put_before("added", added)
    assert [name for name, _ in block.mlp.part.named_children()] == [*names[:-1], "added", names[-1]]
    assert list(block.mlp.part)[-2] is added
    block.norm_1.put(nn.Identity())
    assert isinstance(visual.transformer.resblocks[0].ln_1, nn.Identity)
    place(visual, "proj").put(nn.Linear(2, 2))
    assert "proj" not in dict(visual.named_parameters())
    assert visual.get_submodule("proj").in_features == 2


@pytest.mark.parametrize(
    ("layer", "name"),
    [(nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (open_clip.transformer.QuickGELU(), "quick_gelu")],
)
def test_activations_are_named(layer: nn.Module, name: str) -> None:
    tower = nn.Sequential(layer, nn.ReLU())
    assert activation(tower) == ", ".join(sorted([name, "relu"]))
    assert activation(tower, without=tower[1]) == name
    assert activation(nn.Linear(2, 2)) == "unknown"


def test_attention_of_another_release_is_told_from_the_known_one() -> None:
    class Changed(open_clip.transformer.Attention):
        def forward(self, x: Tensor, attn_mask: Tensor | None = None, rope: Tensor | None = None) -> Tensor:
            return x

    assert open_clip_vit.takes_what_is_known(open_clip.transformer.Attention(16, 2))
    assert not open_clip_vit.takes_what_is_known(Changed(16, 2))


def test_a_context_is_cut_where_tensors_are_as_long_as_it() -> None:
    # as wide as it is long: only the first dimension of the embedding is the context
    model = open_clip.CLIP(16, SMALL, {**TEXT, "context_length": 32})
    text = open_clip_text.causal_text(model)
    assert text is not None
    shapes = {name: tuple(tensor.shape) for name, tensor in text.shortened(5).items()}
    assert shapes == {"positional_embedding": (5, 32), "attn_mask": (5, 5)}
    tokens = torch.zeros(3, 32, dtype=torch.long)
    tokens[[0, 1, 2], [4, 31, 1]] = 49  # the highest id ends a text
    assert text.ends(tokens).tolist() == [4, 31, 1]


# -- the only place that knows ----------------------------------------------------------------------------------------

# A class of open_clip or timm, or a module of theirs that holds classes.
CLASSES = re.compile(
    r"^\s*(?:from\s+(?:open_clip|timm)\.(?!constants\b)\S+\s+import"
    r"|from\s+(?:open_clip|timm)\s+import\s+.*[A-Z]"
    r"|import\s+(?:open_clip|timm)\.\S+"
    r"|import\s+timm\b)",
    re.MULTILINE,
)
LOADING = {"models/clip.py", "models/tokenizers.py"}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from open_clip.transformer import Attention", True),
        ("    from timm.models import vision_transformer", True),
        ("from open_clip import CLIP", True),
        ("import timm", True),
        ("import open_clip.transformer", True),
        ("from open_clip.constants import OPENAI_DATASET_MEAN", False),
        ("import open_clip", False),
    ],
)
def test_the_pattern_finds_classes(line: str, found: bool) -> None:
    assert bool(CLASSES.search(line)) == found


def test_only_towers_import_classes_of_open_clip_and_timm() -> None:
    package = Path(qatlab.__file__).parent
    folders = [package, package.parent / "callbacks"]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    guilty = {str(file.relative_to(package.parent)) for file in files if CLASSES.search(file.read_text())}
    known = {f"qatlab/{path}" for path in LOADING}
    assert {path for path in guilty - known if not path.startswith("qatlab/towers/")} == set()
    assert any(path.startswith("qatlab/towers/") for path in guilty)


def test_names_of_blocks_stand_nowhere_else() -> None:
    """resblocks, ln_1, in_proj_weight and the like, in code: sentences for users and docstrings may name them."""
    package = Path(qatlab.__file__).parent
    named = re.compile(r"\.(?:resblocks|ln_1|ln_2|ln_pre|ln_post|ls_1|ls_2|c_fc|attn_pool|attnpool|trunk)\b")
    guilty = {}
    for file in package.rglob("*.py"):
        code = re.sub(r'"""(?s:.*?)"""|f?"[^"\n]*"|#[^\n]*', "", file.read_text())
        if file.parent.name != "towers" and named.search(code):
            guilty[str(file.relative_to(package))] = named.findall(code)
    assert guilty == {}
