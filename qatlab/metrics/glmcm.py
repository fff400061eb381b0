"""GL-MCM: maximum concept matching of the whole image and of its patches."""

from __future__ import annotations

import torch
from torch import Tensor

from qatlab.metrics.calibration import softmax_peak

# Images per block of ``local_mcm``: the cosines of 196 patches to 1000 classes take 0.8 MB per image.
_IMAGES = 8


def gl_mcm(cosines: Tensor, local: Tensor, temperature: float = 1.0, local_weight: float = 1.0) -> Tensor:
    """Return max_k softmax(c / τ)_k + λ ``local``, (N,) float64, of raw ``cosines`` (N, C) of the whole images.

    ``local`` (N,) is ``local_mcm`` at the same τ against the same classes. λ = 1 is the default of the authors' code.
    Miyai et al. 2025 (GL-MCM).
    """
    return 1 / softmax_peak(cosines, 1 / temperature).mass + local_weight * local.double()


def local_mcm(patches: Tensor, classes: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the largest softmax(c / τ) over patches and classes, (B,) float64.

    ``patches`` (B, P, D) and ``classes`` (C, D) are unit rows. Only this score of the patches is kept, because patch
    features are some 200 times as large as an image's features. Miyai et al. 2025 (GL-MCM).
    """
    peaks = []
    for images in patches.split(_IMAGES):
        # Every patch is scored like an image of its own.
        mass = softmax_peak((images @ classes.T).flatten(0, 1), 1 / temperature).mass
        # The largest probability belongs to the smallest mass, so one minimum over the patches is enough.
        peaks.append(1 / mass.unflatten(0, images.shape[:2]).amin(dim=1))
    return torch.cat(peaks)
