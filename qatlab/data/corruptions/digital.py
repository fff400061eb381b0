"""Brightness, saturation and contrast, elastic transform, pixelation and JPEG."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from scipy import fft
from scipy.ndimage import affine_transform, map_coordinates

from qatlab.data.corruptions.filters import Image, Pixels, scaled


def brightness(image: Image, rng: np.random.Generator, added: float) -> Pixels:
    """Return x with ``added`` on its value in HSV, at most 1, hue and saturation unchanged."""
    x = scaled(image)
    # In HSV the value is the largest channel: scaling all channels alike changes the value and nothing else.
    value = x.max(axis=2, keepdims=True)
    target = np.minimum(value + added, 1)
    # Black has no hue and no saturation, so it becomes a grey.
    return np.where(value > 0, x * (target / np.where(value > 0, value, 1)), target)


def saturate(image: Image, rng: np.random.Generator, factor: float, offset: float) -> Pixels:
    """Return x with its saturation in HSV times ``factor`` plus ``offset``, at most 1.

    Greys, whose hue is 0, become reddish where ``offset`` is not 0, as in the original.
    """
    x = scaled(image)
    value = x.max(axis=2, keepdims=True)
    chroma = value - x.min(axis=2, keepdims=True)
    # The 1 avoids 0/0 in black pixels, where chroma and value are 0.
    saturation = chroma / np.where(value > 0, value, 1)
    # The share of the chroma by which each channel lies below the value. A grey has the hue 0, which is red.
    distance = np.where(chroma > 0, (value - x) / np.where(chroma > 0, chroma, 1), [0.0, 1.0, 1.0])
    return value * (1 - np.clip(saturation * factor + offset, 0, 1) * distance)


def contrast(image: Image, rng: np.random.Generator, factor: float) -> Pixels:
    """Return x with its distance to the mean of each channel times ``factor``."""
    x = scaled(image)
    means = x.mean(axis=(0, 1), keepdims=True)
    return (x - means) * factor + means


def pixelate(image: Image, rng: np.random.Generator, factor: float) -> Image:
    """Return the image at ``factor`` of its size and back, both by averaging boxes."""
    picture = Pillow.fromarray(image)
    # int() cuts off, as ImageNet-C's code does; max() keeps a very small image from vanishing.
    small = (max(1, int(picture.width * factor)), max(1, int(picture.height * factor)))
    return np.array(picture.resize(small, Pillow.Resampling.BOX).resize(picture.size, Pillow.Resampling.BOX))


def jpeg_compression(image: Image, rng: np.random.Generator, quality: float) -> Image:
    """Return the image written and read by Pillow as JPEG of that ``quality``."""
    file = io.BytesIO()
    Pillow.fromarray(image).save(file, "JPEG", quality=int(quality))
    return np.array(Pillow.open(file))


def elastic_transform(image: Image, rng: np.random.Generator, alpha: float, sigma: float, affine: float) -> Pixels:
    """Return x under a random affine map and then a random smooth displacement.

    The map moves three points around the middle by up to ``affine`` pixels each way; the displacement is uniform noise
    in [−1, 1] smoothed by ``sigma`` pixels, times ``alpha`` pixels. Both steps interpolate linearly.
    """
    height, width = image.shape[:2]
    x = scaled(image)
    # ImageNet-C's code takes three points a third of the shorter side away from the middle, on two diagonals.
    middle, arm = np.array([width // 2, height // 2]), min(height, width) // 3
    before = middle + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + rng.uniform(-affine, affine, size=before.shape).astype(np.float32)
    # affine_transform asks where each pixel of the result comes from, so the inverse of the map is computed.
    inverse = np.linalg.solve(np.c_[after, np.ones(3)], before).T
    # The points are (x, y) but scipy's axes are (row, column), so both axes of the matrix are swapped.
    rows_first = np.c_[inverse[::-1, 1::-1], inverse[::-1, 2]]
    # ImageNet-C's code draws the displacement across before the displacement down.
    across, down = (alpha * smooth(rng.uniform(-1, 1, size=(height, width)), sigma) for _ in range(2))
    rows, columns = np.mgrid[:height, :width]
    channels = []
    for channel in x.transpose(2, 0, 1):
        mapped = affine_transform(channel, rows_first[:, :2], rows_first[:, 2], order=1, mode="mirror")
        channels.append(map_coordinates(mapped, [rows + down, columns + across], order=1, mode="reflect"))
    return np.stack(channels, axis=2)


def smooth(field: Pixels, sigma: float) -> NDArray[np.float64]:
    """Return (H, W) smoothed by a Gaussian cut at 3 sigma, the border mirrored.

    With a mirrored border the filter is a product in the cosine transform, so hundreds of taps cost no more than three.
    """
    # 3 sigma and the mirrored border are those of ImageNet-C (skimage, truncate=3, mode="reflect").
    taps = np.arange(-int(3 * sigma + 0.5), int(3 * sigma + 0.5) + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2)) if sigma else np.ones(1)
    height, width = (
        np.cos(np.pi * np.outer(np.arange(side), taps) / side) @ (weights / weights.sum()) for side in field.shape
    )
    return fft.idctn(fft.dctn(field) * height[:, None] * width)
