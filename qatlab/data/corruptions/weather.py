"""Snow, frost and fog."""

from __future__ import annotations

import numpy as np

from qatlab.data.corruptions.filters import Image, Pixels, moved, plasma, scaled, zoomed
from qatlab.data.corruptions.textures import texture

GREY = np.array([0.299, 0.587, 0.114])


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
    flakes = (np.clip(flakes, 0, 1) * 255).astype(np.uint8).astype(np.float32)
    flakes = np.rint(moved(flakes, radius, blur, rng.uniform(-135, -45))) / 255
    whitened = np.maximum(x, (x @ GREY)[..., None] * 1.5 + 0.5)
    return mix * x + (1 - mix) * whitened + (flakes + np.rot90(flakes, 2))[..., None]


def frost(
    image: Image, rng: np.random.Generator, own: float, ice: float, shrink: float, textures: str | None = None
) -> Image:
    """Return ``own`` · image + ``ice`` · a random cut of one of five textures taken at every ``shrink``-th pixel.

    ``textures`` is a folder with the original ones; without it they are drawn (:mod:`qatlab.data.corruptions.textures`).
    """
    height, width = image.shape[:2]
    chosen = texture(int(rng.integers(5)), textures, int(shrink), (height, width))
    top, left = (
        int(rng.integers(0, max(1, have - want))) for have, want in zip(chosen.shape, (height, width), strict=False)
    )
    cut = chosen[top : top + height, left : left + width]
    return np.clip(own * image + ice * cut, 0, 255).astype(np.uint8)


def fog(image: Image, rng: np.random.Generator, amount: float, decay: float) -> Pixels:
    """Return x + ``amount`` · a cloud, scaled back to the brightest value of x."""
    x = scaled(image)
    height, width = x.shape[:2]
    side = 1 << (max(height, width) - 1).bit_length()
    brightest = x.max()
    cloud = plasma(side, decay, rng)[:height, :width, None]
    return (x + amount * cloud) * brightest / (brightest + amount)
