"""Quantize a model in place: swap its layers for quantized ones, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from open_clip.transformer import Attention as OpenClipAttention
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from qatlab.errors import UserError, nearest
from qatlab.quant.attention import Make, QuantAttention, QuantOpenClipAttention, linear_of
from qatlab.quant.layers import QuantConv2d, QuantLayer, QuantLinear, QuantProjection
from qatlab.quant.quantizer import Quantizer

# A quantizer class, or a functools.partial of one, called with channels= and batched=.
Factory = Callable[..., Quantizer]
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
    """The factories of one layer's two quantizers; None leaves that tensor in full precision."""

    weight: Factory | None
    act: Factory | None

    def __bool__(self) -> bool:
        return self.weight is not None or self.act is not None


def quantize(
    model: nn.Module,
    weight: Factory | None,
    act: Factory | None,
    rules: Rules | None = None,
    patch_conv: bool = False,
    final_proj: bool = False,
) -> nn.Module:
    """Return ``model`` with every linear layer, attention projections included, swapped in place for a quantized one.

    ``weight`` and ``act`` make one quantizer per layer, as ``weight(channels=out_features, batched=False)`` and
    ``act(channels=in_features, batched=True)``; None leaves weights or activations in full precision. ``rules`` maps
    fnmatch patterns of layer names to None (skip the layer) or to {"weight": ..., "act": ...}, each None (skip that
    tensor) or options that override the factory's, such as {"bits": 4}; the first pattern that matches a layer decides.
    ``patch_conv`` includes the patch convolution, ``final_proj`` open_clip's ``proj`` Parameter. The Parameters stay
    those of the model, except that ``proj`` becomes ``proj.weight``, transposed. The scales are NaN until
    ``calibrate``.

    Raises UserError, before anything is changed, for a pattern that matches no layer, an unknown option, a model
    without layers or already quantized, and an attention that cannot be replaced.
    """
    sites = list(_sites(model, "", patch_conv))
    if final_proj:
        sites.append(_final_projection(model))
    names = [name for site in sites for name in site.layers]
    if not names:
        raise UserError(
            f"{type(model).__name__} holds no layer to quantize: pass the encoder that holds linear layers."
        )
    if patch_conv and not any(isinstance(getattr(site.owner, site.attribute), nn.Conv2d) for site in sites):
        raise UserError(
            "quant.patch_conv is true, but the model has no patch convolution (3 channels, stride = kernel size)."
        )
    slots = _slots(names, weight, act, rules or {})

    make = partial(_quantized, slots)
    stand_ins = [(site, site.build(make)) for site in sites if any(slots[name] for name in site.layers)]
    for site, stand_in in stand_ins:
        # torch does not let a module take the name of a Parameter.
        site.owner._parameters.pop(site.attribute, None)
        setattr(site.owner, site.attribute, stand_in)
    return model


def _quantized(
    slots: dict[str, _Slots], name: str, layer: nn.Linear | nn.Conv2d, kind: type[QuantLayer] = QuantLinear
) -> nn.Module:
    """The stand-in of one layer, or the layer itself where neither of its tensors is quantized."""
    make_weight, make_act = slots[name].weight, slots[name].act
    if not slots[name]:
        return layer
    outputs, inputs = layer.weight.shape[:2]
    return kind(
        layer,
        _built("weight", make_weight, channels=outputs, batched=False) if make_weight else None,
        _built("act", make_act, channels=inputs, batched=True) if make_act else None,
    )


def _built(slot: str, factory: Factory, *, channels: int, batched: bool) -> Quantizer:
    """A quantizer of a slot; what is wrong with its options is told with the slot's name."""
    try:
        return factory(channels=channels, batched=batched)
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


def _slots(names: list[str], weight: Factory | None, act: Factory | None, rules: Rules) -> dict[str, _Slots]:
    """The slots of every layer, by the first rule that matches its name."""
    slots = dict.fromkeys(names, _Slots(weight, act))
    decided: set[str] = set()
    for pattern, rule in rules.items():
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            hint = nearest(pattern, names) or f"; the first layer is '{names[0]}'"
            raise UserError(f"quant.rules has the pattern '{pattern}', which matches no layer{hint}.")
        choice = _chosen(pattern, rule, weight, act)
        slots.update(dict.fromkeys([name for name in matches if name not in decided], choice))
        decided.update(matches)
    return slots


def _chosen(pattern: str, rule: Any, weight: Factory | None, act: Factory | None) -> _Slots:
    if rule is None:
        return _Slots(None, None)
    where = f"quant.rules['{pattern}']"
    if not isinstance(rule, Mapping):
        raise UserError(f"{where} is {rule!r}: write null to skip the layer, or a mapping with 'weight' and 'act'.")
    for slot in rule:
        if slot not in ("weight", "act"):
            raise UserError(
                f"{where} has the key '{slot}'{nearest(str(slot), ('weight', 'act'))}: expected 'weight' or 'act'."
            )
    return _Slots(
        _overridden(f"{where}.weight", weight, rule.get("weight", {})),
        _overridden(f"{where}.act", act, rule.get("act", {})),
    )


def _overridden(where: str, factory: Factory | None, options: Mapping[str, Any] | None) -> Factory | None:
    """The factory with a rule's options; None and {} are the rule's "skip this tensor" and "nothing to change"."""
    if options is None or (factory is None and not options):
        return None
    if factory is None:
        raise UserError(f"{where} sets options, but there is no quantizer: quant.weight or quant.act is null.")
    maker = factory.func if isinstance(factory, partial) else factory
    signature = inspect.signature(maker)
    for option in options:
        if option not in signature.parameters:
            hint = nearest(option, signature.parameters)
            raise UserError(f"{where} has the option '{option}', which the quantizer does not take{hint}.")
    # Options that were given by position get their names, so that a rule can override them too.
    given = signature.bind_partial(*factory.args, **factory.keywords).arguments if isinstance(factory, partial) else {}
    return partial(maker, **{**given, **options})
