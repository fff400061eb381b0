"""Outlier channels: the input channels that cost a layer its accuracy stay in full precision, chosen on images."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.core.domains import Between, Count, checked
from qatlab.core.errors import UserError, nearest
from qatlab.quant.inspect.hooks import on_inputs
from qatlab.quant.layers.linear import QuantLayer, QuantLinear
from qatlab.quant.layers.outliers import no_outliers, outliers_of
from qatlab.quant.layers.walk import evaluating, full_precision, quant_layers, require_called, run_all
from qatlab.quant.quantizers.base import fitted
from qatlab.quant.rewrites.inputs import LayerInputs

COUNTS = (1, 2, 4, 8, 16, 32)  # channels of a layer that a budget chooses among
# What a layer costs a runtime beside its channels, counted in channels: columns are gathered and an output is added. So a
# budget opens few layers and takes several channels of each.
OPENING = 32


@dataclass(frozen=True)
class _Layer:
    """What decides which channels a layer keeps: their ``order`` (in,), the largest first, and ``errors`` by their number."""

    order: Tensor
    errors: dict[int, float]
    products: float  # of one channel, per image


class OutlierChannels:
    """Keeps input channels of linear layers in full precision, as a small float product beside the quantized one.

    A few channels whose values are far larger than all others stretch the one range of a layer's input, so that everything
    else is rounded to a handful of codes (Dettmers et al. 2022, arXiv 2208.07339). Without them the range is that of the
    rest. The weight has zeros in their columns, so that the layer's output is the same before rounding, and an integer
    product may saturate these inputs.

    ``channels`` is how many each layer keeps, those of the largest |x|. With a ``budget`` layers keep 0 or one of COUNTS, so
    that the float products are at most that share of the products of all linear layers; opening a layer counts like OPENING
    channels. Taken is, again and again, what lowers most per float product the error of a layer's output by the rounding of
    its input, relative to the output, as the mean over 256 tokens of the calibration images. ``layers`` is a pattern of
    layer names. Convolutions are left alone.

    Raises UserError unless one of ``channels`` and ``budget`` is given.
    """

    @checked
    def __init__(
        self,
        channels: Count | None = None,
        budget: Annotated[float, Between(0, 1, above=True)] | None = None,
        layers: str = "*",
    ) -> None:
        if (channels is None) == (budget is None):
            raise UserError(
                f"channels={channels} and budget={budget}: give one of the two, the channels that every layer keeps or the "
                "share of the products that are floats (quant.outliers.budget=null quant.outliers.channels=4)."
            )
        self.channels, self.budget, self.layers = channels, budget, layers

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return ``model``, quantized, with an empty OutlierProduct in every layer that may keep channels.

        A state dict brings the number of channels. Raises UserError where no layer is one that may.
        """
        for layer in self._open(model).values():
            layer.outliers = no_outliers(layer.in_features, layer.weight)
        return model

    @torch.no_grad()
    def __call__(self, model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
        """Return ``model``, quantized and not calibrated, with the chosen channels taken out of its layers, in place.

        ``batches`` are normalised images (B, 3, S, S), or tokens (B, L) for a text tower: one pass, of which the extremes of
        every channel and 256 tokens of each layer are kept. Raises UserError without images, and naming the layer for
        NaN or infinite values and one that the forward never calls.
        """
        layers = self._open(self.prepare(model))
        inputs, images = _observed(model, layers, batches)
        if self.budget is None:
            assert self.channels is not None
            kept = {name: min(self.channels, layer.in_features) for name, layer in layers.items()}
            orders = {name: _largest_first(seen) for name, seen in inputs.items()}
        else:
            found = {name: _measured(layers[name], seen, images) for name, seen in inputs.items()}
            total = sum(of.products * layers[name].in_features for name, of in found.items())
            kept = within_budget(
                {name: of.errors for name, of in found.items()},
                {name: of.products for name, of in found.items()},
                self.budget * total,
            )
            orders = {name: of.order for name, of in found.items()}
        for name, layer in layers.items():
            if kept[name]:
                _take_out(layer, orders[name][: kept[name]].sort().values)
        return model

    def _open(self, model: nn.Module) -> dict[str, QuantLinear]:
        """Return the layers of ``model`` by name that may keep channels: linear ones whose input is rounded."""
        every = quant_layers(model)
        may = {
            name: layer
            for name, layer in every.items()
            if isinstance(layer, QuantLinear) and layer.act_quantizer is not None and fnmatchcase(name, self.layers)
        }
        if not may:
            hint = nearest(self.layers, every) or ""
            raise UserError(
                f"quant.outliers.layers={self.layers} matches no linear layer whose input is rounded{hint}: choose a quant/act, "
                "or another pattern."
            )
        return may


def within_budget(
    errors: Mapping[str, Mapping[int, float]], products: Mapping[str, float], budget: float
) -> dict[str, int]:
    """Return how many channels each layer keeps, at a cost of at most ``budget`` products.

    ``errors`` is a layer's error by the number of channels it keeps, ``products`` what a channel costs. Each step takes the
    change that lowers the sum of errors most per product that it adds; opening a layer costs OPENING channels.
    """
    kept = dict.fromkeys(errors, 0)
    left = budget
    while True:
        best, best_cost, best_gain = None, 0.0, 0.0
        for name, by_count in errors.items():
            for count, error in by_count.items():
                if count <= kept[name]:
                    continue
                cost = products[name] * (count - kept[name] + (0 if kept[name] else OPENING))
                gain = (by_count[kept[name]] - error) / cost
                if cost <= left and gain > best_gain:
                    best, best_cost, best_gain = (name, count), cost, gain
        if best is None:
            return kept
        name, count = best
        kept[name] = count
        left -= best_cost


def _observed(
    model: nn.Module, layers: Mapping[str, QuantLayer], batches: Iterable[Tensor]
) -> tuple[dict[str, LayerInputs], int]:
    """Return the inputs of the ``layers`` of ``model`` in full precision by name, and the number of images."""
    inputs = {name: LayerInputs(sampled=True) for name in layers}

    def remember(name: str, layer: nn.Module, given: tuple[Any, ...]) -> None:
        """Show the layer's input (B, ..., in) to its LayerInputs."""
        inputs[name].update(given[0])

    with evaluating(model), full_precision(model), on_inputs(layers, remember):
        images = run_all(model, batches)
    if images == 0:
        raise UserError("outlier channels got no images: they are chosen on at least one.")
    require_called(layers, [name for name, seen in inputs.items() if seen.tokens])
    for name, seen in inputs.items():
        if not bool(seen.absmax.isfinite().all()):
            raise UserError(f"layer {name}, input: it holds NaN or infinite values; look for broken images.")
    return inputs, images


def _largest_first(seen: LayerInputs) -> Tensor:
    """Return the channels (in,) of a layer's input, that of the largest |x| first."""
    return torch.argsort(seen.absmax, descending=True, stable=True)


def _measured(layer: QuantLinear, seen: LayerInputs, images: int) -> _Layer:
    """Return what decides which channels ``layer`` keeps, from the inputs that were ``seen`` of a number of ``images``."""
    order = _largest_first(seen)
    counts = [0, *(count for count in COUNTS if count < layer.in_features)]
    errors = {count: _rounding_error(layer, seen, order[:count]) for count in counts}
    return _Layer(order, errors, layer.out_features * seen.tokens / images)


def _rounding_error(layer: QuantLinear, seen: LayerInputs, channels: Tensor) -> float:
    """Return what rounding the input costs the output of ``layer`` without ``channels``: the mean over tokens of |e|^2 / |y|^2."""
    x, high, low = (tensor.index_fill(-1, channels, 0) for tensor in (seen.sample, seen.high, seen.low))
    # The two extremes are added, because the sample may miss them, and they decide the range.
    observed = torch.cat([x, x[:1], x[:1]])
    observed[-2, high.argmax()], observed[-1, low.argmin()] = high.max(), low.min()
    # A mean over tokens, each relative to its own output: the few tokens that the outliers fire on are the largest by far.
    assert layer.act_quantizer is not None
    act = fitted(copy.deepcopy(layer.act_quantizer), observed)
    error = F.linear(act(x) - x, layer.weight).square().sum(-1)
    output = F.linear(seen.sample, layer.weight).square().sum(-1)
    some = output > 0
    return float((error[some] / output[some]).mean()) if bool(some.any()) else 0.0


def _take_out(layer: QuantLinear, channels: Tensor) -> None:
    """Move the columns of the ``channels`` (k,) out of the weight of ``layer`` into its OutlierProduct."""
    layer.outliers = outliers_of(layer.in_features, channels, layer.weight)
    layer.weight[:, layer.outliers.channels] = 0
    layer.unfold()
