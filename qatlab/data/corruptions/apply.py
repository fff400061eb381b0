"""A corruption by its name: its function, its constants at a severity, and the conversion back to uint8."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qatlab.core.errors import UserError, nearest
from qatlab.data.corruptions import blur, digital, noise, weather
from qatlab.data.corruptions.filters import Image, Pixels
from qatlab.data.corruptions.spatter import spatter
from qatlab.data.corruptions.tables import IMAGENET_C, TABLES, Constants
from qatlab.data.preprocess import BadImage

LEAST = 8  # the least pixels of a side: some corruptions have no pixel to change in a smaller image
FUNCTIONS: dict[str, Callable[..., Pixels | Image]] = {
    function.__name__: function
    for function in (
        noise.gaussian_noise,
        noise.shot_noise,
        noise.impulse_noise,
        blur.defocus_blur,
        blur.glass_blur,
        blur.motion_blur,
        blur.zoom_blur,
        weather.snow,
        weather.frost,
        weather.fog,
        digital.brightness,
        digital.contrast,
        digital.elastic_transform,
        digital.pixelate,
        digital.jpeg_compression,
        noise.speckle_noise,
        blur.gaussian_blur,
        spatter,
        digital.saturate,
    )
}


def corrupt(
    image: Image, name: str, severity: int, table: str, rng: np.random.Generator, textures: str | None = None
) -> Image:
    """Return the (H, W, 3) uint8 ``image`` corrupted, of the same shape and dtype; values are cut off to integers.

    ``name`` is one of the 19 of ImageNet-C and CIFAR-C, ``severity`` 1 to 5, ``table`` "imagenet_c" (constants for
    224 px) or "cifar_c" (32 px). ``textures`` is a folder with ImageNet-C's frost pictures; without it frost is drawn.
    All randomness comes from ``rng``, in the order of the original. Raises UserError for an unknown name, severity or
    table, BadImage for an image below 8 × 8 and ValueError for another shape or dtype. Source: Hendrycks and Dietterich
    (2019).
    """
    constants = checked(name, severity, table)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if min(image.shape[:2]) < LEAST:
        raise BadImage(f"{image.shape[1]} × {image.shape[0]} pixels are too few to corrupt, expected at least {LEAST}")
    # Frost alone reads files; every other function takes the image, the generator and the constants.
    ice = {"textures": textures} if name == "frost" else {}
    x = FUNCTIONS[name](image, rng, *constants, **ice)
    # Values are cut off, not rounded, as in ImageNet-C's conversion to uint8.
    return (x if x.dtype == np.uint8 else np.clip(x, 0, 1) * 255).astype(np.uint8, copy=False)


def checked(name: str, severity: int, table: str) -> Constants:
    """Return the constants of a corruption; raises UserError for an unknown name, severity or table."""
    if name not in FUNCTIONS:
        raise UserError(
            f"The corruption '{name}' is unknown{nearest(name, FUNCTIONS)}; there are {', '.join(IMAGENET_C)}."
        )
    if table not in TABLES:
        raise UserError(f"The table '{table}' is unknown{nearest(table, TABLES)}; there are {' and '.join(TABLES)}.")
    if severity not in range(1, 6):
        raise UserError(f"The severity of {name} is {severity!r}, expected 1, 2, 3, 4 or 5.")
    return TABLES[table][name][severity - 1]
