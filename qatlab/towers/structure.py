"""The description of an encoder: where its parts are, in words that every family shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Activation functions have one name in qatlab, because open_clip, timm and torch call their classes differently.
# "GELUTanh" also stands for torch's GELU with approximate="tanh".
_ACTIVATIONS = {
    "QuickGELU": "quick_gelu",
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "SiLU": "silu",
    "ReLU": "relu",
}


@dataclass(frozen=True)
class Place:
    """The place of a module or Parameter: the ``attribute`` of ``owner``, with the full ``name`` in the model."""

    name: str
    owner: nn.Module
    attribute: str

    @property
    def part(self) -> Any:
        """The module or Parameter that is at this place now."""
        return getattr(self.owner, self.attribute)

    def put(self, module: nn.Module) -> None:
        """Put ``module`` at this place; the module or Parameter that was there leaves the model."""
        # torch does not let a module take the name of a Parameter, so the Parameter is removed first.
        self.owner._parameters.pop(self.attribute, None)
        setattr(self.owner, self.attribute, module)

    def put_before(self, attribute: str, module: nn.Module) -> None:
        """Let the owner, an nn.Sequential, call ``module``, its new ``attribute``, just before the module here.

        The order of a Sequential is the order of its children, so the later children are taken out and put back.
        """
        children = list(self.owner.named_children())
        here = [name for name, _ in children].index(self.attribute)
        for name, _ in children[here:]:
            delattr(self.owner, name)
        for name, child in [(attribute, module), *children[here:]]:
            self.owner.add_module(name, child)


@dataclass(frozen=True)
class Projections:
    """The weights with which an attention multiplies its tokens, as long as none of them is quantized.

    ``in_weight`` (3d, d) and ``in_bias`` (3d,) or None hold the rows of queries, keys and values, in this order;
    ``out`` is the layer after the heads, and ``own_values`` (d, n) are values that the attention finds beside those of its
    tokens, the heads' channels first, None without any. ``inner_norm`` is between the values and ``out``. ``called`` says
    whether the attention calls layers for both products. Where it reads their weights instead, a quantized layer in their
    place would never run.
    """

    heads: int
    in_weight: Tensor
    in_bias: Tensor | None
    out: nn.Linear
    inner_norm: nn.LayerNorm | None
    called: bool
    own_values: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """A transformer block: x + scale_1(norm_after(attention(norm_1(x)))), then x + scale_2(mlp(norm_2(x))).

    The mlp is fc1, an activation function, and fc2. ``projections`` is None where the form of the attention is not
    known, as after quantization. ``norm_after`` is None in a block without a norm between the attention and the
    residual stream.
    """

    name: str
    module: nn.Module
    norm_1: Place
    attention: Place
    norm_after: Place | None
    scale_1: Place
    norm_2: Place
    mlp: Place
    fc1: Place
    fc2: Place
    scale_2: Place
    projections: Projections | None


@dataclass(frozen=True)
class Stream:
    """The residual stream of a tower: its ``width``, and the norms before the first block and after the last one."""

    width: int
    first_norm: Place
    last_norm: Place


@dataclass(frozen=True)
class Tower:
    """An encoder as its family describes it; parts that the family lacks or does not describe are None or empty.

    ``projections`` are the layers that bring the features to the width of the embedding: an nn.Linear, or a Parameter P
    that the tower applies as ``x @ P``. ``extra_tokens`` come before the patches' tokens in a block's input. ``pool``
    is an attention that makes one feature of all tokens. ``output_dim`` is the length of the features, ``image_size``
    in pixels (height, width).
    """

    module: nn.Module
    projections: tuple[Place, ...]
    blocks: tuple[Block, ...] = ()
    stream: Stream | None = None
    patch_conv: Place | None = None
    pool: nn.Module | None = None
    extra_tokens: int = 0
    output_dim: int | None = None
    image_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class CausalText:
    """A text tower in which a token sees only earlier tokens, so that tokens after the end of a text change nothing.

    ``module`` holds the tensors that are as long as the ``context``: ``per_token`` gives their names, and how many of
    their first dimensions have that length. ``ends`` maps tokens (N, context) to the places (N,) at which the features
    are read.
    """

    module: nn.Module
    context: int
    per_token: Mapping[str, int]
    ends: Callable[[Tensor], Tensor]

    def shortened(self, length: int) -> dict[str, Tensor]:
        """Return the tensors ``per_token`` by name, cut to a context of ``length``: (length, ...) or (length, length).

        They are views of the tower's own tensors.
        """
        cut = (slice(length),)
        return {name: getattr(self.module, name)[cut * dimensions] for name, dimensions in self.per_token.items()}


def place(owner: nn.Module, path: str, prefix: str = "") -> Place:
    """Return the place of ``path``, such as "mlp.c_fc", below ``owner``, whose own name in the model is ``prefix``."""
    *parents, attribute = path.split(".")
    return Place(joined(prefix, path), owner.get_submodule(".".join(parents)), attribute)


def joined(prefix: str, name: str) -> str:
    """Return the full name of ``name`` in a module with the full name ``prefix``, "" for the model itself."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def linear_places(owner: nn.Module, part: nn.Module, prefix: str = "") -> tuple[Place, ...]:
    """Return the places of the nn.Linear layers in ``part``, a module somewhere in ``owner``, in the owner's order."""
    # Modules are compared by identity, because ``part`` does not know its name in ``owner``.
    within = {id(module) for module in part.modules()}
    return tuple(
        place(owner, name, prefix)
        for name, module in owner.named_modules()
        if id(module) in within and isinstance(module, nn.Linear)
    )


def reads_image(module: nn.Module) -> bool:
    """Return whether ``module`` is a first layer: a convolution of 3 channels, the patch convolution of a ViT among them."""
    return isinstance(module, nn.Conv2d) and module.in_channels == 3


def is_plain_convolution(module: nn.Module) -> bool:
    """Return whether ``module`` computes just what nn.Conv2d computes, with zeros around the image."""
    # Subclasses of timm, such as one with standardized weights, compute another weight or another padding.
    return (
        isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward and module.padding_mode == "zeros"
    )


def activation(tower: nn.Module, without: nn.Module | None = None) -> str:
    """Return the names of the activation functions in ``tower``, such as "quick_gelu" or "gelu, relu".

    Functions in ``without``, a part of the tower, are left out. "unknown" is returned where no known function is found.
    """
    # The modules are inspected, not the model's configuration,
    # because OpenAI's weights may be loaded into a model with GELU.
    left_out = set(without.modules()) if without is not None else set()
    kinds = {_kind(module) for module in tower.modules() if module not in left_out}
    return ", ".join(name for kind, name in sorted(_ACTIVATIONS.items()) if kind in kinds) or "unknown"


def _kind(module: nn.Module) -> str:
    """Return the name of the module's class; a GELU with tanh gets a name of its own."""
    return "GELUTanh" if getattr(module, "approximate", None) == "tanh" else type(module).__name__
