"""GL-MCM: maximum concept matching of the whole image and of its patches; patch features out of an image tower."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.errors import UserError
from qatlab.metrics.calibration import softmax_peak
from qatlab.quant.attention import QuantAttention

# Images at a time in ``local_mcm``: 196 patches by 1000 classes are 0.8 MB each.
_IMAGES = 8


def gl_mcm(cosines: Tensor, local: Tensor, temperature: float = 1.0, local_weight: float = 1.0) -> Tensor:
    """Return max_k softmax(c / τ)_k + λ ``local``, (N,) float64, of raw ``cosines`` (N, C) of the whole images.

    ``local`` (N,) is ``local_mcm`` at the same τ against the same classes. λ = 1 is the default of the authors' code.
    Miyai et al. 2025 (GL-MCM).
    """
    return 1 / softmax_peak(cosines, 1 / temperature).mass + local_weight * local.double()


def local_mcm(patches: Tensor, classes: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the largest softmax(c / τ) over patches and classes, (B,) float64.

    ``patches`` (B, P, D) and ``classes`` (C, D) unit rows. Patch features are some 200 times as large as an image's, so
    this number is what is kept of them. Miyai et al. 2025 (GL-MCM).
    """
    peaks = []
    for images in patches.split(_IMAGES):
        mass = softmax_peak((images @ classes.T).flatten(0, 1), 1 / temperature).mass
        peaks.append(1 / mass.unflatten(0, images.shape[:2]).amin(dim=1))
    return torch.cat(peaks)


def with_patches(visual: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features (B, D) of one forward of ``visual``, as it gives them, and its patches' (B, P, D), unit rows.

    The patch path is that of the authors' code: in the last block every token attends to itself alone, so that the
    projected values stand for the attention's output; residuals, MLP, the final norm and the projection follow. It
    costs one block more. Modules are called as the forward calls them, quantized ones included: their static scales were
    calibrated on tokens that attend to others. Raises UserError for a tower that is no open_clip VisionTransformer of
    plain residual blocks.
    """
    block = patches_of(visual)
    entering: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    try:
        features = visual(images)
    finally:
        handle.remove()
    tokens: Any = entering[0] if block.attn.batch_first else entering[0].transpose(0, 1)
    tokens = tokens[:, 1:]  # without the class token
    tokens = tokens + block.ls_1(_values(block.attn, block.ln_1(tokens)))
    tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
    tower: Any = visual
    return features, F.normalize(tower.ln_post(tokens) @ tower.proj, dim=-1)


def patches_of(visual: nn.Module) -> Any:
    """Return the tower's last block, which the patches are read of; raises UserError where that cannot be."""
    if not isinstance(visual, VisionTransformer):
        raise UserError(_cannot(f"it is a {type(visual).__name__}"))
    if visual.attn_pool is not None:
        raise UserError(_cannot("it pools by attention"))
    block = visual.transformer.resblocks[-1]
    if not isinstance(block, ResidualAttentionBlock):
        raise UserError(_cannot(f"its blocks are {type(block).__name__}s"))
    if not isinstance(block.attn, (nn.MultiheadAttention, QuantAttention)):
        raise UserError(_cannot(f"its attention is a {type(block.attn).__name__}"))
    return block


def _values(attn: Any, x: Tensor) -> Tensor:
    """Return the attention's output (B, L, d) for x (B, L, d) if every token attended to itself alone."""
    width = x.shape[-1]
    if isinstance(attn, QuantAttention):
        return attn.out_proj(attn.in_proj(x)[..., 2 * width :])
    bias = None if attn.in_proj_bias is None else attn.in_proj_bias[2 * width :]
    values = F.linear(x, attn.in_proj_weight[2 * width :], bias)
    return F.linear(values, attn.out_proj.weight, attn.out_proj.bias)


def _cannot(reason: str) -> str:
    return (
        f"gl_mcm needs patch features, and this image tower gives none: {reason}. It reads open_clip's plain "
        "VisionTransformers; leave the score out."
    )
