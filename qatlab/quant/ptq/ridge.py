"""Ridge correction of weights and biases for the errors of a layer's rounded inputs, before the weights are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from qatlab.core.domains import Between, OneOf, checked
from qatlab.core.errors import UserError
from qatlab.quant.layers.linear import QuantLayer
from qatlab.quant.layers.walk import quant_layers
from qatlab.quant.ptq.second_moments import SecondMoments, moments_of, rows_of, tried_rows
from qatlab.quant.quantizers.gptq import GPTQ

STRENGTHS = (0.001, 0.01, 0.1, 1.0)


class Ridge:
    """Corrects the weight and bias of every layer whose input is rounded, for the errors of that input.

    With A = [x^, 1] the layer's rounded inputs, and R = (x - x^) W^T what their errors take from its outputs, the correction
    is (A^T A / N + lambda I)^-1 A^T R / N, the ridge regression of R on A (Zhong et al. 2024, "ERQ", arXiv 2407.06794). It
    is added to weight and bias before the weight is rounded, so that a forward costs what it did. x is the input in the
    full-precision model, and x^ that behind the layers before, corrected and rounded.

    lambda is ``strength`` times the mean of the diagonal of A^T A / N; the authors' is a number that depends on how many
    tokens were seen. "search" takes for each layer the one of STRENGTHS that leaves the least error on every fourth image,
    which is left out for that, and no correction where none of them lowers that error.

    A layer without a bias gets one. Raises UserError where no input is rounded, and beside a GPTQ with alpha above 0,
    which makes up for the same errors.
    """

    @checked
    def __init__(
        self, strength: Annotated[float, Between(0, 100, above=True)] | Annotated[str, OneOf("search")] = "search"
    ) -> None:
        self.strength = strength

    def layers(self, model: nn.Module) -> dict[str, QuantLayer]:
        """Return the layers of ``model`` whose input is rounded, by name."""
        return {name: layer for name, layer in quant_layers(model).items() if layer.act_quantizer is not None}

    def prepare(self, model: nn.Module) -> None:
        """Give every layer of ``model`` that is corrected a bias of zeros where it has none."""
        layers = self.layers(model)
        if not layers:
            raise UserError(
                "quant.compensate makes up for rounded inputs of layers, and none is rounded: give quant/act=, or leave "
                "quant/compensate out."
            )
        for layer in layers.values():
            quantizer = layer.weight_quantizer
            if isinstance(quantizer, GPTQ) and quantizer.alpha > 0:
                raise UserError(
                    f"quant.weight.alpha={quantizer.alpha} makes up for the errors of inputs, as quant.compensate does: "
                    "leave one of the two out."
                )
            give_bias(layer)

    def correct(self, layer: QuantLayer, exact: QuantLayer, inputs: Sequence[Tensor], full: Sequence[Tensor]) -> None:
        """Add the correction to the weight and bias of ``layer``, and fit the grid of its weight anew.

        ``exact`` is the layer in full precision, ``inputs`` and ``full`` are the inputs of the two, by batch.
        """
        kept, held_out = moments_of(layer, inputs, full, constant=True)
        weight = rows_of(layer, exact.weight.detach()).double()
        every = kept.added(held_out)
        found = []
        for group, rows in enumerate(weight):
            strength = self._strength(rows, kept, held_out, group)
            if strength is None:
                found.append(rows.new_zeros(len(rows), rows.shape[1] + 1))
            else:
                found.append(ridge(rows, *_given(every, group), strength))
        correction = torch.cat(found)
        assert layer.bias is not None  # ``prepare`` gives one
        layer.weight.copy_(layer.weight.double() + correction[:, :-1].reshape(layer.weight.shape))
        layer.bias.copy_(layer.bias.double() + correction[:, -1])
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.observe(layer.weight)
            layer.weight_quantizer.fit()

    def _strength(self, rows: Tensor, kept: SecondMoments, held_out: SecondMoments, group: int) -> float | None:
        """Return the strength for the ``rows`` (m, n) of a weight, None where no correction is best on what is held out."""
        if not isinstance(self.strength, str):
            return self.strength
        if not held_out.count:
            # Fewer images than are needed to hold one out tell little, and want the least correction.
            return STRENGTHS[-1]
        some = tried_rows(len(rows))
        moments, others = _given(kept, group), _given(held_out, group)
        changes: dict[float | None, float] = {None: 0.0}
        for strength in STRENGTHS:
            changes[strength] = _change_of_error(rows[some], ridge(rows[some], *moments, strength), *others)
        return min(changes, key=changes.__getitem__)


def give_bias(layer: QuantLayer) -> None:
    """Give ``layer`` a bias of zeros where it has none, which is learned if its weight is."""
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)), layer.weight.requires_grad)


def ridge(weight: Tensor, second: Tensor, cross: Tensor, strength: float) -> Tensor:
    """Return the correction of ``weight`` (m, n) and, in the last column, of the bias, float64 (m, n + 1).

    ``second`` (n + 1, n + 1) is A^T A and ``cross`` (n, n + 1) is (x - x^)^T A over the same rows, both divided by one
    number. ``strength`` times the mean of the diagonal of ``second`` is added to that diagonal.
    """
    damped = second.clone()
    damped.diagonal().add_(strength * second.diagonal().mean())
    return torch.cholesky_solve((weight @ cross).T, torch.linalg.cholesky(damped)).T


def _given(moments: SecondMoments, group: int) -> tuple[Tensor, Tensor]:
    """Return what ``ridge`` takes of one group; the constant, which is never rounded, has no error."""
    second, cross = moments.of_group(group)
    assert cross is not None
    return second, cross[:-1]


def _change_of_error(weight: Tensor, correction: Tensor, second: Tensor, cross: Tensor) -> float:
    """Return by how much ``correction`` (m, n + 1) changes the squared error of the outputs of ``weight`` (m, n)."""
    return float((correction * (correction @ second - 2 * weight @ cross)).sum())
