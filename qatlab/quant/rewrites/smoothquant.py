"""SmoothQuant: activation channels divided by s and the weights that read them multiplied by s, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.core.domains import Between, OneOf, checked
from qatlab.core.errors import UserError, naming, nearest
from qatlab.quant.inspect.hooks import on_inputs
from qatlab.quant.layers.attention import calling
from qatlab.quant.layers.walk import evaluating, quant_layers
from qatlab.quant.quantizers.base import Quantizer, fitted, of_weight
from qatlab.quant.rewrites.inputs import LayerInputs
from qatlab.towers.conv_edges import convolution_edges
from qatlab.towers.edges import ChannelScale, Edge, edges_of
from qatlab.towers.structure import Place

GROUPS = ("in_proj", "out_proj", "c_fc", "c_proj", "conv")
# The floor of both maxima, as in the authors' code (mit-han-lab/smoothquant), gives a channel of zeros a finite s.
SMALLEST_MAXIMUM = 1e-5

Alpha = Annotated[float, Between(0, 1)] | Annotated[str, OneOf("search")]
Factory = Callable[..., Quantizer]


class SmoothQuant:
    """Rewrites the blocks of a tower; its outputs stay the same, to float rounding.

    Every input channel j of a linear layer is divided by s_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha), and column j of
    its weight is multiplied by it (Xiao et al. 2023, arXiv 2211.10438). X is the layer's input over the calibration
    images, W the weight as it was; both maxima are at least 1e-5. The division goes into ln_1 for in_proj (one s for
    queries, keys and values), into ln_2 for c_fc, and into the rows of V in in_proj for out_proj (attention is linear
    in V). For c_proj it goes into a multiplication before c_proj, because no scale passes the activation function; where
    the mlp has a gate, it goes into the layer that the gate multiplies. Layers of other families take the groups of those
    that they correspond to. A convolution ("conv") takes it where a convolution or a norm makes its input and only ReLU
    or averages lie between: dividing rows of one layer and multiplying columns of the next is the equalization across
    layers of Nagel et al. 2019 (arXiv 1906.04721, Eq. 7), with ranges of activations. What has nothing in front that
    could take the division is left as it is.

    ``alpha`` is a number from 0 (only weights count) to 1 (only activations), "search", or a mapping of those from the
    groups in_proj, out_proj, c_fc, c_proj and conv; a group that is None or missing is left as it is. "search" takes for each
    layer the multiple of 0.05 of least squared error between its output in full precision and with ``weight`` and
    ``act`` quantized (factories as in ``quantize``), in steps of 0.2, then 0.1 and 0.05 around the best. The scales
    come from every second image and the error from 256 tokens of the other images, so that the error counts how much
    new images are clipped at the maxima seen before, which grows with alpha.

    After a call ``alphas`` holds the alpha of every layer by name. Raises UserError for an unknown group, an alpha
    outside [0, 1] and a search without quantizers.
    """

    @checked
    def __init__(
        self, alpha: Alpha | Mapping[str, Alpha | None] = 0.5, weight: Factory | None = None, act: Factory | None = None
    ) -> None:
        self.alpha, self.weight, self.act = _by_group(alpha), weight, act
        self.alphas: dict[str, float] = {}
        if "search" in self.alpha.values() and weight is None and act is None:
            raise UserError("alpha is 'search' without quantizers to search with: give weight or act, or a number.")

    def prepare(self, visual: nn.Module) -> nn.Module:
        """Return ``visual`` with the modules that the rewrite adds, so that a rewritten state dict can be loaded."""
        for edge in self._edges(visual):
            if edge.slot is not None:
                _put_scale(edge.slot, edge.readers[0].weight)
        return visual

    @torch.no_grad()
    def __call__(self, visual: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
        """Return ``visual``, rewritten in place from one pass over ``batches`` of normalised images (B, 3, S, S).

        A text tower takes tokens (B, L) int64 instead.

        It keeps two numbers per channel, and in a search 512 inputs per layer. Raises UserError, before anything is
        changed, for a tower without known blocks, for too few images (a search needs 2), and for NaN or infinite values,
        with the layer's name.
        """
        edges = self._edges(visual)
        inputs = {edge: self._inputs(edge.group) for edge in edges}
        _observe(visual, inputs, batches)
        # Every scale is computed before the first weight is changed, because in_proj's weight belongs to two groups.
        alphas, scales = {}, {}
        for edge, seen in inputs.items():
            weight = torch.cat([reader.weight for reader in edge.readers])
            alpha = self.alpha[edge.group]
            with naming(f"layer {edge.readers[0].name}"):
                alphas[edge] = self._search(weight, *seen) if alpha == "search" else alpha
            absmax = torch.stack([part.absmax for part in seen]).amax(0)
            scales[edge] = smoothing_scale(absmax, weight, alphas[edge])
        for edge, scale in scales.items():
            _fold(edge, scale)
        self.alphas = {reader.name: alpha for edge, alpha in alphas.items() for reader in edge.readers}
        return visual

    def rewritten(self, visual: nn.Module) -> set[str]:
        """Return the names of the layers in ``visual``, in full precision, whose inputs are divided."""
        return {reader.name for edge in self._edges(visual) for reader in edge.readers}

    def _edges(self, visual: nn.Module) -> list[Edge]:
        """Return the edges of ``visual`` that are smoothed; UserError where there are none, or layers are quantized."""
        edges = [*edges_of(visual), *convolution_edges(visual)]
        if not edges or quant_layers(visual):
            raise UserError(
                f"SmoothQuant cannot rewrite {type(visual).__name__}: it takes a full-precision image tower with blocks "
                "of open_clip or timm."
            )
        return [edge for edge in edges if edge.group in self.alpha]

    def _inputs(self, group: str) -> list[LayerInputs]:
        """Return the LayerInputs of a layer of ``group``.

        A search has two, over alternating images: the first for the scales, the second for the errors.
        """
        return [LayerInputs(0, 2), LayerInputs(1, 2)] if self.alpha[group] == "search" else [LayerInputs()]

    def _search(self, weight: Tensor, for_scales: LayerInputs, for_errors: LayerInputs) -> float:
        """Return the alpha whose scales, found on ``for_scales``, lose least on the sample of ``for_errors``."""
        # The bias is left out, because it is the same in both outputs that are compared.
        output = F.linear(for_errors.sample, _taps(weight))
        # Keys are twentieths of alpha. Steps of 0.2, then 0.1 and 0.05 around the best, need 10 errors instead of 21.
        errors: dict[int, float] = {}
        tried, best = list(range(0, 21, 4)), 0
        for step in (4, 2, 1):
            for k in tried:
                errors[k] = self._error(weight, output, k / 20, for_scales, for_errors)
            best = min(errors, key=errors.__getitem__)
            tried = [k for k in (best - step // 2, best + step // 2) if 0 <= k <= 20 and k not in errors]
        return best / 20

    def _error(
        self, weight: Tensor, output: Tensor, alpha: float, for_scales: LayerInputs, for_errors: LayerInputs
    ) -> float:
        """Return the squared error of ``output`` (ROWS, out) if both factors are smoothed by ``alpha`` and rounded."""
        scale = smoothing_scale(for_scales.absmax, weight, alpha).to(weight.dtype)
        x, smooth = for_errors.sample / scale, weight * _along_inputs(scale, weight)
        if self.act is not None:
            # The extremes are added, because the sample may miss the
            # largest values, which decide the scale of an absmax grid.
            observed = torch.cat([for_scales.sample / scale, for_scales.extremes(scale)])
            x = fitted(self.act(channels=x.shape[1], batched=True), observed)(x)
        if self.weight is not None:
            smooth = fitted(of_weight(self.weight, smooth), smooth)(smooth)
        return float((F.linear(x, _taps(smooth)) - output).square().sum(dtype=torch.float64))


def smoothing_scale(absmax: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Return s, float64 (in,), from the largest |x| of each input channel (in,) and the ``weight`` (out, in, ...)."""
    of_inputs = absmax.double().clamp(min=SMALLEST_MAXIMUM)
    of_weights = _taps(weight.detach()).abs().amax(0).double().clamp(min=SMALLEST_MAXIMUM)
    return of_inputs**alpha / of_weights ** (1 - alpha)


def _taps(weight: Tensor) -> Tensor:
    """Return a ``weight`` (out, in, ...) as (n, in), a row for each output and each place of a convolution's kernel."""
    return weight.movedim(1, -1).flatten(0, -2)


def _along_inputs(scale: Tensor, weight: Tensor) -> Tensor:
    """Return ``scale`` (in,) in the shape that multiplies the input channels of a ``weight`` (out, in, ...)."""
    return scale.reshape(-1, *[1] * (weight.ndim - 2))


def _by_group(alpha: Alpha | Mapping[str, Alpha | None]) -> dict[str, Any]:
    """Return the alpha of each group that is smoothed, in the order of GROUPS; UserError for an unknown group."""
    by_group = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(GROUPS, alpha)
    for group in by_group:
        if group not in GROUPS:
            hint = nearest(str(group), GROUPS)
            raise UserError(f"alpha has the group '{group}'{hint}: the groups are {', '.join(GROUPS)}.")
    return {group: by_group[group] for group in GROUPS if by_group.get(group) is not None}


def _observe(visual: nn.Module, inputs: dict[Edge, list[LayerInputs]], batches: Iterable[Tensor]) -> None:
    """Let ``inputs`` see what the edges' layers read in a forward of all ``batches``; UserError for too few images or NaN."""
    device, images, size = next(visual.parameters()).device, 0, 0
    # A search divides the images between two LayerInputs, and each of them needs one image.
    least = max(map(len, inputs.values()), default=1)
    # All readers of an edge get the same input.
    seen = {edge.readers[0].name: parts for edge, parts in inputs.items()}

    def remember(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Show the layer's input (B, ..., in) or (B, in, H, W) to all LayerInputs of the layer."""
        for part in seen[name]:
            # Swin cuts an image into windows, which lie side by side in the first dimension. A pixel is a token of a
            # convolution, which has its channels second.
            x = given[0].movedim(1, -1) if isinstance(layer, nn.Conv2d) else given[0]
            part.update(x.reshape(size, -1, x.shape[-1]))

    with evaluating(visual), calling(visual):
        layers = {name: visual.get_submodule(name) for name in seen}
        with on_inputs(layers, remember):
            for batch in filter(len, batches):
                size = len(batch)
                visual(batch.to(device))
                images += size
    if images < least:
        found = "one image" if images else "no images"
        raise UserError(f"SmoothQuant got {found} to calibrate on: it needs at least {least}.")
    for edge, parts in inputs.items():
        tensors = [*(reader.weight for reader in edge.readers), *(part.absmax for part in parts)]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            name = edge.readers[0].name
            raise UserError(f"layer {name}: its input or weight holds NaN or infinite values; look for broken images.")


def _fold(edge: Edge, scale: Tensor) -> None:
    """Multiply the columns of the readers' weights by ``scale`` (in,), and divide what makes their input by it."""
    for reader in edge.readers:
        reader.weight.copy_(reader.weight.double() * _along_inputs(scale, reader.weight))
    makers = edge.makers if edge.slot is None else (_put_scale(edge.slot, edge.readers[0].weight).factor,)
    for maker in makers:
        maker.copy_(maker.double() / scale.reshape(-1, *[1] * (maker.ndim - 1)))


def _put_scale(slot: Place, weight: Tensor) -> ChannelScale:
    """Return the ChannelScale at ``slot``, a new one where there is none, that divides the input of ``weight`` (out, in)."""
    there = getattr(slot.owner, "smooth", slot.part)
    if isinstance(there, ChannelScale):
        return there
    scale = ChannelScale(weight.shape[1]).to(weight)
    if isinstance(slot.owner, nn.Sequential):
        slot.put_before("smooth", scale)
    else:
        slot.put(scale.train(slot.owner.training))
    return scale
