"""How much of an encoder's arithmetic is rounded: its products with a weight, counted by layer in one forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from qatlab.core.errors import UserError
from qatlab.quant.inspect.hooks import on_inputs, on_outputs
from qatlab.quant.layers.walk import attention_products, device_of, evaluating, full_precision, quant_layers

# A run that covers less than these shares is warned, or refused. In a convolutional tower up to 95 % of the products
# stay in full precision, so results under the name W8A8 would be those of another model.
WARNED, REFUSED = 0.9, 0.5
SHARES = ("weight_share", "act_share", "product_share", "skipped_share", "attention_share")
NAMED = 3  # how many layers a line names
_OPERANDS = {"weight": "weight", "act": "activation"}
_ATEN = torch.ops.aten
# The positions of the two factors among the arguments of the operations that multiply.
_FACTORS = {
    _ATEN.mm: (0, 1),
    _ATEN.bmm: (0, 1),
    _ATEN.addmm: (1, 2),
    _ATEN.baddbmm: (1, 2),
    _ATEN.convolution: (0, 1),
}


class Product(NamedTuple):
    """The ``macs`` multiply-accumulates of a layer's weight with its input, and which of the two are rounded.

    ``skipped`` is the pattern of ``quant.rules`` by which the user leaves out the operand that the coverage is judged
    by.
    """

    layer: str
    macs: int
    weight: bool
    act: bool
    skipped: str | None


@dataclass(frozen=True)
class Coverage:
    """The multiply-accumulates of one forward: ``products`` of a weight with its input, and those in ``attention``.

    The products in attention are QK^T and PV, of two activations: ``attention`` counts those that stay in full precision,
    ``rounded_attention`` those whose operands are both rounded (quant.attention). ``judged`` is the operand by
    which the coverage is judged: "weight", or "act" where no weight is to be rounded.
    """

    products: tuple[Product, ...]
    attention: int
    judged: str
    rounded_attention: int = 0

    @property
    def shares(self) -> dict[str, float]:
        """Return the SHARES by name, from 0 to 1.

        The first four are shares of the products with a weight: with the weight rounded, with the activation rounded,
        with both rounded, and with the judged operand left out by ``quant.rules``. The last is that of QK^T and PV in
        full precision among all.
        """
        found = (
            [of for of in self.products if of.weight],
            [of for of in self.products if of.act],
            [of for of in self.products if of.weight and of.act],
            [of for of in self.products if of.skipped is not None],
        )
        total = _macs(self.products)
        shares = [_macs(products) / total for products in found]
        every = total + self.attention + self.rounded_attention
        return dict(zip(SHARES, [*shares, self.attention / every], strict=True))

    @property
    def uncovered(self) -> list[Product]:
        """Return the products whose judged operand is neither rounded nor left out by a rule, the largest first."""
        left = []
        for product in self.products:
            rounded = product.weight if self.judged == "weight" else product.act
            if not rounded and product.skipped is None:
                left.append(product)
        return sorted(left, key=lambda product: -product.macs)

    def beside(self, other: Coverage) -> Coverage:
        """Return the coverage of two towers together."""
        rounded = self.rounded_attention + other.rounded_attention
        return Coverage((*self.products, *other.products), self.attention + other.attention, self.judged, rounded)

    def require(self, partial: bool) -> None:
        """Raise UserError where less than half is covered, unless ``partial`` (quant.partial) allows it."""
        covered = covered_share(self.shares, self.judged)
        if covered < REFUSED and not partial:
            raise UserError(
                f"quant would round the {_OPERANDS[self.judged]} in {_percent(covered)} of the products with a weight, less "
                f"than {100 * REFUSED:.0f} %, and leave in full precision {self._named()}. Choose a model whose layers qatlab "
                "quantizes, or set quant.partial=true to quantize what there is."
            )

    def told(self) -> list[str]:
        """Return the lines that name layers: those that rules leave out, and a warning where coverage is too small."""
        lines = []
        if skipped := [of for of in self.products if of.skipped is not None]:
            patterns = ", ".join(dict.fromkeys(str(of.skipped) for of in skipped))
            share = _percent(self.shares["skipped_share"])
            lines.append(
                f"quant.rules leave out {_layers(len(skipped))}, {share} of the products with a weight: {patterns}"
            )
        if self.rounded_attention:
            every = _macs(self.products) + self.attention + self.rounded_attention
            rounded = _percent(self.rounded_attention / every)
            lines.append(f"QK^T and PV with both operands rounded are {rounded} of all products")
        return [*lines, *(f"{line}: {self._named()}" for line in warning(self.shares, self.judged))]

    def _named(self) -> str:
        """Return the largest layers that are not covered, in words, with their shares."""
        total, left = _macs(self.products), self.uncovered
        named = ", ".join(f"{of.layer} ({_percent(of.macs / total)})" for of in left[:NAMED])
        more = len(left) - NAMED
        return f"{named} and {_layers(more)} more" if more > 0 else named


def covered_share(shares: Mapping[str, float], judged: str) -> float:
    """Return the share of products that a run is judged by: with the operand rounded, or left out by a rule."""
    # What a rule leaves out was decided by the user, so it does not count against the run.
    return shares[f"{judged}_share"] + shares["skipped_share"]


def statement(shares: Mapping[str, float]) -> str:
    """Return the ``shares`` in one line; where only activations are rounded it begins with these."""
    first = "act" if shares["act_share"] and not shares["weight_share"] else "weight"
    skipped = f", {_percent(shares['skipped_share'])} are left out by quant.rules" if shares["skipped_share"] else ""
    return (
        f"{_percent(shares[f'{first}_share'])} of the products with a weight have the {_OPERANDS[first]} rounded, "
        f"{_percent(shares['product_share'])} both operands{skipped}; QK^T and PV, "
        f"{_percent(shares['attention_share'])} of all products, stay in full precision"
    )


def warning(shares: Mapping[str, float], judged: str) -> list[str]:
    """Return the line that warns of products that are not covered, in a list that is empty where they are few."""
    covered = covered_share(shares, judged)
    line = f"warning: {_percent(1 - covered)} of the products with a weight stay in full precision"
    return [line] if covered < WARNED else []


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def coverage(model: nn.Module, sample: Tensor, rules: Mapping[str, Any], judged: str = "weight") -> Coverage:
    """Return what is rounded of a forward of the quantized ``model`` on ``sample``; its scales need not be filled yet.

    ``sample`` is one image (1, 3, S, S) or the tokens of one caption (1, L): only its shape and dtype count. A product
    is one with a weight where a factor is computed from Parameters or buffers alone, and rounded where a layer that
    holds quantizers computes it with its own weight. Products with a constant, as in a Hadamard transform, are not
    counted. ``rules`` are those that ``model`` was quantized by.
    """
    layers = quant_layers(model)
    rounding = {
        name: (layer.weight_quantizer is not None, layer.act_quantizer is not None) for name, layer in layers.items()
    }
    sample = sample.to(device_of(model))
    # In full precision no scales are needed, and no quantizer adds products of its own, as LRQAT does with A B.
    with evaluating(model), full_precision(model), _unfused_attention(), _Products(model, sample) as found:
        model(sample)
    products = []
    for (layer, inside), macs in found.macs.items():
        # A layer's quantizers round only the products that the layer computes itself. Where other code multiplies with
        # the layer's weight, nothing is rounded.
        weight, act = rounding[layer] if inside else (False, False)
        rounded = weight if judged == "weight" else act
        products.append(Product(layer, macs, weight, act, None if rounded else _skipped_by(layer, rules, judged)))
    return Coverage(tuple(products), found.attention, judged, found.rounded_attention)


class _Products(TorchDispatchMode):
    """Inside this context the products of ``model`` on ``sample`` are counted, by layer and by who computes them."""

    def __init__(self, model: nn.Module, sample: Tensor) -> None:
        super().__init__()
        self.macs: Counter[tuple[str, bool]] = Counter()
        self.attention = self.rounded_attention = 0
        self._layers, self._attentions = quant_layers(model), attention_products(model)
        self._handles = ExitStack()
        self._running: list[str] = []
        state = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(tensor): _layer_name(name) for name, tensor in state}
        # The origin of each tensor. For a weight, and for what is computed from that weight alone, the origin is the
        # weight; for the sample, and for what is computed from the sample, it is None.
        self._origin: MutableMapping[Tensor, Tensor | None] = WeakTensorKeyDictionary(
            {tensor: tensor for _, tensor in state}
        )
        self._origin[sample] = None

    def __enter__(self) -> _Products:
        watched = {**self._layers, **self._attentions}
        self._handles.enter_context(on_inputs(watched, lambda name, *_: self._running.append(name)))
        self._handles.enter_context(on_outputs(watched, lambda name, *_: self._running.remove(name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._handles.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        origins = [self._origin[part] for part in _tensors((args, kwargs)) if part in self._origin]
        product = _FACTORS.get(func.overloadpacket)
        if product is not None:
            self._count(
                [args[i] for i in product], flop_registry[func.overloadpacket](*args, **kwargs, out_val=out) // 2
            )
        # Tensors without a known origin, such as a mask that is made in the forward, stay out of the table of origins.
        if product is not None or origins:
            # The result of a product is an activation, even for a learned query, which does not depend on the image.
            activation = product is not None or None in origins
            self._origin.update(dict.fromkeys(_tensors(out), None if activation else origins[0]))
        return out

    def _count(self, factors: list[Tensor], macs: int) -> None:
        """Add a product to the sum of its weight, or to attention; a product with a constant is not counted."""
        origins = [self._origin[factor] for factor in factors if factor in self._origin]
        weight = next((origin for origin in reversed(origins) if origin is not None), None)
        if weight is not None:
            # The innermost layer that runs now computes the product, if the product's weight is the layer's own.
            running = self._running[-1] if self._running else ""
            inside = running in self._layers and self._layers[running].weight is weight
            self.macs[running if inside else self._names[id(weight)], inside] += macs
        elif len(origins) == len(factors):
            if self._running and self._running[-1] in self._attentions:
                self.rounded_attention += macs
            else:
                self.attention += macs


def _tensors(found: Any) -> list[Tensor]:
    return [part for part in tree_leaves(found) if isinstance(part, Tensor)]


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Inside this context torch computes attention by separate products, which a dispatch mode can count."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _layer_name(parameter: str) -> str:
    """Return the layer's name as ``quant.rules`` has it: attn.in_proj for the ``parameter`` attn.in_proj_weight."""
    return parameter.removesuffix(".weight").removesuffix("_weight")


def _skipped_by(layer: str, rules: Mapping[str, Any], slot: str) -> str | None:
    """Return the first pattern of ``rules`` that matches ``layer`` if it leaves ``slot`` out, else None."""
    pattern = next((pattern for pattern in rules if fnmatchcase(layer, pattern)), None)
    rule = None if pattern is None else rules[pattern]
    return pattern if rule is None or rule.get(slot, {}) is None else None


def _macs(products: Iterable[Product]) -> int:
    return sum(of.macs for of in products)
