"""Functions that several corruptions share: smoothing, zooming, motion and clouds, all on the [0, 1] scale."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

Image = NDArray[np.uint8]
Pixels = NDArray[np.floating]


def scaled(image: Image) -> Pixels:
    """Return the image as float64 in [0, 1]."""
    return image / 255.0


def blurred(x: Pixels, sigma: float) -> Pixels:
    """Return (H, W) or (H, W, C) smoothed by a Gaussian cut at 4 sigma, edges repeated; channels are not mixed."""
    return gaussian_filter(x, (sigma, sigma) + (0,) * (x.ndim - 2), mode="nearest", truncate=4)


def zoomed(x: Pixels, factors: NDArray[np.float64] | list[float]) -> Pixels:
    """Return the sum over ``factors`` of the middle of (H, W, C) enlarged to (H, W, C), float32.

    Interpolation is linear between the corner pixels, as in ``scipy.ndimage.zoom(order=1)``, which takes ten times as
    long.
    """
    height, width = x.shape[:2]
    whole = torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1), dtype=np.float32))[None]
    total = torch.zeros_like(whole)
    for factor in factors:
        # The part is cut out before it is enlarged, because only the middle stays in the frame.
        inner = [math.ceil(side / factor) for side in (height, width)]
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        outer = [round(side * float(factor)) for side in inner]
        part = whole[..., top : top + inner[0], left : left + inner[1]]
        part = F.interpolate(part, size=outer, mode="bilinear", align_corners=True)
        # Rounding may make the enlarged part larger than the frame, so the middle is cut once more.
        top, left = (outer[0] - height) // 2, (outer[1] - width) // 2
        total += part[..., top : top + height, left : left + width]
    return total[0].numpy().transpose(1, 2, 0)


def moved(x: Pixels, radius: float, sigma: float, angle: float) -> Pixels:
    """Return (H, W) or (H, W, C) averaged along a line from each pixel, in the dtype of ``x``.

    ``angle`` is in degrees, clockwise from the right; the weights are the right half of a Gaussian over 2 · ``radius``
    + 1 pixels; edges repeat. Source: ImageMagick's motion blur.
    """
    taps = np.arange(2 * int(radius) + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    weights /= weights.sum()
    # Offsets are rounded to whole pixels, halves downwards, as ImageMagick does.
    down = np.ceil(taps * math.sin(math.radians(angle)) - 0.5).astype(int)
    right = np.ceil(taps * math.cos(math.radians(angle)) - 0.5).astype(int)
    height, width = x.shape[:2]
    above, before = -min(0, down.min()), -min(0, right.min())
    around = [(above, max(0, down.max())), (before, max(0, right.max()))] + [(0, 0)] * (x.ndim - 2)
    # One padded image with a slice for each tap is faster than an index for each pixel.
    padded = np.pad(x, around, mode="edge")
    total = np.zeros_like(x)
    # The weights get the dtype of x, because float64 weights would turn a float32 image into float64.
    for weight, row, column in zip(weights.astype(x.dtype), above + down, before + right, strict=True):
        total += weight * padded[row : row + height, column : column + width]
    return total


def plasma(side: int, decay: float, rng: np.random.Generator) -> Pixels:
    """Return a cloud of ``side`` × ``side`` values in [0, 1], ``side`` a power of two, by the diamond-square algorithm.

    A larger ``decay`` gives a smoother cloud: each octave disturbs by the last octave's amount over ``decay``.
    """
    field = np.zeros((side, side))
    # ImageNet-C's code starts at 100. The start has no effect on
    # the result, because the result is scaled to [0, 1] at the end.
    wibble, step = 100.0, side

    def disturbed(total: Pixels) -> Pixels:
        # The noise is multiplied by the wibble twice, as in ImageNet-C's
        # code: once as a factor, once in the bounds of the draw.
        return total / 4 + wibble * rng.uniform(-wibble, wibble, total.shape)

    while step >= 2:
        half = step // 2
        # np.roll joins opposite edges, so the cloud repeats without a seam, as in ImageNet-C's code.
        corners = field[::step, ::step]
        rows = corners + np.roll(corners, -1, axis=0)
        centres = field[half::step, half::step] = disturbed(rows + np.roll(rows, -1, axis=1))
        across = corners + np.roll(corners, -1, axis=1)
        field[::step, half::step] = disturbed(centres + np.roll(centres, 1, axis=0) + across)
        along = corners + np.roll(corners, -1, axis=0)
        field[half::step, ::step] = disturbed(centres + np.roll(centres, 1, axis=1) + along)
        step //= 2
        wibble /= decay
    field -= field.min()
    return field / field.max()
