"""Quantize a model in place: swap its layers for quantized ones, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from open_clip.transformer import Attention as OpenClipAttention
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from qatlab.errors import UserError, nearest
from qatlab.quant.attention import Make, QuantAttention, QuantOpenClipAttention, linear_of
from qatlab.quant.layers import QuantConv2d, QuantLayer, QuantLinear, QuantProjection, quant_layers
from qatlab.quant.lora import LowRank
from qatlab.quant.quantizer import Quantizer
from qatlab.quant.trainable import freeze_base

# A quantizer class, or a functools.partial of one, called with channels= and batched=.
Factory = Callable[..., Quantizer]
# An adapter class such as LoRA, or a functools.partial of one, called with in_features= and out_features=.
AdapterFactory = Callable[..., nn.Module]
Rules = Mapping[str, Mapping[str, Mapping[str, Any] | None] | None]


@dataclass(frozen=True)
class _Site:
    """A module to be replaced: its owner and name there, the layers in it by name, and how its stand-in is built."""

    owner: nn.Module
    attribute: str
    layers: tuple[str, ...]
    build: Callable[[Make], nn.Module]


@dataclass(frozen=True)
class _Slots:
    """The factories of one layer's slots; None leaves that tensor in full precision, or the adapter out."""

    weight: Factory | None
    act: Factory | None
    adapter: AdapterFactory | None

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
) -> nn.Module:
    """Return ``model`` with every linear layer, attention projections included, swapped in place for a quantized one.

    ``weight`` and ``act`` make one quantizer per layer, as ``weight(channels=out_features, batched=False)``, with
    ``width=``, the weights per output channel, where it takes that, and ``act(channels=in_features, batched=True)``;
    None leaves weights or activations in full precision. ``adapter`` makes the trained term of every linear layer, as
    ``adapter(in_features=..., out_features=...)``. With it, and with a weight quantizer that holds one (LRQAT), the
    model is frozen (``freeze_base``). ``rules`` maps fnmatch patterns of layer names to None (skip the layer) or to
    {"weight": ..., "act": ..., "adapter": ...}, each None (skip that tensor or term) or options that override the
    factory's, such as {"bits": 4}; the first pattern that matches a layer decides. ``patch_conv`` includes the patch
    convolution, which gets no adapter, ``final_proj`` open_clip's ``proj`` Parameter. The Parameters stay those of the
    model, except that ``proj`` becomes ``proj.weight``, transposed. The scales are NaN until ``calibrate``.

    Raises UserError, before anything is changed, for a pattern that matches no layer, an unknown option, a model
    without layers or already quantized, an attention that cannot be replaced, and an adapter that no layer gets.
    """
    sites = _all_sites(model, patch_conv, final_proj)
    names = [name for site in sites for name in site.layers]
    if not names:
        raise UserError(
            f"{type(model).__name__} holds no layer to quantize: pass the encoder that holds linear layers."
        )
    if patch_conv and not any(isinstance(getattr(site.owner, site.attribute), nn.Conv2d) for site in sites):
        raise UserError(
            "quant.patch_conv is true, but the model has no patch convolution (3 channels, stride = kernel size)."
        )
    slots = _slots(names, _Slots(weight, act, adapter), rules or {})

    make = partial(_quantized, slots)
    stand_ins = [(site, site.build(make)) for site in sites if any(slots[name] for name in site.layers)]
    layers = [layer for _, stand_in in stand_ins for layer in quant_layers(stand_in).values()]
    if adapter is not None and all(layer.adapter is None for layer in layers):
        raise UserError(
            "quant.adapter is set, but no linear layer gets one: leave a linear layer out of the rules that skip it, "
            "or set quant.adapter=null."
        )
    for site, stand_in in stand_ins:
        # torch does not let a module take the name of a Parameter.
        site.owner._parameters.pop(site.attribute, None)
        setattr(site.owner, site.attribute, stand_in)
    if any(isinstance(module, LowRank) for layer in layers for module in layer.modules()) or adapter is not None:
        freeze_base(model)
    return model


def layer_names(model: nn.Module, patch_conv: bool = False, final_proj: bool = False) -> list[str]:
    """Return the names of the layers that ``quantize`` would swap, in the model's order."""
    return [name for site in _all_sites(model, patch_conv, final_proj) for name in site.layers]


def _all_sites(model: nn.Module, patch_conv: bool, final_proj: bool) -> list[_Site]:
    return [*_sites(model, "", patch_conv), *([_final_projection(model)] if final_proj else [])]


def _quantized(
    slots: dict[str, _Slots], name: str, layer: nn.Linear | nn.Conv2d, kind: type[QuantLayer] = QuantLinear
) -> nn.Module:
    """The stand-in of one layer, or the layer itself where all of its slots are empty."""
    chosen = slots[name]
    if not chosen:
        return layer
    outputs, inputs = layer.weight.shape[:2]
    takes_width = chosen.weight is not None and "width" in inspect.signature(chosen.weight).parameters
    width = {"width": layer.weight[0].numel()} if takes_width else {}
    return kind(
        layer,
        _built("weight", chosen.weight, channels=outputs, batched=False, **width),
        _built("act", chosen.act, channels=inputs, batched=True),
        _built(
            "adapter", chosen.adapter if kind is not QuantConv2d else None, in_features=inputs, out_features=outputs
        ),
    )


def _built(slot: str, factory: Callable[..., Any] | None, **where: Any) -> Any:
    """What a slot's factory makes, or None without one; what is wrong with its options is told with the slot's name."""
    try:
        return None if factory is None else factory(**where)
    except UserError as error:
        raise UserError(f"quant.{slot}: {error}") from error


def _sites(module: nn.Module, prefix: str, patch_conv: bool) -> Iterator[_Site]:
    for attribute, child in module.named_children():
        name = f"{prefix}{attribute}"
        if isinstance(child, QuantLayer):
            raise UserError(f"'{name}' is already quantized: quantize a full-precision model.")
        if isinstance(child, nn.MultiheadAttention):
            yield _Site(
                module, attribute, (f"{name}.in_proj", f"{name}.out_proj"), partial(QuantAttention, child, name)
            )
        elif isinstance(child, OpenClipAttention):
            stand_in = partial(QuantOpenClipAttention, child, name)
            yield _Site(module, attribute, (f"{name}.in_proj", f"{name}.out_proj"), stand_in)
        elif isinstance(child, nn.Linear):
            yield _Site(module, attribute, (name,), partial(_made, name, child, QuantLinear))
        elif isinstance(child, nn.Conv2d):
            if patch_conv and child.in_channels == 3 and child.stride == child.kernel_size:
                yield _Site(module, attribute, (name,), partial(_made, name, child, QuantConv2d))
        else:
            yield from _sites(child, f"{name}.", patch_conv)


def _made(name: str, layer: nn.Module, kind: type[QuantLayer], make: Callable[..., nn.Module]) -> nn.Module:
    return make(name, layer, kind)


def _final_projection(model: nn.Module) -> _Site:
    for name, module in model.named_modules():
        if isinstance(module, VisionTransformer) and isinstance(module.proj, Tensor):
            layer_name = f"{name}.proj" if name else "proj"
            parameter = nn.Parameter(module.proj.detach().t().contiguous(), requires_grad=module.proj.requires_grad)
            layer = linear_of(parameter, None).train(module.training)
            return _Site(module, "proj", (layer_name,), partial(_made, layer_name, layer, QuantProjection))
    raise UserError(
        "quant.final_proj is true, but the model has no open_clip VisionTransformer with a 'proj' Parameter."
    )


def _slots(names: list[str], default: _Slots, rules: Rules) -> dict[str, _Slots]:
    """The slots of every layer, by the first rule that matches its name."""
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
    if rule is None:
        return _Slots(None, None, None)
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
    """The factory with a rule's options; None and {} are the rule's "skip this slot" and "nothing to change"."""
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
