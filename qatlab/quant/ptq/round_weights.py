"""Correct and round the weights of a calibrated model layer by layer, for the inputs that the rounded layers before give."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from qatlab.quant.layers.linear import QuantLayer
from qatlab.quant.layers.walk import device_of, evaluating, full_precision, quant_layers
from qatlab.quant.ptq.in_step import in_step
from qatlab.quant.ptq.second_moments import SecondMoments, moments_of, rows_of, tried_rows
from qatlab.quant.quantizers.gptq import GPTQ, gptq

DAMPINGS = (0.01, 0.1, 1.0)


class Compensation(Protocol):
    """What fills ``quant.compensate``: changes weights and biases, before they are rounded, to make up for what rounding does."""

    def prepare(self, model: nn.Module) -> None:
        """Give the layers of ``model`` what ``correct`` fills, such as a bias; the corrected state loads into that form."""
        ...

    def layers(self, model: nn.Module) -> dict[str, QuantLayer]:
        """Return the layers of ``model`` that are corrected, by name."""
        ...

    def correct(self, layer: QuantLayer, exact: QuantLayer, inputs: Sequence[Tensor], full: Sequence[Tensor]) -> None:
        """Correct ``layer`` in place: ``exact`` is the same in full precision, and ``full`` are its inputs there, by batch."""
        ...


def round_weights(model: nn.Module, batches: Iterable[Tensor], compensation: Compensation | None = None) -> None:
    """Correct the layers of ``model`` by ``compensation`` and round the weights that a GPTQ rounds, from one pass over ``batches``.

    ``model`` is calibrated. The layers are taken in the order of the forward; the inputs of each are those that the layers
    before it give, corrected and with rounded weights and activations, itself rounded as the layer rounds it. ``batches``
    are normalised images (B, 3, S, S) or, for a text tower, tokens (B, L). Without such layers nothing is read. A second
    forward, in full precision, is made in step where a compensation or GPTAQ compares with it.
    """
    rounded = _rounded_layers(model)
    compensated = {} if compensation is None else compensation.layers(model)
    if not rounded and not compensated:
        return
    with evaluating(model), ExitStack() as contexts:
        images = [batch.to(device_of(model)) for batch in batches if len(batch)]
        runs = [(model, batch) for batch in images]
        full = None
        if compensated or any(quantizer.alpha > 0 for _, quantizer in rounded.values()):
            full = contexts.enter_context(full_precision(copy.deepcopy(model)))
            runs += [(full, batch) for batch in images]
        in_step(runs, {**compensated, **rounded}, _Fitting(rounded, compensated, compensation, full, len(images)))


def reads_inputs(model: nn.Module, compensation: Compensation | None = None) -> bool:
    """Return whether ``round_weights`` has a layer of ``model`` to correct or to round."""
    return bool(_rounded_layers(model)) or (compensation is not None and bool(compensation.layers(model)))


def _rounded_layers(model: nn.Module) -> dict[str, tuple[QuantLayer, GPTQ]]:
    """Return the layers by name whose weight a GPTQ rounds, with the quantizer of the weight."""
    rounded: dict[str, tuple[QuantLayer, GPTQ]] = {}
    for name, layer in quant_layers(model).items():
        if isinstance(layer.weight_quantizer, GPTQ):
            rounded[name] = layer, layer.weight_quantizer
    return rounded


@dataclass(frozen=True)
class _Fitting:
    """What is done to a layer while all batches wait before it: the first ``count`` of them run through ``model``, the rest
    through ``full``, which is the same in full precision."""

    rounded: dict[str, tuple[QuantLayer, GPTQ]]
    compensated: dict[str, QuantLayer]
    compensation: Compensation | None
    full: nn.Module | None
    count: int

    def __call__(self, name: str, inputs: list[Tensor]) -> None:
        """Correct the layer ``name`` and round its weight, for its ``inputs`` in each batch."""
        own, full = inputs[: self.count], inputs[self.count :]
        if name in self.compensated:
            self._correct(name, own, full)
        if name in self.rounded:
            layer, quantizer = self.rounded[name]
            _round(layer, quantizer, own, full if quantizer.alpha > 0 else [])

    def _correct(self, name: str, own: list[Tensor], full: list[Tensor]) -> None:
        assert self.compensation is not None
        assert self.full is not None
        layer, exact = self.compensated[name], self.full.get_submodule(name)
        assert isinstance(exact, QuantLayer)
        self.compensation.correct(layer, exact, own, full)
        layer.unfold()


def _round(layer: QuantLayer, quantizer: GPTQ, inputs: list[Tensor], full: list[Tensor]) -> None:
    """Round the weight of ``layer`` for its ``inputs``, given in ``full`` precision too where GPTAQ reads them."""
    kept, held_out = moments_of(layer, inputs, full)
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
    some = tried_rows(len(rows))
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
