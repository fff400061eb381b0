"""Round the weights of a calibrated model layer by layer, each for the inputs that the rounded layers before it give."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from qatlab.quant.layers.linear import QuantLayer
from qatlab.quant.layers.walk import attention_products, device_of, evaluating, quant_layers
from qatlab.quant.ptq.in_step import in_step
from qatlab.quant.ptq.second_moments import SecondMoments, columns_of, rows_of
from qatlab.quant.quantizers.gptq import GPTQ, gptq

DAMPINGS = (0.01, 0.1, 1.0)
HELD_OUT = 4  # every fourth image
TRIED_ROWS = 64  # of a weight, evenly drawn, on which dampings are tried


def round_weights(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the weights of all layers of ``model`` that a GPTQ rounds by rounded ones, from one pass over ``batches``.

    ``model`` is calibrated. The layers are taken in the order of the forward; the inputs of each are those that the layers
    before it give with rounded weights and activations, itself rounded as the layer rounds it. ``batches`` are normalised
    images (B, 3, S, S) or, for a text tower, tokens (B, L). Without such layers nothing is read.
    """
    chosen = _chosen(model)
    if not chosen:
        return
    with evaluating(model):
        images = [batch.to(device_of(model)) for batch in batches if len(batch)]
        runs = [(model, batch) for batch in images]
        if any(quantizer.alpha > 0 for _, quantizer in chosen.values()):
            full = _in_full_precision(model)
            runs += [(full, batch) for batch in images]
        in_step(runs, chosen, partial(_round, chosen, len(images)))


def reads_inputs(model: nn.Module) -> bool:
    """Return whether ``round_weights`` has a weight of ``model`` to round."""
    return bool(_chosen(model))


def _chosen(model: nn.Module) -> dict[str, tuple[QuantLayer, GPTQ]]:
    """Return the layers by name whose weight a GPTQ rounds, with the quantizer of the weight."""
    chosen: dict[str, tuple[QuantLayer, GPTQ]] = {}
    for name, layer in quant_layers(model).items():
        if isinstance(layer.weight_quantizer, GPTQ):
            chosen[name] = layer, layer.weight_quantizer
    return chosen


def _round(chosen: dict[str, tuple[QuantLayer, GPTQ]], count: int, name: str, inputs: list[Tensor]) -> None:
    """Round the weight of the layer ``name`` for its ``inputs``: of ``count`` batches, and again in full precision."""
    layer, quantizer = chosen[name]
    kept, held_out = _moments(layer, inputs[:count], inputs[count:] if quantizer.alpha > 0 else [])
    weight = rows_of(layer, layer.weight.detach())
    steps = quantizer.column_steps(weight.shape[2]).reshape(weight.shape)
    every = kept.added(held_out)
    found = []
    for group, rows in enumerate(weight):
        damping = quantizer.damping
        if isinstance(damping, str):
            damping = _least_damping(quantizer, rows, steps[group], kept, held_out, group)
        found.append(_rounded(quantizer, rows, steps[group], every.of_group(group), damping))
    layer.weight.copy_(torch.stack(found).view(layer.weight.shape))
    layer.unfold()


def _least_damping(
    quantizer: GPTQ, rows: Tensor, steps: Tensor, kept: SecondMoments, held_out: SecondMoments, group: int
) -> float:
    """Return the one of DAMPINGS whose ``rows`` (m, n), rounded for the ``kept`` inputs, lose least on those ``held_out``."""
    if not held_out.count:
        return DAMPINGS[-1]  # fewer images than are needed to hold one out tell little, and want the most damping
    some = torch.linspace(0, len(rows) - 1, min(len(rows), TRIED_ROWS)).round().long()
    hessian, _ = held_out.of_group(group)
    moments = kept.of_group(group)
    losses: dict[float, float] = {}
    for damping in DAMPINGS:
        error = _rounded(quantizer, rows[some], steps[some], moments, damping) - rows[some]
        losses[damping] = float(((error @ hessian) * error).sum())
    return min(losses, key=losses.__getitem__)


def _rounded(
    quantizer: GPTQ, rows: Tensor, steps: Tensor, moments: tuple[Tensor, Tensor | None], damping: float
) -> Tensor:
    """Return ``rows`` (m, n) on the grid, float64, for inputs with the ``moments`` H and D of ``SecondMoments.of_group``."""
    ends = quantizer.qmin, quantizer.qmax
    act_order, alpha = quantizer.act_order, quantizer.alpha
    return gptq(rows, steps, ends, *moments, damping=damping, act_order=act_order, alpha=alpha)


def _moments(
    layer: QuantLayer, inputs: Sequence[Tensor], full: Sequence[Tensor]
) -> tuple[SecondMoments, SecondMoments]:
    """Return the moments of the layer's rounded inputs over three quarters of the images, and over every fourth image."""
    kept, held_out = SecondMoments(), SecondMoments()
    image = 0
    for place, x in enumerate(inputs):
        rows = columns_of(layer, layer.rounded_input(x, layer.act_quantizer))
        exact = columns_of(layer, full[place]) if full else None
        last = (torch.arange(len(x), device=x.device) + image) % HELD_OUT == HELD_OUT - 1
        image += len(x)
        for moments, which in ((kept, ~last), (held_out, last)):
            if bool(which.any()):
                moments.update(_of_images(rows, which), None if exact is None else _of_images(exact, which))
    return kept, held_out


def _of_images(rows: Tensor, which: Tensor) -> Tensor:
    """Return those of the ``rows`` (groups, B * tokens, n) that belong to the images ``which`` (B,)."""
    return rows.unflatten(1, (len(which), -1))[:, which].flatten(1, 2)


def _in_full_precision(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` that rounds nothing."""
    model = copy.deepcopy(model)
    for layer in quant_layers(model).values():
        layer.weight_quantizer = layer.act_quantizer = None
    for products in attention_products(model).values():
        products.rounds = False
    return model
