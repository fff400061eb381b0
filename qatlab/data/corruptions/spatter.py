"""Spatter: drops of water or mud on the lens. Water needs edges as OpenCV finds them; no OpenCV is used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_propagation, correlate, distance_transform_edt, sobel, uniform_filter

from qatlab.data.corruptions.filters import Image, Pixels, blurred, scaled

# Pale turquoise and a brown, ImageNet-C's colours of water and mud in RGB.
TURQUOISE = np.array([175, 238, 238]) / 255
MUD = np.array([63, 42, 20]) / 255
# ImageNet-C's kernel lightens the slopes towards one corner and darkens the others.
EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])


def spatter(
    image: Image,
    rng: np.random.Generator,
    mean: float,
    sigma: float,
    blur: float,
    threshold: float,
    strength: float,
    mud: float,
) -> Pixels:
    """Return x under drops, where normal noise smoothed by ``blur`` pixels exceeds ``threshold``.

    Water (``mud`` 0) adds a pale colour of up to ``strength``; mud covers x, its drops smoothed by ``strength`` pixels.
    """
    x = scaled(image)
    liquid = blurred(rng.normal(mean, sigma, size=x.shape[:2]), blur)
    liquid[liquid < threshold] = 0
    if mud:
        cover = blurred((liquid > threshold).astype(float), strength)[..., None]
        # 0.8 is ImageNet-C's threshold: only the thick middle of a drop covers the image.
        cover[cover < 0.8] = 0
        return x * (1 - cover) + cover * MUD
    # The drops are uint8, because the edges below are those that OpenCV finds in a uint8 image.
    drops = (np.minimum(liquid, 1) * 255).astype(np.uint8)
    light = drops * relief(drops)
    return x + (strength * light / max(1.0, light.max()))[..., None] * TURQUOISE


def relief(drops: Image) -> NDArray[np.float32]:
    """Return (H, W) in [0, 255], the light on drops of height (H, W): embossed distances to their edges."""
    # 50 and 150 are the thresholds of ImageNet-C's code.
    edges = canny(drops, 50, 150)
    distance = steps(edges) if edges.any() else np.full(drops.shape, 20.0)
    # The distance becomes float32 before it is cut to integers: in float64 the mean of nine values 20 may be
    # 19.999999999999996, which would be cut to 19.
    distance = uniform_filter(np.minimum(distance, 20), 3, mode="mirror").astype(np.float32)
    embossed = correlate(equalized(distance.astype(np.uint8)).astype(int), EMBOSS, mode="mirror")
    return np.rint(uniform_filter(np.clip(embossed, 0, 255).astype(np.float32), 3, mode="mirror"))


def steps(edges: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the length of the way from each pixel of (H, W) to its nearest edge in chess moves of king and knight.

    The moves have the lengths 1, 1.4 and 2.1969 of Borgefors (1986), as in OpenCV with a mask of 5; "nearest" is in a
    straight line.
    """
    nearest = distance_transform_edt(~edges, return_distances=False, return_indices=True)
    offset = np.abs(nearest - np.indices(edges.shape))
    far, near = offset.max(axis=0), offset.min(axis=0)
    # The way takes knight's moves first; the pixels that remain are crossed by straight or by diagonal moves.
    diagonal = np.where(far >= 2 * near, far - 2 * near, 1.4 * (2 * near - far))
    return diagonal + 2.1969 * np.minimum(near, far - near)


def equalized(image: Image) -> Image:
    """Return (H, W) with its histogram made flat, the darkest value that occurs at 0."""
    counts = np.bincount(image.ravel(), minlength=256)
    first = counts[image.min()]
    # An image of one level has no histogram to flatten, and would cause a division by 0.
    if first == image.size:
        return image
    levels = np.rint((np.cumsum(counts) - first) * (255 / (image.size - first)))
    return np.clip(levels, 0, 255).astype(np.uint8)[image]


def canny(image: Image, low: float, high: float) -> NDArray[np.bool_]:
    """Return where (H, W) has an edge: Canny (1986) with 3 × 3 Sobel gradients in the L1 norm, as in OpenCV."""
    down, across = (sobel(image.astype(int), axis, mode="nearest") for axis in (0, 1))
    strength = np.abs(down) + np.abs(across)
    padded = np.pad(strength, 1)
    height, width = image.shape

    def beside(dy: int | NDArray[np.int_], dx: int | NDArray[np.int_]) -> NDArray[np.int_]:
        """Return the strength (H, W) of the pixel ``dy`` rows below and ``dx`` columns right of each pixel."""
        rows, columns = np.indices((height, width), sparse=True)
        return padded[rows + 1 + dy, columns + 1 + dx]

    # Directions within 22.5° of an axis count as that axis: tan 22.5° = √2 − 1 and tan 67.5° = √2 + 1.
    steepness = np.abs(down) / np.maximum(np.abs(across), 1e-9)
    flat, steep = steepness < np.sqrt(2) - 1, steepness > np.sqrt(2) + 1
    # The exclusive or of two numbers is negative where their signs differ, which tells the two diagonals apart.
    turn = np.where((across ^ down) < 0, -1, 1)
    peak = np.select(
        [flat, steep],
        [
            (strength > beside(0, -1)) & (strength >= beside(0, 1)),
            (strength > beside(-1, 0)) & (strength >= beside(1, 0)),
        ],
        (strength > beside(-1, -turn)) & (strength > beside(1, turn)),
    )
    possible = peak & (strength > low)
    # Weak edges count where a chain of weak edges leads to a strong one.
    return binary_propagation(possible & (strength > high), structure=np.ones((3, 3)), mask=possible)
