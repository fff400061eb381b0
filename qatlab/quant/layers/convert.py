"""Quantize a model in place: swap its layers for quantized ones, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn

from qatlab.core.errors import UserError, naming, nearest
from qatlab.quant.layers.attention import Make, linear_of, stand_in
from qatlab.quant.layers.linear import QuantConv2d, QuantLayer, QuantLinear, QuantProjection
from qatlab.quant.layers.lora import LowRank
from qatlab.quant.layers.products import AttentionProducts
from qatlab.quant.layers.trainable import freeze_base
from qatlab.quant.layers.walk import quant_layers
from qatlab.quant.quantizers.base import Quantizer, of_weight
from qatlab.towers import open_clip_text, timm_eva
from qatlab.towers.registry import final_projections
from qatlab.towers.structure import Place, is_plain_convolution, joined, reads_image
from qatlab.towers.timm_products import give_products, is_known

# A quantizer class, or a functools.partial of one, called with channels= and batched=.
Factory = Callable[..., Quantizer]
# An adapter class such as LoRA, or a functools.partial of one, called with in_features= and out_features=.
AdapterFactory = Callable[..., nn.Module]
# AttentionProducts, or a functools.partial of it, called with heads=.
AttentionFactory = Callable[..., AttentionProducts]
Rules = Mapping[str, Mapping[str, Mapping[str, Any] | None] | None]


@dataclass(frozen=True)
class _Site:
    """A module to be replaced: its place, the names of the layers in it, and the function that builds its stand-in."""

    place: Place
    layers: tuple[str, ...]
    build: Callable[[Make], nn.Module]


@dataclass(frozen=True)
class _Slots:
    """The factories of one layer's slots; a slot of None leaves its tensor in full precision, or out for an adapter.

    ``attention`` is for the products of an attention, which have no other slot.
    """

    weight: Factory | None
    act: Factory | None
    adapter: AdapterFactory | None
    attention: AttentionFactory | None

    def __bool__(self) -> bool:
        return any(factory is not None for factory in (self.weight, self.act, self.adapter))


def quantize(
    model: nn.Module,
    weight: Factory | None,
    act: Factory | None,
    rules: Rules | None = None,
    patch_conv: bool = False,
    final_proj: bool = False,
    adapter: AdapterFactory | None = None,
    attention: AttentionFactory | None = None,
) -> nn.Module:
    """Return ``model`` with every linear layer and convolution, attention projections included, swapped for a quantized one.

    ``weight`` and ``act`` make one quantizer per layer, as ``weight(channels=out_features, batched=False)``, with
    ``width=``, the weights per output channel, and ``inputs=``, their input channels, where it takes those, and
    ``act(channels=in_features, batched=True)``; None leaves weights or activations in full precision. ``adapter`` makes
    the trained term of every linear layer, as ``adapter(in_features=..., out_features=...)``. With it, and with a weight
    quantizer that holds one (LRQAT), the model is frozen (``freeze_base``). ``attention`` makes what computes the two
    products of every attention that is known, as ``attention(heads=...)``, and is put into it as ``products``. ``rules``
    maps fnmatch patterns of names, of layers and of <attention>.products, to None (skip it) or to {"weight": ..., "act":
    ..., "adapter": ..., "attention": ...}, each None (skip that tensor or term) or options that override the factory's,
    such as {"bits": 4}; the first pattern that matches decides.
    ``patch_conv`` includes the convolutions that read the image, ``final_proj`` the ``final_projections``. A convolution
    gets no adapter. The Parameters stay those of the model, except that a projection that is a Parameter becomes
    ``<name>.weight``, transposed. The scales are NaN until ``calibrate``.

    Raises UserError, before anything is changed, for a pattern that matches no layer, an unknown option, a model
    without layers or already quantized, an attention that cannot be replaced, and an adapter or products that none gets.
    """
    sites = _all_sites(model, patch_conv, final_proj)
    names = _names(model, sites, patch_conv)
    attentions = {f"{place.name}.products": place for place in _attentions(model, "")}
    slots = _slots([*names, *attentions], _Slots(weight, act, adapter, attention), rules or {})
    products = _products(attentions, slots)
    if attention is not None and not products:
        raise UserError(
            "quant.attention is set, but no attention gets it: leave one that is known out of the rules that skip it, or "
            "set quant/attention=null."
        )

    # All stand-ins are built before the first one is put in, so that an error leaves the model as it was.
    make = partial(_quantized, slots)
    # An attention of which all is skipped stays as it is, with its class and the names of its Parameters.
    chosen = [site for site in sites if site.place.name in products or any(map(slots.__getitem__, site.layers))]
    built = [site.build(make) for site in chosen]
    layers = [layer for module in built for layer in quant_layers(module).values()]
    if adapter is not None and all(layer.adapter is None for layer in layers):
        raise UserError(
            "quant.adapter is set, but no linear layer gets one: leave a linear layer out of the rules that skip it, "
            "or set quant.adapter=null."
        )
    for site, module in zip(chosen, built, strict=True):
        site.place.put(module)
    timm_eva.call_projections(model)
    for name, made in products.items():
        _put_products(model.get_submodule(name), made)
    # Where low-rank factors are trained, the weights stay those of the checkpoint. An LRQAT holds its factors inside
    # the weight quantizer, where ``adapter`` does not show them.
    if any(isinstance(module, LowRank) for layer in layers for module in layer.modules()) or adapter is not None:
        freeze_base(model)
    return model


def _names(model: nn.Module, sites: list[_Site], patch_conv: bool) -> list[str]:
    """Return the names of the layers in ``sites``; UserError where there are none, or none that ``patch_conv`` asks for."""
    names = [name for site in sites for name in site.layers]
    if not names:
        raise UserError(
            f"{type(model).__name__} holds no layer to quantize: pass the encoder that holds linear layers."
        )
    if patch_conv and not any(reads_image(site.place.part) for site in sites):
        raise UserError("quant.first is true, but the model has no convolution that reads an image of 3 channels.")
    return names


def layer_names(model: nn.Module, patch_conv: bool = False, final_proj: bool = False) -> list[str]:
    """Return the names of the layers that ``quantize`` would swap, in the model's order."""
    return [name for site in _all_sites(model, patch_conv, final_proj) for name in site.layers]


def _all_sites(model: nn.Module, patch_conv: bool, final_proj: bool) -> list[_Site]:
    final = final_projections(model)
    if final_proj and not final:
        raise UserError(
            "quant.last is true, but the model has no final projection that is known (open_clip's 'proj', the head of a "
            "timm tower, a ResNet's attention pool): leave it out. The features of SigLIP's towers are those of its pool."
        )
    sites = _sites(model, "", patch_conv)
    if not final_proj:
        # A final projection that is an nn.Linear was found like any other layer.
        kept = [_without(site, final) for site in sites]
        return [site for site in kept if site.layers]
    # A projection that is a bare Parameter was not found, because _sites walks over modules.
    bare = [place for place in final.values() if isinstance(place.part, nn.Parameter)]
    return [*sites, *map(_bare_projection, bare)]


def _without(site: _Site, names: Container[str]) -> _Site:
    """Return ``site`` without the layers of some names: those stay as they are where an attention is replaced as a whole."""
    return replace(site, layers=tuple(name for name in site.layers if name not in names))


def _quantized(
    slots: dict[str, _Slots], name: str, layer: nn.Linear | nn.Conv2d, kind: type[QuantLayer] = QuantLinear
) -> nn.Module:
    """Return the stand-in of one layer, or the layer itself where all of its slots are empty."""
    # A layer without slots is one of an attention that is replaced as a whole, such as a final projection that is kept.
    chosen = slots.get(name)
    if not chosen:
        return layer
    outputs = layer.weight.shape[0]
    # In a convolution of several groups the weight has only the channels of one group.
    inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    weight = None if chosen.weight is None else partial(of_weight, chosen.weight, layer.weight)
    return kind(
        layer,
        _built(name, "weight", weight),
        _built(name, "act", chosen.act, channels=inputs, batched=True),
        _built(
            name,
            "adapter",
            chosen.adapter if kind is not QuantConv2d else None,
            in_features=inputs,
            out_features=outputs,
        ),
    )


def _built(name: str, slot: str, factory: Callable[..., Any] | None, **where: Any) -> Any:
    """Return what a slot's factory makes, or None without one; a UserError gets the slot and the layer's ``name`` in front."""
    with naming(f"quant.{slot} of {name}"):
        return None if factory is None else factory(**where)


def _sites(module: nn.Module, prefix: str, patch_conv: bool) -> Iterator[_Site]:
    """Yield the sites in ``module``, whose full name is ``prefix``, in the model's order."""
    for attribute, child in module.named_children():
        place = Place(joined(prefix, attribute), module, attribute)
        name = place.name
        # Each takes the attention that it replaces, which is why it is there.
        replacing: Any = stand_in(child, module)
        if isinstance(child, QuantLayer):
            raise UserError(f"'{name}' is already quantized: quantize a full-precision model.")
        if replacing is not None:
            # The attention is replaced as a whole, so the walk does not enter it.
            yield _Site(place, tuple(f"{name}.{part}" for part in replacing.layers), partial(replacing, child, name))
        elif isinstance(child, nn.Linear):
            multiplied = open_clip_text.is_told_from_matrix(child, module)
            yield _Site(place, (name,), partial(_made, name, child, QuantProjection if multiplied else QuantLinear))
        elif is_plain_convolution(child):
            if patch_conv or not reads_image(child):
                yield _Site(place, (name,), partial(_made, name, child, QuantConv2d))
        else:
            yield from _sites(child, name, patch_conv)


def _attentions(module: nn.Module, prefix: str) -> Iterator[Place]:
    """Yield the places of the attentions in ``module``, called ``prefix``, that can take ``AttentionProducts``."""
    for attribute, child in module.named_children():
        place = Place(joined(prefix, attribute), module, attribute)
        if stand_in(child, module) is not None or is_known(child):
            yield place
        else:
            yield from _attentions(child, place.name)


def _products(attentions: dict[str, Place], slots: dict[str, _Slots]) -> dict[str, AttentionProducts]:
    """Return {name of an attention: what is to compute its products} of the ``attentions`` by the name of the products."""
    made = {}
    for name, place in attentions.items():
        factory = slots[name].attention
        if factory is not None:
            products = factory(heads=place.part.num_heads)
            made[place.name] = products.to(next(place.part.parameters()).device)
    return made


def _put_products(attention: Any, products: AttentionProducts) -> None:
    """Let ``attention``, a stand-in or an attention of timm, compute its products by ``products``."""
    if is_known(attention):
        give_products(attention, products)
    else:
        attention.products = products


def _made(name: str, layer: nn.Module, kind: type[QuantLayer], make: Callable[..., nn.Module]) -> nn.Module:
    """Return what ``make`` gives for one layer: in a partial this is the ``build`` of a site that is a single layer."""
    return make(name, layer, kind)


def _bare_projection(place: Place) -> _Site:
    """Return the site of a Parameter (in, out), whose stand-in holds it transposed, like an nn.Linear."""
    held = place.part
    parameter = nn.Parameter(held.detach().t().contiguous(), requires_grad=held.requires_grad)
    layer = linear_of(parameter, None).train(place.owner.training)
    return _Site(place, (place.name,), partial(_made, place.name, layer, QuantProjection))


def _slots(names: list[str], default: _Slots, rules: Rules) -> dict[str, _Slots]:
    """Return the slots of every layer by name: those of the first rule that matches the name, or ``default``."""
    slots = dict.fromkeys(names, default)
    decided: set[str] = set()
    for pattern, rule in rules.items():
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            hint = nearest(pattern, names) or f"; the first layer is '{names[0]}'"
            raise UserError(f"quant.rules has the pattern '{pattern}', which matches no layer{hint}.")
        choice = _chosen(pattern, rule, default)
        slots.update(dict.fromkeys([name for name in matches if name not in decided], choice))
        decided.update(matches)
    return slots


def _chosen(pattern: str, rule: Any, default: _Slots) -> _Slots:
    """Return the slots that ``rule`` makes of ``default``; raises UserError naming ``pattern`` for a wrong rule."""
    if rule is None:
        return _Slots(None, None, None, None)
    where, names = f"quant.rules['{pattern}']", [field.name for field in fields(_Slots)]
    if not isinstance(rule, Mapping):
        raise UserError(f"{where} is {rule!r}: write null to skip the layer, or a mapping with {', '.join(names)}.")
    for slot in rule:
        if slot not in names:
            raise UserError(
                f"{where} has the key '{slot}'{nearest(str(slot), names)}: expected one of {', '.join(names)}."
            )
    return _Slots(*(_overridden(where, name, getattr(default, name), rule.get(name, {})) for name in names))


def _overridden(
    where: str, slot: str, factory: Callable[..., Any] | None, options: Mapping[str, Any] | None
) -> Callable[..., Any] | None:
    """Return the factory with a rule's ``options``: None means "skip this slot", {} means "nothing to change"."""
    if options is None or (factory is None and not options):
        return None
    if factory is None:
        raise UserError(f"{where}.{slot} sets options, but there is none to change: quant.{slot} is null.")
    maker = factory.func if isinstance(factory, partial) else factory
    signature = inspect.signature(maker)
    for option in options:
        if option not in signature.parameters:
            hint = nearest(option, signature.parameters)
            raise UserError(f"{where}.{slot} has the option '{option}', which it does not take{hint}.")
    # Options that were given by position get their names, so that a rule can override them too.
    given = signature.bind_partial(*factory.args, **factory.keywords).arguments if isinstance(factory, partial) else {}
    return partial(maker, **{**given, **options})
