"""RepQ: the outputs of norms get one range in all channels, exactly, by factors and shifts that the next layers undo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatlab.core.errors import UserError
from qatlab.quant.layers.attention import calling
from qatlab.quant.layers.walk import device_of, evaluating, quant_layers
from qatlab.quant.ptq.in_step import in_step
from qatlab.quant.quantizers.base import Quantizer
from qatlab.quant.quantizers.lsq import LSQ
from qatlab.towers import timm_eva
from qatlab.towers.rotations import Layer, rotatable

PERCENTILES = (0.999, 0.9999, 0.99999)
# A channel that hardly varies would multiply its weights by next to nothing.
SMALLEST_RATIO = 1e-3

Factory = Callable[..., Quantizer]


@dataclass(frozen=True, eq=False)
class _Site:
    """A LayerNorm with weight and bias, and the layers that read what it gives, with their names."""

    norm: Any
    layers: tuple[Layer, ...]
    names: tuple[str, ...]


class RepQ:
    """Rewrites the blocks of a tower; its outputs stay the same, to float rounding.

    What a LayerNorm gives has a range of its own in each channel. With s_j and z_j the asymmetric grid of channel j, and s~
    and z~ (rounded) their means, r_j = s_j / s~ and c_j = min_j / r_j + z~ s~, the norm's weight becomes w / r and its bias
    b / r - c, so that every channel has the range of one grid (s~, z~) for the whole tensor; the layers behind multiply
    their columns by r and add W c to their biases (Li et al. 2023, "RepQ-ViT", arXiv 2212.08254, Section 3.2). What a grid
    for each channel gives is then to be had from one for the tensor, which ``act`` fits by itself, and which is exported.

    min_j and max_j are those percentiles, of PERCENTILES and what is left of 1, of least squared error in the bits of
    ``act``, a factory as in ``quantize``. A layer without a bias gets one. Norms without a bias, such as RMSNorm, norms
    behind layers, and towers whose windows are padded with zeros (Swin) are left as they are.

    Raises UserError without ``act``, and for one without a zero point.
    """

    def __init__(self, act: Factory | None = None) -> None:
        if act is None:
            raise UserError("RepQ gives rounded activations one range, and quant/act is null: leave RepQ out.")
        quantizer = act(channels=1, batched=True)
        if getattr(quantizer, "symmetric", False) or type(quantizer) is LSQ:
            raise UserError(
                "RepQ shifts all channels into one range that is not symmetric: give quant.act.symmetric=false, or "
                "quant/act=lsq_plus."
            )
        self.levels = quantizer.qmax - quantizer.qmin

    def prepare(self, visual: nn.Module) -> nn.Module:
        """Return ``visual`` with the biases that the rewrite needs, the form that a rewritten state dict loads into."""
        for site in self._sites(visual):
            for layer in site.layers:
                layer.biased()
        # A bias that a layer got is only heeded where the layer is called.
        timm_eva.call_projections(visual)
        return visual

    @torch.no_grad()
    def __call__(self, visual: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
        """Return ``visual``, rewritten in place from one pass over ``batches``, images (B, 3, S, S) or tokens (B, L).

        The images run in step, so that what one norm gives for all of them is in memory at a time. Raises UserError, before
        anything is changed, for a tower without such norms, for no images, and for NaN or infinite values with the name of
        the layer.
        """
        sites = {site.names[0]: site for site in self._sites(visual)}
        images = [batch.to(device_of(visual)) for batch in batches if len(batch)]
        if not images:
            raise UserError("RepQ got no images to calibrate on: it needs at least one.")
        ranges: dict[str, tuple[Tensor, Tensor]] = {}

        def look(name: str, inputs: list[Tensor]) -> None:
            rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
            if not bool(rows.isfinite().all()):
                raise UserError(f"layer {name}: its input holds NaN or infinite values; look for broken images.")
            ranges[name] = channel_ranges(rows, self.levels)

        with evaluating(visual), calling(visual):
            in_step([(visual, batch) for batch in images], sites, look)
        self.prepare(visual)
        for name, site in sites.items():
            _fold(site, *factors_and_shifts(*ranges[name], self.levels))
        return visual

    def rewritten(self, visual: nn.Module) -> set[str]:
        """Return the names of the layers in ``visual``, in full precision, whose inputs get one range."""
        return {name for site in self._sites(visual) for name in site.names}

    def _sites(self, visual: nn.Module) -> list[_Site]:
        """Return the norms of ``visual`` that are rewritten; UserError where there are none, or layers are quantized."""
        sites = list(_found(visual))
        if not sites or quant_layers(visual):
            raise UserError(
                f"RepQ cannot rewrite {type(visual).__name__}: it takes a full-precision tower whose blocks read the "
                "residual stream through LayerNorms with a bias."
            )
        return sites


def _found(visual: nn.Module) -> Iterator[_Site]:
    found = rotatable(visual)
    if found.stream is None:
        return
    for unit in found.units:
        if "residual" in unit.obstacles:
            continue
        names = list(unit.readers.get("residual", ()))
        for reads in unit.reads:
            own, names = names[: len(reads.layers)], names[len(reads.layers) :]
            norm: Any = reads.norm.part
            affine = isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None
            # A layer that is no module of its own cannot be given a bias.
            if affine and all(layer.bias is not None or layer.module is not None for layer in reads.layers):
                yield _Site(norm, reads.layers, tuple(own))


def channel_ranges(rows: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return (low, high), float64 (channels,), of the columns of ``rows`` (N, channels).

    They are those percentiles of PERCENTILES whose asymmetric grid of ``levels`` + 1 values has the least squared error.
    """
    columns = rows.T.double()
    # A percentile near an end is among the few values at that end.
    count = min(columns.shape[1], int((1 - PERCENTILES[0]) * (columns.shape[1] - 1)) + 2)
    highest, lowest = columns.topk(count, dim=1).values, -(-columns).topk(count, dim=1).values
    places = [(1 - percentile) * (columns.shape[1] - 1) for percentile in PERCENTILES]
    lows = torch.stack([_at(lowest, place) for place in places])
    highs = torch.stack([_at(highest, place) for place in places])
    errors = torch.stack([_squared_error(columns, *ends, levels) for ends in zip(lows, highs, strict=True)])
    best = errors.argmin(0, keepdim=True)
    return lows.gather(0, best)[0], highs.gather(0, best)[0]


def factors_and_shifts(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return (r, c), (channels,), of channels that lie between ``low`` and ``high``, each float64 (channels,)."""
    scale = (high - low) / levels
    scale = scale.clamp(min=SMALLEST_RATIO * float(scale.mean()))
    zero = (-low / scale).round()
    mean_scale, mean_zero = scale.mean(), zero.mean().round()
    ratio = scale / mean_scale
    return ratio, low / ratio + mean_zero * mean_scale


def _at(ordered: Tensor, place: float) -> Tensor:
    """Return the value at a ``place`` between two columns of ``ordered`` (channels, k), linearly, (channels,)."""
    before = min(int(place), ordered.shape[1] - 1)
    after = min(before + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, before], ordered[:, after], place - before)


def _squared_error(columns: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
    """Return the squared error of each of ``columns`` (channels, N) on the grid between ``low`` and ``high``, (channels,)."""
    scale = ((high - low) / levels).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    zero = (-low[:, None] / scale).round()
    codes = (columns / scale).round().add_(zero).clamp_(0, levels)
    return codes.sub_(zero).mul_(scale).sub_(columns).square_().sum(1)


def _fold(site: _Site, ratio: Tensor, shift: Tensor) -> None:
    """Divide what the norm gives by ``ratio`` and take ``shift`` from it, and undo both in the layers behind, (channels,)."""
    norm = site.norm
    norm.weight.copy_(norm.weight.double() / ratio)
    norm.bias.copy_(norm.bias.double() / ratio - shift)
    for layer in site.layers:
        weight, bias = layer.weight.double() * ratio, layer.biased()
        layer.weight.copy_(weight)
        bias.copy_(bias.double() + weight @ shift)
