"""Mixed precision: the bits of every layer's weight, by what rounding that layer costs the features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from qatlab.errors import UserError, nearest
from qatlab.quant.allocate import SLACK, bit_rules
from qatlab.quant.calibrate import fit_weights
from qatlab.quant.layers import QuantLayer, quant_layers
from qatlab.quant.sensitivity import gradient_sensitivities, measured_sensitivities

SENSITIVITIES = ("measured", "gradient")
Rules = Mapping[str, Any]
# make(rules, **slots of QuantConfig to replace) quantizes a new copy of the model, not calibrated.
Make = Callable[..., nn.Module]


class MixedPrecision:
    """Returns ``quant.rules`` with the bits of each layer's weight that cost the features least within a budget.

    The budget is ``average_bits`` per weight, or ``megabytes`` (10^6 bytes) of all the weights planned, scales left out;
    layers that ``quant.rules`` names keep what is said there and are no part of it. ``candidates`` are the bits to choose
    from. The choice is exact (``allocate_bits``); what it minimises is a sum over layers of an estimate from the first
    ``images`` calibration images:

    * "measured": 1 - cosine of the features with only that layer's weight rounded, at the middle candidate b, times the
      squared rounding error of the weight at each number of bits relative to that at b.
    * "gradient": RaanA's c * 2^-bits (``gradient_sensitivities``), one forward and backward for all layers.

    Raises UserError for options that do not go together and a budget that cannot be met.
    """

    def __init__(
        self,
        average_bits: float | None = None,
        megabytes: float | None = None,
        candidates: list[int] | None = None,
        sensitivity: str = "measured",
        images: int = 16,
    ) -> None:
        if (average_bits is None) == (megabytes is None):
            raise UserError(
                f"quant.plan has average_bits={average_bits} and megabytes={megabytes}: it takes one of the two, and null "
                "for the other."
            )
        if sensitivity not in SENSITIVITIES:
            raise UserError(
                f"quant.plan.sensitivity={sensitivity} is unknown{nearest(sensitivity, SENSITIVITIES)}; there are "
                f"{', '.join(SENSITIVITIES)}."
            )
        if images < 1:
            raise UserError(f"quant.plan.images={images}: sensitivities are measured on at least one image.")
        self.average_bits, self.megabytes, self.images = average_bits, megabytes, images
        self.candidates, self.sensitivity = sorted(set(candidates or range(2, 9))), sensitivity

    def __call__(self, make: Make, rules: Rules, batches: Callable[[], Iterable[Tensor]]) -> dict[str, Any]:
        """Return {layer: {"weight": {"bits": b}}}; ``make(rules, act=None)`` gives the model with quantizers to measure."""
        images = list(_first(batches(), self.images))
        probe = self.candidates[len(self.candidates) // 2]
        rules = _of_weights(rules)
        base = make(rules, act=None, adapter=None)
        names = [
            name
            for name, layer in quant_layers(base).items()
            if layer.weight_quantizer is not None and not any(fnmatchcase(name, pattern) for pattern in rules)
        ]
        if not names:
            raise UserError(
                "quant.plan has no layer to choose bits for: give quant/weight=, and leave layers out of the rules."
            )
        sizes = {name: quant_layers(base)[name].weight.numel() for name in names}
        average = self._average(sum(sizes.values()))
        if self.sensitivity == "gradient":
            coefficients = gradient_sensitivities(base, images)
            costs = {name: {b: coefficients[name] * 2.0**-b for b in self.candidates} for name in names}
        else:
            costs = self._measured(make, rules, names, images, probe)
        return bit_rules(costs, sizes, average, act=False)

    def _average(self, weights: int) -> float:
        """The budget in bits per weight; a UserError, before anything is measured, where it is too small."""
        average = 8e6 * self.megabytes / weights if self.average_bits is None else self.average_bits  # type: ignore[operator]
        if average + SLACK < self.candidates[0]:
            raise UserError(
                f"quant.plan allows {average:.4g} bits for each of {weights:,} weights, and the least of its candidates is "
                f"{self.candidates[0]}: raise average_bits or megabytes, or add fewer bits to quant.plan.candidates."
            )
        return average

    def _measured(
        self, make: Make, rules: Rules, names: list[str], images: list[Tensor], probe: int
    ) -> dict[str, dict[int, float]]:
        errors: dict[str, dict[int, float]] = {name: {} for name in names}
        sensitivity: dict[str, float] = {}
        for bits in self.candidates:
            model = make({**rules, **{name: {"weight": {"bits": bits}} for name in names}}, act=None, adapter=None)
            fit_weights(model)
            for name, layer in quant_layers(model).items():
                if name in errors:
                    errors[name][bits] = _weight_error(layer)
            if bits == probe:
                sensitivity = measured_sensitivities(model, images)
        return {
            name: {bits: sensitivity[name] * error / max(of[probe], 1e-30) for bits, error in of.items()}
            for name, of in errors.items()
        }


def _of_weights(rules: Rules) -> Rules:
    """The rules without options for activations and adapters: where these are left out, quantize() would refuse them."""
    return {
        pattern: {slot: options for slot, options in rule.items() if slot == "weight"}
        if isinstance(rule, Mapping)
        else rule
        for pattern, rule in rules.items()
    }


@torch.no_grad()
def _weight_error(layer: QuantLayer) -> float:
    """The squared rounding error of a layer's weight, its quantizer fitted."""
    assert layer.weight_quantizer is not None
    return float((layer.weight_quantizer(layer.weight).double() - layer.weight.double()).square().sum())


def _first(batches: Iterable[Tensor], images: int) -> Iterator[Tensor]:
    for batch in batches:
        if images > 0:
            yield batch[:images]
        images -= len(batch)
