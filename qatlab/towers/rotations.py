"""Where a rotation can go: between the layers that write features and those that read them, with its inverse behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from open_clip.transformer import AttentionalPooler
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.layers import AttentionPoolLatent, RmsNorm
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from qatlab.towers import open_clip_text, open_clip_vit
from qatlab.towers.edges import ATTENTIONS, MLPS, PRE_NORM, first_layers, is_norm
from qatlab.towers.structure import Block, Place, joined, place

_TRUNKS = (VisionTransformer, Eva, VisionTransformerRelPos)
_UNKNOWN = "has an attention of a form that is not known"


@dataclass(frozen=True, eq=False)
class Layer:
    """The ``weight`` (out, in) and ``bias`` (out,) of a linear layer, or of a part of one; ``module`` where it is a whole one."""

    weight: Tensor
    bias: Tensor | None
    module: nn.Linear | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weight and the bias, also one that the layer got later; the weight alone without one."""
        bias = self.bias if self.module is None else self.module.bias
        return (self.weight,) if bias is None else (self.weight, bias)

    def biased(self) -> Tensor:
        """Return the bias (out,); a layer without one gets a bias of zeros first, which is learned if its weight is."""
        if self.bias is not None:
            return self.bias
        assert self.module is not None  # only layers of timm lack a bias, and those are modules
        if self.module.bias is None:
            self.module.bias = nn.Parameter(self.weight.new_zeros(len(self.weight)), self.weight.requires_grad)
        return self.module.bias


@dataclass(frozen=True, eq=False)
class Reads:
    """A norm of the residual stream, and the layers that read what it gives."""

    norm: Place
    layers: tuple[Layer, ...]


@dataclass(frozen=True, eq=False)
class Writes:
    """A layer whose output is added to the residual stream, times a LayerScale: a module with ``gamma``, or gamma itself."""

    layer: Layer
    scale: Place | None = None

    @property
    def gamma(self) -> Tensor | None:
        """The factors (out,) of the LayerScale, None without one."""
        part = None if self.scale is None else self.scale.part
        return part if isinstance(part, nn.Parameter) else getattr(part, "gamma", None)

    def drop_scale(self) -> None:
        """Take the LayerScale, which has gone into the layer, out of the model."""
        if self.scale is not None and isinstance(self.scale.part, nn.Module):
            self.scale.put(nn.Identity().train(self.scale.owner.training))
        elif self.scale is not None:
            setattr(self.scale.owner, self.scale.attribute, None)


@dataclass(frozen=True, eq=False)
class Heads:
    """The ``rows`` of a ``layer`` that make an attention's values, of ``width`` features each head, and what is ``beside`` it.

    That is a bias (heads * width,), or values (heads * width, n) that come from no token.

    ``out`` (out, heads * width) is the weight that reads the weighted means of the values.
    """

    width: int
    layer: Layer
    rows: slice
    out: Tensor
    beside: Tensor | None = None

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The rows (heads * width, ...) of all tensors that make values."""
        found = tuple(tensor[self.rows] for tensor in self.layer.tensors)
        return found if self.beside is None else (*found, self.beside)


@dataclass(frozen=True, eq=False)
class Hidden:
    """The ``weight`` (out, in) of an mlp's last layer, and the ``slot`` in front of it, where a module can be put.

    The module goes into an nn.Sequential before what lies there, or otherwise behind what lies there.
    """

    slot: Place
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Unit:
    """A transformer block or a pooling attention, called ``name``, and the places for rotations in it.

    ``obstacles`` says of the parts "residual", "heads" and "mlp" that cannot be rotated what stands in the way, and
    ``readers`` has the names of the layers that a part rotates the input of.
    """

    name: str
    reads: tuple[Reads, ...] = ()
    writes: tuple[Writes, ...] = ()
    heads: Heads | None = None
    hidden: Hidden | None = None
    obstacles: Mapping[str, str] = field(default_factory=dict)
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Stream:
    """A residual stream of ``width`` features: what it is read and written by beside the blocks.

    A module behind ``entry`` sees what goes into the first block, but for ``tokens``, Parameters (..., width) that are put
    beside it or added to it later. Where ``entry`` is None, the sum of ``tokens`` goes into the first block. ``exit`` is
    the norm that reads what the last block gives.
    """

    width: int
    entry: Place | None
    exit: Place
    tokens: tuple[nn.Parameter, ...] = ()


@dataclass(frozen=True, eq=False)
class Rotatable:
    """The transformer blocks and pooling attentions of an encoder, and its residual stream; without one, the ``obstacle``."""

    units: tuple[Unit, ...]
    stream: Stream | None
    obstacle: str = ""


def rotatable(visual: nn.Module) -> Rotatable:
    """Return the places for rotations in ``visual``; no units where it has no transformer blocks of a known form."""
    blocks = [_open_clip(block) for block in open_clip_vit.blocks_of(visual)]
    blocks += [_timm(part, name) for name, part in visual.named_modules() if isinstance(part, PRE_NORM)]
    blocks += [_post_norm(part, name) for name, part in visual.named_modules() if isinstance(part, EvaBlockPostNorm)]
    if not blocks:
        return Rotatable((), None)
    pools = [_pool(part, name) for name, part in visual.named_modules() if isinstance(part, AttentionPoolLatent)]
    pools += [_pooler(part, name) for name, part in visual.named_modules() if isinstance(part, AttentionalPooler)]
    stream = _stream(visual, len(blocks))
    units = tuple(blocks + pools)
    return Rotatable(units, None, stream) if isinstance(stream, str) else Rotatable(units, stream)


def is_rms(norm: nn.Module) -> bool:
    """Return whether ``norm`` divides tokens by the root of their mean square, without subtracting their mean."""
    return isinstance(norm, (nn.RMSNorm, RmsNorm))


# -- residual streams -------------------------------------------------------------------------------------------------


def _stream(visual: nn.Module, blocks: int) -> Stream | str:
    """Return the residual stream of ``visual``, which has this many ``blocks``, or what stands in its way."""
    kinds = (OpenClipViT, SwinTransformer, *_TRUNKS, *open_clip_text.TOWERS)
    trunks: list[tuple[str, Any]] = [(name, part) for name, part in visual.named_modules() if isinstance(part, kinds)]
    if len(trunks) != 1:
        return "it is not the tower of a known family"
    name, trunk = trunks[0]
    if isinstance(trunk, SwinTransformer):
        return "patch merging takes the mean of four tokens together, and the stream changes its width there"
    if isinstance(trunk, OpenClipViT):
        return _of_open_clip(trunk, name)
    if isinstance(trunk, open_clip_text.TOWERS):
        # Nothing stands between these tables and the first block.
        return Stream(trunk.transformer.width, None, place(trunk, "ln_final", name), open_clip_text.tables(trunk))
    if len(trunk.blocks) != blocks:
        return f"a block of it is a {type(trunk.blocks[0]).__name__}"
    found = _exit(trunk, name)
    if isinstance(found, str):
        return found
    if isinstance(trunk, VisionTransformerRelPos):
        # Nothing stands between the class token and the first block.
        tokens = () if trunk.cls_token is None else (trunk.cls_token,)
        return Stream(trunk.embed_dim, place(trunk, "patch_embed.norm", name), found, tokens)
    return Stream(trunk.embed_dim, place(trunk, "norm_pre", name), found)


def _of_open_clip(tower: Any, name: str) -> Stream:
    """Return the stream of open_clip's VisionTransformer, which the norm of CoCa's pooling attention reads in place of ln_post."""
    pooled = tower.attn_pool is not None and tower.attn_pool_contrastive is None
    last = place(tower, "attn_pool.ln_k" if pooled else "ln_post", name)
    return Stream(tower.transformer.width, place(tower, "ln_pre", name), last)


def _exit(trunk: Any, name: str) -> Place | str:
    """Return the norm that reads the last block of one of timm's trunks, or what stands in the way."""
    if is_norm(trunk.norm):
        return place(trunk, "norm", name)
    # A norm behind the pooling reads a mean of tokens or one token, which rotates as tokens do; a maximum does not.
    if is_norm(trunk.fc_norm) and trunk.global_pool in ("avg", "token") and getattr(trunk, "attn_pool", None) is None:
        return place(trunk, "fc_norm", name)
    return "no norm that rotates with it reads what its last block gives"


# -- blocks -----------------------------------------------------------------------------------------------------------


def _open_clip(block: Block) -> Unit:
    """Return the places in one of open_clip's blocks."""
    projections = block.projections
    if projections is None:
        return Unit(block.name, obstacles=dict.fromkeys(("residual", "heads", "mlp"), _UNKNOWN))
    obstacles = {}
    if block.norm_after is not None and is_norm(block.norm_after.part):
        obstacles["residual"] = "has a norm between out_proj and the residual stream"
    if projections.inner_norm is not None:
        obstacles["heads"] = "has a norm between the values and out_proj"
    in_proj = Layer(projections.in_weight, projections.in_bias)
    width = projections.out.in_features
    return Unit(
        block.name,
        (Reads(block.norm_1, (in_proj,)), Reads(block.norm_2, (_layer(block.fc1.part),))),
        (Writes(_layer(projections.out), block.scale_1), Writes(_layer(block.fc2.part), block.scale_2)),
        Heads(
            width // projections.heads, in_proj, slice(2 * width, None), projections.out.weight, projections.own_values
        ),
        Hidden(block.fc2, block.fc2.part.weight),
        obstacles,
        {
            "residual": (f"{block.attention.name}.in_proj", block.fc1.name),
            "heads": (f"{block.attention.name}.out_proj",),
            "mlp": (block.fc2.name,),
        },
    )


def _timm(block: Any, name: str) -> Unit:
    """Return the places in one of timm's blocks with norms in front of the attention and of the mlp."""
    unit = _inside(block, name)
    if "residual" in unit.obstacles:
        return unit
    reads, names = [], []
    for norm, part in (("norm1", "attn"), ("norm2", "mlp")):
        module = getattr(block, part)
        layers = first_layers(module)
        reads.append(Reads(place(block, norm, name), tuple(_layer(getattr(module, layer)) for layer in layers)))
        names += [joined(name, f"{part}.{layer}") for layer in layers]
    writes = [
        Writes(_layer(part), _scale(block, number, name))
        for number, part in ((1, block.attn.proj), (2, _last(block.mlp)))
    ]
    readers = {**unit.readers, "residual": tuple(names)}
    return replace(unit, reads=tuple(reads), writes=tuple(writes), readers=readers)


def _post_norm(block: Any, name: str) -> Unit:
    """Return the places in one of EVA's blocks with norms behind the attention and behind the mlp."""
    unit = _inside(block, name)
    obstacle = "has norms between its layers and the residual stream"
    return replace(unit, obstacles={**unit.obstacles, "residual": obstacle})


def _scale(block: nn.Module, number: int, name: str) -> Place | None:
    """Return the place of the LayerScale behind the attention (1) or the mlp (2) of one of timm's blocks."""
    for attribute in (f"ls{number}", f"gamma_{number}"):
        if getattr(block, attribute, None) is not None:
            return place(block, attribute, name)
    return None


def _inside(block: Any, name: str) -> Unit:
    """Return the places in the attention and in the mlp of one of timm's blocks, and what cannot be rotated there."""
    attention, mlp = block.attn, block.mlp
    known = isinstance(attention, ATTENTIONS) and isinstance(attention.proj, nn.Linear) and first_layers(attention)
    obstacles = {} if known else {"residual": _UNKNOWN, "heads": _UNKNOWN}
    if known and is_norm(getattr(attention, "norm", None)):
        obstacles["heads"] = "has a norm between the values and out_proj"
    elif known and getattr(attention, "gate", None) is not None:
        obstacles["heads"] = "has a gate between the values and out_proj"
    if not isinstance(mlp, MLPS) or not isinstance(_last(mlp), nn.Linear):
        obstacles |= dict.fromkeys(("residual", "mlp"), "has an mlp of a form that is not known")
    elif isinstance(mlp, GeGluMlp) and is_norm(mlp.norm):
        obstacles["residual"] = "has a norm of its mlp behind a norm of the block"
    heads = None if "heads" in obstacles else _heads(attention)
    hidden = None if "mlp" in obstacles else _hidden(mlp, joined(name, "mlp"))
    last = joined(name, "mlp.w2" if isinstance(mlp, GeGluMlp) else "mlp.fc2")
    readers = {"heads": (joined(name, "attn.proj"),), "mlp": (last,)}
    return Unit(name, heads=heads, hidden=hidden, obstacles=obstacles, readers=readers)


def _heads(attention: Any) -> Heads:
    """Return the values of one of timm's attentions."""
    width = attention.proj.in_features
    layer, rows = getattr(attention, "v_proj", None), slice(None)
    if layer is None:
        layer, rows = attention.qkv, slice(2 * width, None)
    bias = getattr(attention, "v_bias", None)
    return Heads(width // attention.num_heads, _layer(layer), rows, attention.proj.weight, bias)


def _last(mlp: Any) -> Any:
    """Return the last layer of one of timm's mlps."""
    return mlp.w2 if isinstance(mlp, GeGluMlp) else getattr(mlp, "fc2", None)


def _hidden(mlp: Any, name: str) -> Hidden:
    """Return the place in front of the last layer of one of timm's mlps, which is called ``name``."""
    # A GeGluMlp has its norm in front of its first layers, and only a dropout in front of the last one.
    return Hidden(place(mlp, "drop1" if isinstance(mlp, GeGluMlp) else "norm", name), _last(mlp).weight)


# -- pooling attentions -----------------------------------------------------------------------------------------------


def _pool(pool: Any, name: str) -> Unit:
    """Return the places in timm's pooling attention, which reads the tokens behind the last norm."""
    heads = None
    if isinstance(pool.proj, nn.Linear):
        width = pool.proj.in_features
        heads = Heads(width // pool.num_heads, _layer(pool.kv), slice(width, None), pool.proj.weight)
    hidden = None if pool.mlp is None else _hidden(pool.mlp, joined(name, "mlp"))
    return Unit(
        name,
        heads=heads,
        hidden=hidden,
        readers={"heads": (joined(name, "proj"),), "mlp": (joined(name, "mlp.fc2"),)},
    )


def _pooler(pool: Any, name: str) -> Unit:
    """Return the places in open_clip's attentional pooler."""
    attention = pool.attn
    if not isinstance(attention, nn.MultiheadAttention):
        return Unit(name)
    width = attention.embed_dim
    weight = attention.in_proj_weight if attention.v_proj_weight is None else attention.v_proj_weight
    layer, rows = Layer(weight, attention.in_proj_bias), slice(-width, None)
    heads = Heads(width // attention.num_heads, layer, rows, attention.out_proj.weight)
    return Unit(name, heads=heads, readers={"heads": (joined(name, "attn.out_proj"),)})


def _layer(module: nn.Linear) -> Layer:
    return Layer(module.weight, module.bias, module)
