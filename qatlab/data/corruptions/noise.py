"""Gaussian, shot, impulse and speckle noise, in the order of draws of hendrycks/robustness."""

from __future__ import annotations

import numpy as np

from qatlab.data.corruptions.filters import Image, Pixels, scaled


def gaussian_noise(image: Image, rng: np.random.Generator, sigma: float) -> Pixels:
    """Return x + n, n normal with standard deviation ``sigma`` on the [0, 1] scale."""
    x = scaled(image)
    return x + rng.normal(scale=sigma, size=x.shape)


def shot_noise(image: Image, rng: np.random.Generator, photons: float) -> Pixels:
    """Return Poisson counts of mean x · ``photons``, over ``photons``."""
    # ``photons`` is the count of a pixel of full brightness: fewer photons give more noise.
    return rng.poisson(scaled(image) * photons) / photons


def impulse_noise(image: Image, rng: np.random.Generator, amount: float) -> Pixels:
    """Return x with each value of each channel replaced by 0 or 1, equally often, with probability ``amount``."""
    x = scaled(image)
    # skimage draws first which values are hit, and then whether each of them becomes 1 or 0.
    hit = rng.random(x.shape) <= amount
    salt = rng.random(x.shape) <= 0.5
    x[hit] = salt[hit]
    return x


def speckle_noise(image: Image, rng: np.random.Generator, sigma: float) -> Pixels:
    """Return x + x · n, n normal with standard deviation ``sigma``."""
    x = scaled(image)
    return x + x * rng.normal(scale=sigma, size=x.shape)
