"""Gaussian, defocus, glass, motion and zoom blur."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import correlate1d

from qatlab.data.corruptions.filters import Image, Pixels, blurred, moved, scaled, zoomed


def gaussian_blur(image: Image, rng: np.random.Generator, sigma: float) -> Pixels:
    """Return x smoothed by a Gaussian of ``sigma`` pixels."""
    return blurred(scaled(image), sigma)


def defocus_blur(image: Image, rng: np.random.Generator, radius: float, alias: float) -> Pixels:
    """Return x averaged over a disk of ``radius`` pixels with an edge softened by ``alias``; the border is mirrored."""
    kernel = disk(radius, alias)
    reach = len(kernel) // 2
    x = np.pad(scaled(image), ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    shape = [fft.next_fast_len(side, real=True) for side in x.shape[:2]]
    # the disk is symmetric, so that correlation and convolution are one; what wraps around falls on the padding
    product = fft.rfft2(x, shape, axes=(0, 1)) * fft.rfft2(kernel, shape)[..., None]
    height, width = image.shape[:2]
    return fft.irfft2(product, shape, axes=(0, 1))[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]


def disk(radius: float, alias: float) -> NDArray[np.float64]:
    """Return the kernel of :func:`defocus_blur`, (17, 17) or for a radius above 8 (2r + 1, 2r + 1).

    Its sum is 1; for radii 8 and 10 it is 1.01, as in the original, where the softened edge is mirrored back at the rim.
    """
    reach, taps = (8, 1) if radius <= 8 else (int(radius), 2)
    line = np.arange(-reach, reach + 1)
    kernel = (line[:, None] ** 2 + line**2 <= radius**2).astype(float)
    kernel /= kernel.sum()
    soft = np.exp(-(np.arange(-taps, taps + 1) ** 2) / (2 * alias**2))
    for axis in (0, 1):
        kernel = correlate1d(kernel, soft / soft.sum(), axis, mode="mirror")
    return kernel


def glass_blur(image: Image, rng: np.random.Generator, sigma: float, delta: float, passes: float) -> Pixels:
    """Return x smoothed by ``sigma`` pixels, each pixel replaced ``passes`` times by one at most ``delta`` off, smoothed.

    The original visits the pixels from the last to the first and means to swap two; numpy's views turn its swap into a
    copy of the other pixel, and the released files hold that.
    """
    x = (blurred(scaled(image), sigma) * 255).astype(np.uint8)
    for _ in range(int(passes)):
        x = shuffled(x, int(delta), rng)
    return blurred(scaled(x), sigma)


def shuffled(x: Image, delta: int, rng: np.random.Generator) -> Image:
    """Return (H, W, C) after one pass of copies x[h, w] = x[h + dy, w + dx], both in [−delta, delta), last pixel first.

    A pixel read after it was written itself shows what it read: chains of such reads are followed to their ends for all
    pixels at once, each round doubling the length followed.
    """
    height, width = x.shape[:2]
    rows = np.arange(height - delta, delta, -1)
    columns = np.arange(width - delta, delta, -1)
    if not (rows.size and columns.size):
        return x
    shift = rng.integers(-delta, delta, size=(rows.size, columns.size, 2))
    place = rows[:, None] * width + columns
    source = np.arange(height * width)
    source[place] = place + shift[..., 1] * width + shift[..., 0]
    # written earlier in the pass: later in the image and not on the rim, whose source is itself
    written = np.zeros(height * width, dtype=bool)
    written[place] = True
    open_ = np.flatnonzero(written & written[source] & (source > np.arange(height * width)))
    chained = np.zeros(height * width, dtype=bool)
    chained[open_] = True
    while open_.size:
        through = source[open_]
        source[open_], chained[open_] = source[through], chained[through]
        open_ = open_[chained[open_]]
    return x.reshape(height * width, -1)[source].reshape(x.shape)


def motion_blur(image: Image, rng: np.random.Generator, radius: float, sigma: float) -> Image:
    """Return the image averaged along a line at a random angle within 45° of the horizontal, rounded."""
    angle = rng.uniform(-45, 45)
    return np.rint(moved(image.astype(np.float32), radius, sigma, angle)).astype(np.uint8)


def zoom_blur(image: Image, rng: np.random.Generator, stop: float, step: float) -> Pixels:
    """Return the mean of x and of x enlarged by 1, 1 + ``step``, … below ``stop``."""
    factors = np.arange(1, stop, step)
    x = scaled(image)
    return (x + zoomed(x, factors)) / (len(factors) + 1)
