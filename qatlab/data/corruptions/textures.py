"""Frost on glass: five textures drawn here, or those of ImageNet-C from a folder.

The originals are photographs found on the web whose licence nobody states, so they are not shipped. The drawn textures
have about the colours, contrast and spectrum of the originals: crystals in patches, with one direction in each patch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image as Pillow
from scipy import fft

from qatlab.core.errors import UserError
from qatlab.core.files import user_path
from qatlab.core.hashing import digest
from qatlab.data.corruptions.filters import Image, Pixels

FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
HEIGHT, WIDTH = 480, 640
DIRECTIONS = 6  # directions of the crystals, spread evenly over half a turn
# Mean and standard deviation of red, green and blue on the [0, 1] scale, for each texture. The numbers are about those
# of ImageNet-C's five frost photographs.
COLOURS = (
    ((0.30, 0.58, 0.65), (0.11, 0.06, 0.06)),
    ((0.79, 0.81, 0.84), (0.08, 0.09, 0.09)),
    ((0.72, 0.75, 0.79), (0.10, 0.10, 0.09)),
    ((0.54, 0.60, 0.65), (0.11, 0.11, 0.12)),
    ((0.44, 0.48, 0.53), (0.17, 0.17, 0.16)),
)


@lru_cache(maxsize=16)
def texture(number: int, folder: str | None, shrink: int, least: tuple[int, int]) -> Image:
    """Return texture ``number`` (0 to 4) as (H, W, 3), every ``shrink``-th pixel of it, enlarged to ``least`` if smaller."""
    whole = (
        drawn(number) if folder is None else np.asarray(Pillow.open(user_path(folder) / FILES[number]).convert("RGB"))
    )
    # The middle pixel of each block of shrink x shrink pixels is kept: CIFAR-C's authors shrink the texture to 1/5 with
    # OpenCV, which samples at those pixels.
    kept = whole[shrink // 2 :: shrink, shrink // 2 :: shrink]
    # The texture must cover the image to be corrupted, so a texture that is smaller than the image is enlarged.
    scale = max(want / have for want, have in zip(least, kept.shape[:2], strict=True))
    if scale <= 1:
        return np.ascontiguousarray(kept)
    size = [int(np.ceil(side * scale)) for side in kept.shape[1::-1]]
    return np.asarray(Pillow.fromarray(kept).resize((size[0], size[1]), Pillow.Resampling.BILINEAR))


def fingerprint(folder: str | None) -> str:
    """Return "drawn", or a hash of the five files in ``folder``; raises UserError when one is missing."""
    if folder is None:
        return "drawn"
    missing = [file for file in FILES if not (user_path(folder) / file).is_file()]
    if missing:
        raise UserError(
            f"The folder of frost textures {folder} has no {', '.join(missing)}; expected the files of "
            "ImageNet-C/imagenet_c/imagenet_c/frost of github.com/hendrycks/robustness."
        )
    return digest(*((user_path(folder) / file).read_bytes() for file in FILES))[:12]


def drawn(number: int) -> Image:
    """Return texture ``number`` as (480, 640, 3): needles in patches, one direction in each, under a cloud."""
    rng = np.random.Generator(np.random.PCG64(number))
    down, right = np.meshgrid(fft.fftfreq(HEIGHT), fft.rfftfreq(WIDTH), indexing="ij")
    radius = np.hypot(down, right)
    crystals: Pixels = np.zeros((HEIGHT, WIDTH))
    total: Pixels = np.zeros((HEIGHT, WIDTH))
    for direction in range(DIRECTIONS):
        angle = np.pi * direction / DIRECTIONS
        along = down * np.sin(angle) + right * np.cos(angle)
        # The filter keeps waves that are long in one direction; across that direction their power falls as 1/f².
        needles = _noise(rng, np.exp(-((along * 50) ** 2)) / np.maximum(radius, 0.01))
        # exp(4 n) of smooth noise n is large in few places, so
        # that in each patch one direction is by far the strongest.
        patches = np.exp(4 * _noise(rng, np.exp(-((radius * 40) ** 2))))
        crystals += needles * patches
        total += patches**2
    light: Pixels = _standard(np.abs(crystals / np.sqrt(total)) ** 0.7) + _noise(rng, np.exp(-((radius * 120) ** 2)))
    # tanh limits single bright needles, which would otherwise set the scale of the whole texture.
    light = _standard(np.tanh(_standard(light) / 2.5))
    hue = _noise(rng, np.exp(-((radius * 90) ** 2)))
    mean, spread = np.array(COLOURS[number])
    # The colour changes slowly between red and blue, by little compared with the light.
    x = light[..., None] + 0.1 * hue[..., None] * np.array([-1.0, 0.0, 1.0])
    return (np.clip(mean + spread * x / x.std((0, 1)), 0, 1) * 255).astype(np.uint8)


def _noise(rng: np.random.Generator, gain: Pixels) -> Pixels:
    """Return normal noise (480, 640) of mean 0 and standard deviation 1, whose spectrum has the given ``gain``."""
    spectrum = rng.standard_normal((*gain.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    spectrum *= gain
    spectrum[0, 0] = 0
    return _standard(fft.irfft2(spectrum, (HEIGHT, WIDTH)))


def _standard(x: Pixels) -> Pixels:
    return (x - x.mean()) / x.std()
