"""SmoothQuant: activation channels divided by s and the weights that read them multiplied by s, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.errors import UserError, nearest
from qatlab.quant.attention import QuantAttention
from qatlab.quant.inputs import LayerInputs
from qatlab.quant.layers import evaluating
from qatlab.quant.quantizer import Quantizer

KINDS = {"ln_1": nn.LayerNorm, "attn": nn.MultiheadAttention, "ln_2": nn.LayerNorm, "mlp": nn.Sequential}
KINDS |= {"mlp.c_fc": nn.Linear, "mlp.c_proj": nn.Linear}
PATHS = {"in_proj": "attn.in_proj", "out_proj": "attn.out_proj", "c_fc": "mlp.c_fc", "c_proj": "mlp.c_proj"}
SMALLEST_MAXIMUM = 1e-5  # so that a dead channel has a finite s

Alpha = float | str | None
Factory = Callable[..., Quantizer]


class SmoothQuant:
    """Rewrites the blocks of an open_clip VisionTransformer; its outputs stay the same, to float rounding.

    Every input channel j of a linear layer is divided by s_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha), and column j of
    its weight is multiplied by it (Xiao et al. 2023, arXiv 2211.10438). X is the layer's input over the calibration
    images, W the weight as it was; both maxima are at least 1e-5. The division goes into ln_1 for in_proj (one s for
    queries, keys and values), into ln_2 for c_fc, into the rows of V in in_proj for out_proj (attention is linear in V),
    and for c_proj, whose activation function no scale can pass, into a multiplication ``mlp.smooth`` before it.

    ``alpha`` is a number from 0 (only weights count) to 1 (only activations), "search", or a mapping of those from the
    groups in_proj, out_proj, c_fc and c_proj; a group that is None or missing is left as it is. "search" takes for each
    layer the multiple of 0.05 of least squared error between its output in full precision and with ``weight`` and
    ``act`` quantized (factories as in ``quantize``), in steps of 0.2, then 0.1 and 0.05 around the best. Its scales come
    from every second image, the error from 256 tokens of the others: an image is clipped where it passes the maxima
    seen before, the more the larger alpha is.

    After a call ``alphas`` holds the alpha of every layer by name. Raises UserError for an unknown group, an alpha
    outside [0, 1] and a search without quantizers.
    """

    def __init__(
        self, alpha: Alpha | Mapping[str, Alpha] = 0.5, weight: Factory | None = None, act: Factory | None = None
    ) -> None:
        self.alpha, self.weight, self.act = _by_group(alpha), weight, act
        self.alphas: dict[str, float] = {}
        if "search" in self.alpha.values() and weight is None and act is None:
            raise UserError("alpha is 'search' without quantizers to search with: give weight or act, or a number.")

    def prepare(self, visual: nn.Module) -> nn.Module:
        """Return ``visual`` with the modules the rewrite adds, multiplying by 1: a rewritten state dict loads into it."""
        for block in _blocks(visual).values():
            mlp = block.mlp
            if "c_proj" in self.alpha and not hasattr(mlp, "smooth"):
                c_proj = mlp.c_proj
                del mlp.c_proj
                mlp.smooth, mlp.c_proj = ChannelScale(c_proj.in_features).to(c_proj.weight), c_proj
        return visual

    @torch.no_grad()
    def __call__(self, visual: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
        """Return ``visual``, rewritten in place from one pass over ``batches`` of normalised images (B, 3, S, S).

        Remembers two numbers per channel, in a search 512 inputs per layer. Raises UserError, before anything is
        changed, for another kind of tower, too few images (1, in a search 2), and NaN or infinite values (layer named).
        """
        blocks = _blocks(visual)
        scales: dict[str, Tensor] = {}
        with _called_layers(blocks, self.alpha) as layers:
            alphas = {name: self.alpha[name.rsplit(".", 1)[1]] for name in layers}
            inputs = {
                n: [LayerInputs(0, 2), LayerInputs(1, 2)] if alpha == "search" else [LayerInputs()]
                for n, alpha in alphas.items()
            }
            _observe(visual, layers, inputs, batches)
            for name, layer in layers.items():
                if alphas[name] == "search":
                    alphas[name] = self._search(layer, *inputs[name])
                absmax = torch.stack([part.absmax for part in inputs[name]]).amax(0)
                scales[name] = smoothing_scale(absmax, layer.weight, alphas[name])
        self.prepare(visual)
        for name, scale in scales.items():
            block, _, group = name.rsplit(".", 2)
            _fold(blocks[block], group, scale)
        self.alphas = alphas
        return visual

    def _search(self, layer: nn.Linear, fitted: LayerInputs, held: LayerInputs) -> float:
        """The alpha whose scales, of what ``fitted`` saw, lose least on the tokens of ``held``; twentieths, coarse to fine."""
        output = F.linear(held.sample, layer.weight)
        errors: dict[int, float] = {}
        tried, best = list(range(0, 21, 4)), 0
        for step in (4, 2, 1):
            for k in tried:
                errors[k] = self._error(layer.weight, output, k / 20, fitted, held)
            best = min(errors, key=errors.__getitem__)
            tried = [k for k in (best - step // 2, best + step // 2) if 0 <= k <= 20 and k not in errors]
        return best / 20

    def _error(self, weight: Tensor, output: Tensor, alpha: float, fitted: LayerInputs, held: LayerInputs) -> float:
        scale = smoothing_scale(fitted.absmax, weight, alpha).to(weight.dtype)
        x, smooth = held.sample / scale, weight * scale
        if self.act is not None:
            observed = torch.cat([fitted.sample / scale, fitted.extremes(scale)])
            x = _fitted(self.act(channels=x.shape[1], batched=True), observed)(x)
        if self.weight is not None:
            smooth = _fitted(self.weight(channels=len(smooth), batched=False), smooth)(smooth)
        return float((F.linear(x, smooth) - output).square().sum(dtype=torch.float64))


class ChannelScale(nn.Module):
    """Returns x * factor, x (..., channels), in x's dtype: 1 / s where nothing before the layer can take it over."""

    factor: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return x with each channel multiplied by its factor."""
        return (x * self.factor).to(x.dtype)


def smoothing_scale(absmax: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Return s, float64 (in,), of the inputs' largest |x| per channel (in,) and the weight (out, in) that reads them."""
    of_inputs = absmax.double().clamp(min=SMALLEST_MAXIMUM)
    of_weights = weight.detach().abs().amax(0).double().clamp(min=SMALLEST_MAXIMUM)
    return of_inputs**alpha / of_weights ** (1 - alpha)


def _by_group(alpha: Alpha | Mapping[str, Alpha]) -> dict[str, Any]:
    by_group = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(PATHS, alpha)
    for group, value in by_group.items():
        if group not in PATHS:
            hint = nearest(str(group), PATHS)
            raise UserError(f"alpha has the group '{group}'{hint}: the groups are {', '.join(PATHS)}.")
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        if not (number or value in (None, "search")):
            raise UserError(f"alpha of {group} is {value!r}: give a number from 0 to 1, 'search', or null to skip it.")
    return {group: by_group[group] for group in PATHS if by_group.get(group) is not None}


def _blocks(visual: nn.Module) -> dict[str, Any]:
    """The blocks by name; UserError where the tower is built otherwise."""
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    found = dict(blocks.named_children()) if isinstance(blocks, nn.Module) else {}
    if not found or not all(map(_is_known, found.values())):
        raise UserError(
            f"SmoothQuant cannot rewrite {type(visual).__name__}: it takes a full-precision open_clip VisionTransformer, "
            "whose transformer.resblocks hold ln_1, attn (nn.MultiheadAttention), ln_2, mlp.c_fc and mlp.c_proj (nn.Linear)."
        )
    return {f"transformer.resblocks.{name}": block for name, block in found.items()}


def _is_known(block: Any) -> bool:
    modules = dict(block.named_modules())
    if not all(isinstance(modules.get(name), kind) for name, kind in KINDS.items()):
        return False
    return block.ln_1.elementwise_affine and block.ln_2.elementwise_affine and block.mlp[-1] is block.mlp.c_proj


@contextmanager
def _called_layers(blocks: dict[str, Any], groups: Iterable[str]) -> Iterator[dict[str, nn.Linear]]:
    """The layers of the groups by name, all of them called in this context: nn.MultiheadAttention calls none of its own."""
    held = [(block, block.attn) for block in blocks.values()]
    layers: dict[str, nn.Linear] = {}
    try:
        for name, block in blocks.items():
            block.attn = QuantAttention(block.attn, f"{name}.attn", lambda _, linear: linear)
            layers |= {f"{name}.{PATHS[group]}": block.get_submodule(PATHS[group]) for group in groups}
        yield layers
    finally:
        for block, attention in held:
            block.attn = attention


def _observe(
    visual: nn.Module, layers: dict[str, nn.Linear], inputs: dict[str, list[LayerInputs]], batches: Iterable[Tensor]
) -> None:
    device, images = next(visual.parameters()).device, 0
    least = max(map(len, inputs.values()), default=1)
    with evaluating(visual), ExitStack() as handles:
        for name, layer in layers.items():
            for part in inputs[name]:
                handles.enter_context(layer.register_forward_pre_hook(lambda _, args, part=part: part.update(args[0])))
        for batch in filter(len, batches):
            visual(batch.to(device))
            images += len(batch)
    if images < least:
        found = "one image" if images else "no images"
        raise UserError(f"SmoothQuant got {found} to calibrate on: it needs at least {least}.")
    for name, layer in layers.items():
        if not all(bool(tensor.isfinite().all()) for tensor in (layer.weight, *(part.absmax for part in inputs[name]))):
            raise UserError(f"layer {name}: its input or weight holds NaN or infinite values; look for broken images.")


def _fitted(quantizer: Quantizer, x: Tensor) -> Quantizer:
    quantizer = quantizer.to(x.device)
    quantizer.observe(x)
    quantizer.fit()
    return quantizer


def _fold(block: Any, group: str, scale: Tensor) -> None:
    """Multiply the columns of the layer's weight by ``scale``, and divide its input where that is made."""
    attention, mlp = block.attn, block.mlp
    if group == "in_proj":
        weight, makers = attention.in_proj_weight, [block.ln_1.weight, block.ln_1.bias]
    elif group == "c_fc":
        weight, makers = mlp.c_fc.weight, [block.ln_2.weight, block.ln_2.bias]
    elif group == "c_proj":
        weight, makers = mlp.c_proj.weight, [mlp.smooth.factor]
    else:
        weight, makers = attention.out_proj.weight, [attention.in_proj_weight, attention.in_proj_bias]
    weight.copy_(weight.double() * scale)
    for tensor in makers:
        if tensor is not None:
            rows = tensor[-len(scale) :]  # of in_proj those of V, else all
            rows.copy_(rows.double() / (scale[:, None] if rows.ndim == 2 else scale))
