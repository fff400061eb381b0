"""Gaussian, defocus, glass, motion and zoom blur."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import correlate1d

from qatlab.data.corruptions.filters import Image, Pixels, blurred, moved, scaled, zoomed


def gaussian_blur(image: Image, rng: np.random.Generator, sigma: float) -> Pixels:
    """Return the image in [0, 1], smoothed by a Gaussian of ``sigma`` pixels."""
    return blurred(scaled(image), sigma)


def defocus_blur(image: Image, rng: np.random.Generator, radius: float, alias: float) -> Pixels:
    """Return x averaged over a disk of ``radius`` pixels with an edge softened by ``alias``; the border is mirrored."""
    kernel = disk(radius, alias)
    reach = len(kernel) // 2
    x = np.pad(scaled(image), ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    # A product of Fourier spectra takes the same time for every radius; the largest kernel has 21 × 21 taps.
    shape = [fft.next_fast_len(side, real=True) for side in x.shape[:2]]
    # Convolution equals correlation, because the disk is symmetric. The product wraps around at the border, but only
    # into rows and columns that are cut off.
    product = fft.rfft2(x, shape, axes=(0, 1)) * fft.rfft2(kernel, shape)[..., None]
    height, width = image.shape[:2]
    return fft.irfft2(product, shape, axes=(0, 1))[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]


def disk(radius: float, alias: float) -> NDArray[np.float64]:
    """Return the kernel of :func:`defocus_blur`, (17, 17) or for a radius above 8 (2r + 1, 2r + 1).

    Its sum is 1; for radii 8 and 10 it is 1.01, as in the original, where the softened edge is mirrored back at the
    rim.
    """
    # ImageNet-C's code sets the size of the kernel and of its smoothing (3 × 3 or 5 × 5).
    reach, taps = (8, 1) if radius <= 8 else (int(radius), 2)
    line = np.arange(-reach, reach + 1)
    kernel = (line[:, None] ** 2 + line**2 <= radius**2).astype(float)
    kernel /= kernel.sum()
    soft = np.exp(-(np.arange(-taps, taps + 1) ** 2) / (2 * alias**2))
    for axis in (0, 1):
        kernel = correlate1d(kernel, soft / soft.sum(), axis, mode="mirror")
    return kernel


def glass_blur(image: Image, rng: np.random.Generator, sigma: float, delta: float, passes: float) -> Pixels:
    """Return x smoothed by ``sigma`` pixels, then shuffled ``passes`` times by at most ``delta`` pixels, then smoothed.

    The original visits the pixels from the last to the first and means to swap two pixels. Because of numpy's views its
    swap is a copy of the other pixel, and the released files of ImageNet-C are made so.
    """
    # The image is uint8 between the steps, because ImageNet-C's code shuffles uint8 levels.
    x = (blurred(scaled(image), sigma) * 255).astype(np.uint8)
    for _ in range(int(passes)):
        x = shuffled(x, int(delta), rng)
    return blurred(scaled(x), sigma)


def shuffled(x: Image, delta: int, rng: np.random.Generator) -> Image:
    """Return (H, W, C) after a pass of copies x[h, w] = x[h + dy, w + dx], dy, dx in [−delta, delta), last pixel first.

    A copy may read a pixel that is itself a copy of another pixel. Such chains are followed to their ends for all
    pixels at once, and each round doubles the length that is followed.
    """
    height, width = x.shape[:2]
    # ImageNet-C's loop goes from the last pixel to the first, and the order decides which copies read other copies.
    rows = np.arange(height - delta, delta, -1)
    columns = np.arange(width - delta, delta, -1)
    # The rim of ``delta`` pixels is never shuffled, and a small image may consist of rim alone.
    if not (rows.size and columns.size):
        return x
    shift = rng.integers(-delta, delta, size=(rows.size, columns.size, 2))
    place = rows[:, None] * width + columns
    source = np.arange(height * width)
    source[place] = place + shift[..., 1] * width + shift[..., 0]
    # A pixel is open where its source was overwritten earlier in the pass, that is, where the source lies later in the
    # image. A pixel of the rim is never overwritten and is its own source.
    written = np.zeros(height * width, dtype=bool)
    written[place] = True
    open_ = np.flatnonzero(written & written[source] & (source > np.arange(height * width)))
    chained = np.zeros(height * width, dtype=bool)
    chained[open_] = True
    # In every round an open pixel reads through its source, so that after k rounds a chain of 2^k reads is followed.
    while open_.size:
        through = source[open_]
        source[open_], chained[open_] = source[through], chained[through]
        open_ = open_[chained[open_]]
    return x.reshape(height * width, -1)[source].reshape(x.shape)


def motion_blur(image: Image, rng: np.random.Generator, radius: float, sigma: float) -> Image:
    """Return the image averaged along a line at a random angle within 45° of the horizontal, rounded."""
    # ImageNet-C's code draws the angle from this range, in degrees.
    angle = rng.uniform(-45, 45)
    return np.rint(moved(image.astype(np.float32), radius, sigma, angle)).astype(np.uint8)


def zoom_blur(image: Image, rng: np.random.Generator, stop: float, step: float) -> Pixels:
    """Return the mean of x and of x enlarged by 1, 1 + ``step``, … below ``stop``."""
    # The first factor is 1, so the image itself counts twice, as in ImageNet-C's code.
    factors = np.arange(1, stop, step)
    x = scaled(image)
    return (x + zoomed(x, factors)) / (len(factors) + 1)
