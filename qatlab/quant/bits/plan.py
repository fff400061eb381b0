"""Mixed precision: the bits of every layer's weight, chosen by the error that rounding the layer causes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from qatlab.core.domains import Between, Count, OneOf, Positive, Some, checked
from qatlab.core.errors import UserError
from qatlab.quant.bits.allocate import SLACK, bit_rules
from qatlab.quant.bits.sensitivity import gradient_sensitivities, measured_sensitivities
from qatlab.quant.layers.linear import QuantLayer
from qatlab.quant.layers.walk import quant_layers
from qatlab.quant.ptq.calibrate import fit_weights
from qatlab.quant.quantizers.floating import FloatingPoint

Rules = Mapping[str, Any]
# make(rules, **slots of QuantConfig to replace) returns a new quantized copy of the model, not calibrated.
Make = Callable[..., nn.Module]


class MixedPrecision:
    """Returns ``quant.rules`` with the bits of each layer's weight that cost the features least within a budget.

    The budget is ``average_bits`` per weight, or ``megabytes`` (10^6 bytes) of all planned weights of one tower, scales
    left out. Layers that ``quant.rules`` names follow their rules and are no part of the budget. ``candidates`` are the
    bits to choose from. The choice is exact (``allocate_bits``); it minimises a sum over layers of an estimate from the
    first ``images`` calibration images, or captions for a text tower:

    * "measured": 1 - cosine of the features with only that layer's weight rounded, at the middle candidate b, times the
      squared rounding error of the weight at each number of bits relative to that at b.
    * "gradient": RaanA's c * 2^-bits (``gradient_sensitivities``), one forward and backward for all layers.

    Raises UserError for options that do not go together and a budget that cannot be met.
    """

    @checked
    def __init__(
        self,
        average_bits: Annotated[float, Between(1, 8)] | None = None,
        megabytes: Positive | None = None,
        candidates: Annotated[list[Annotated[int, Between(1, 8)]], Some()] | None = None,
        sensitivity: Annotated[str, OneOf("measured", "gradient")] = "measured",
        images: Count = 16,
    ) -> None:
        if (average_bits is None) == (megabytes is None):
            raise UserError(
                f"quant.plan has average_bits={average_bits} and megabytes={megabytes}: it takes one of the two, and null "
                "for the other."
            )
        self.average_bits, self.megabytes, self.images = average_bits, megabytes, images
        self.candidates, self.sensitivity = sorted(set(candidates or range(2, 9))), sensitivity
        # A budget in megabytes shows only with the model's weights what it allows each of them.
        if average_bits is not None:
            self._require_enough(average_bits, "each weight")
        if average_bits is not None and average_bits > self.candidates[-1]:
            raise UserError(
                f"quant.plan.average_bits={average_bits}: no layer gets more than {self.candidates[-1]}, the most bits of "
                "quant.plan.candidates; lower it, or add more bits to these."
            )

    def __call__(self, make: Make, rules: Rules, batches: Callable[[], Iterable[Tensor]]) -> dict[str, Any]:
        """Return {layer: {"weight": {"bits": b}}} for every layer whose weight ``make`` quantizes and no rule names.

        ``make(rules, act=None, adapter=None)`` returns a copy of the model with quantized weights, not calibrated;
        ``batches()`` returns normalised images (B, 3, S, S), or tokens (B, L) of captions.
        """
        images = list(_first(batches(), self.images))
        probe = self.candidates[len(self.candidates) // 2]
        rules = _of_weights(rules)
        # Without activation quantizers no calibration images are needed, because a weight gives its scale by itself.
        base = make(rules, act=None, adapter=None)
        names = [
            name
            for name, layer in quant_layers(base).items()
            if layer.weight_quantizer is not None and not _is_named(name, rules)
        ]
        if not names:
            raise UserError(
                "quant.plan has no layer to choose bits for: give quant/weight=, and leave layers out of the rules."
            )
        for name in names:
            _require_choice(name, quant_layers(base)[name])
        sizes = {name: quant_layers(base)[name].weight.numel() for name in names}
        average = self._average(sum(sizes.values()))
        if self.sensitivity == "gradient":
            coefficients = gradient_sensitivities(base, images)
            costs = {name: self._halving(coefficients[name]) for name in names}
        else:
            costs = self._measured(make, rules, names, images, probe)
        return bit_rules(costs, sizes, average)

    def _average(self, weights: int) -> float:
        """Return the budget in bits per weight; UserError where it is too small, before anything is measured."""
        average = 8e6 * self.megabytes / weights if self.average_bits is None else self.average_bits  # type: ignore[operator]
        self._require_enough(average, f"each of {weights:,} weights")
        return average

    def _require_enough(self, average: float, weights: str) -> None:
        """Raise UserError for a budget below what the least bits of all layers take."""
        if average + SLACK < self.candidates[0]:
            raise UserError(
                f"quant.plan allows {average:.4g} bits for {weights}, and the least of its candidates is "
                f"{self.candidates[0]}: raise average_bits or megabytes, or add fewer bits to quant.plan.candidates."
            )

    def _halving(self, coefficient: float) -> dict[int, float]:
        """Return the cost of a layer by bits; the rounding error of a grid halves with every bit."""
        return {bits: coefficient * 2.0**-bits for bits in self.candidates}

    def _measured(
        self, make: Make, rules: Rules, names: list[str], images: list[Tensor], probe: int
    ) -> dict[str, dict[int, float]]:
        """Return the cost of each layer by bits, from a measurement at ``probe`` bits and the errors of the weights."""
        errors: dict[str, dict[int, float]] = {name: {} for name in names}
        sensitivity: dict[str, float] = {}
        for bits in self.candidates:
            of_bits = {name: {"weight": {"bits": bits}} for name in names}
            model = make({**rules, **of_bits}, act=None, adapter=None)
            fit_weights(model)
            for name, layer in quant_layers(model).items():
                if name in errors:
                    errors[name][bits] = _weight_error(layer)
            # Measuring takes a forward per layer, so it is done for one number of bits. The errors of the weights scale
            # the result to the other numbers.
            if bits == probe:
                sensitivity = measured_sensitivities(model, images)
        costs: dict[str, dict[int, float]] = {}
        for name, of_layer in errors.items():
            # A weight that lies on the grid has the error 0, and 1e-30 avoids a division by 0.
            at_probe = max(of_layer[probe], 1e-30)
            costs[name] = {bits: sensitivity[name] * error / at_probe for bits, error in of_layer.items()}
        return costs


def _is_named(layer: str, rules: Rules) -> bool:
    """Return whether a pattern of the user's rules matches ``layer``."""
    return any(fnmatchcase(layer, pattern) for pattern in rules)


def _require_choice(name: str, layer: QuantLayer) -> None:
    """Raise UserError where the bits of the layer's weight are those of its format."""
    quantizer = layer.weight_quantizer
    if isinstance(quantizer, FloatingPoint):
        raise UserError(
            f"quant.plan chooses bits, and those of {type(quantizer).__name__}, the quant.weight of {name}, are fixed: "
            "choose another quant/weight=, such as mse, or set quant.plan=null."
        )


def _of_weights(rules: Rules) -> Rules:
    """Return the rules without options for activations and adapters.

    ``quantize`` refuses options for a slot that is empty, and these slots are empty while weights are measured.
    """
    return {pattern: _of_weight(rule) for pattern, rule in rules.items()}


def _of_weight(rule: Any) -> Any:
    if not isinstance(rule, Mapping):
        return rule
    return {"weight": rule["weight"]} if "weight" in rule else {}


@torch.no_grad()
def _weight_error(layer: QuantLayer) -> float:
    """Return the squared rounding error of the layer's weight; its quantizer has a scale."""
    assert layer.weight_quantizer is not None
    return float((layer.weight_quantizer(layer.weight).double() - layer.weight.double()).square().sum())


def _first(batches: Iterable[Tensor], images: int) -> Iterator[Tensor]:
    """Yield the first ``images`` images or captions of ``batches``, in batches (B, ...)."""
    for batch in batches:
        if images > 0:
            yield batch[:images]
        images -= len(batch)
