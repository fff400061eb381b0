"""Snow, frost and fog."""

from __future__ import annotations

import numpy as np

from qatlab.data.corruptions.filters import Image, Pixels, moved, plasma, scaled, zoomed
from qatlab.data.corruptions.textures import texture

GREY = np.array([0.299, 0.587, 0.114])  # the weights of red, green and blue in a grey, ITU-R BT.601


def snow(
    image: Image,
    rng: np.random.Generator,
    mean: float,
    sigma: float,
    zoom: float,
    threshold: float,
    radius: float,
    blur: float,
    mix: float,
) -> Pixels:
    """Return x, whitened by 1 − ``mix``, under flakes: bright spots of normal noise, enlarged and blurred by motion."""
    x = scaled(image)
    height, width = x.shape[:2]
    flakes = zoomed(rng.normal(mean, sigma, size=(height, width, 1)), [zoom])[..., 0]
    flakes[flakes < threshold] = 0
    # The flakes are cut to uint8 levels before the motion blur,
    # because ImageNet-C's code gives ImageMagick an 8-bit image.
    flakes = (np.clip(flakes, 0, 1) * 255).astype(np.uint8).astype(np.float32)
    flakes = np.rint(moved(flakes, radius, blur, rng.uniform(-135, -45))) / 255
    # The scene itself becomes paler, as under snow.
    whitened = np.maximum(x, (x @ GREY)[..., None] * 1.5 + 0.5)
    # Adding the flakes turned by 180° gives twice as many flakes from one draw.
    return mix * x + (1 - mix) * whitened + (flakes + np.rot90(flakes, 2))[..., None]


def frost(
    image: Image, rng: np.random.Generator, own: float, ice: float, shrink: float, textures: str | None = None
) -> Image:
    """Return ``own`` · image + ``ice`` · a random cut of every ``shrink``-th pixel of one of five textures.

    ``textures`` is a folder with the original ones; without it textures are drawn
    (:mod:`qatlab.data.corruptions.textures`).
    """
    height, width = image.shape[:2]
    # ImageNet-C's code lists six textures but draws from the first five only.
    chosen = texture(int(rng.integers(5)), textures, int(shrink), (height, width))
    top, left = (
        # With max(1, ...) a texture of exactly the image's size has one cut, at 0.
        int(rng.integers(0, max(1, have - want)))
        for have, want in zip(chosen.shape, (height, width), strict=False)
    )
    cut = chosen[top : top + height, left : left + width]
    return np.clip(own * image + ice * cut, 0, 255).astype(np.uint8)


def fog(image: Image, rng: np.random.Generator, amount: float, decay: float) -> Pixels:
    """Return x + ``amount`` · a cloud, scaled back to the brightest value of x."""
    x = scaled(image)
    height, width = x.shape[:2]
    # The diamond-square algorithm halves the side at each step, so it needs a power of two.
    side = 1 << (max(height, width) - 1).bit_length()
    brightest = x.max()
    cloud = plasma(side, decay, rng)[:height, :width, None]
    # The factor keeps the result from exceeding the brightest value of x; without it fog would brighten every image.
    return (x + amount * cloud) * brightest / (brightest + amount)
