"""Functions on the quantized layers of a model: by name, temporarily in full precision, temporarily in eval mode."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qatlab.core.errors import UserError
from qatlab.quant.layers.linear import QuantLayer
from qatlab.quant.layers.products import AttentionProducts
from qatlab.towers.structure import joined


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Return the quantized layers of ``model`` by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def attention_products(model: nn.Module) -> dict[str, AttentionProducts]:
    """Return the quantized products of attentions in ``model`` by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AttentionProducts)}


@contextmanager
def full_precision(model: nn.Module) -> Iterator[nn.Module]:
    """Inside this context every layer and attention of ``model`` computes with its full-precision operands."""
    # All layers are found before the first one changes, so that an error in between puts every quantizer back.
    held = [(layer, layer.weight_quantizer, layer.act_quantizer) for layer in quant_layers(model).values()]
    rounding = [products for products in attention_products(model).values() if products.rounds]
    try:
        for products in rounding:
            products.rounds = False
        for layer, _, _ in held:
            layer.weight_quantizer = layer.act_quantizer = None
        yield model
    finally:
        for layer, weight, act in held:
            layer.weight_quantizer, layer.act_quantizer = weight, act
        for products in rounding:
            products.rounds = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Inside this context ``model`` is in eval mode without gradients; then each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        # train(mode) would also set the submodules, but each module had a mode of its own.
        for module, mode in modes:
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter of ``model``; here all parameters are on one device."""
    return next(model.parameters()).device


def run_all(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Return the number of images, or texts, after a forward of ``model`` on each of ``batches`` (B, ...)."""
    device, count = device_of(model), 0
    for batch in batches:
        if len(batch):
            model(batch.to(device))
            count += len(batch)
    return count


def require_called(layers: Iterable[str], called: Container[str]) -> None:
    """Raise UserError naming the ``layers`` that a forward never ``called``."""
    missed = [name for name in layers if name not in called]
    if missed:
        raise UserError(
            f"the model's forward never calls {', '.join(missed[:3])}{' ...' if len(missed) > 3 else ''} (it reads the "
            f"weight by itself, or leaves the layer out): skip it with '+quant.rules={{{missed[0]}: null}}'."
        )


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of ``model`` that hold several layers by name: transformer blocks, stages' blocks, pools.

    Only quantized layers count. A part in which others repeat, such as a stage, is left for these; a layer alone is in no
    block.
    """
    return dict(_blocks(model, ""))


def _blocks(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    for attribute, child in module.named_children():
        if _several(child):
            path = joined(name, attribute)
            if any(_repeats(part) for part in child.modules()):
                yield from _blocks(child, path)
            else:
                yield path, child


def _repeats(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList)) and any(map(_several, module.children()))


def _several(module: nn.Module) -> bool:
    """Return whether ``module`` holds more than one quantized layer."""
    return sum(isinstance(part, QuantLayer) for part in module.modules()) > 1
