"""The embedded world's backgrounds: eight scenes, each painted over the whole frame."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
SIZE = 64  # pixels a side of every image of the world
_TILE = 512  # pixels a side of the noise that scenes cut their windows from


@cache
def _tile(exponent: float) -> Field:
    """Return a periodic noise field of unit deviation and spectrum 1/f^exponent, the same in every process."""
    white = np.random.default_rng(20240607).standard_normal((_TILE, _TILE))
    frequency = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None]) * _TILE
    # The constant wave gets an infinite frequency and so no power: the field has mean 0.
    frequency[0, 0] = np.inf
    # Waves with fewer than 4 periods per tile get no more power than a wave with 4, because in a window they would only
    # change the brightness of the whole.
    field = np.fft.irfft2(np.fft.rfft2(white) * np.maximum(frequency, 4) ** -exponent, s=(_TILE, _TILE))
    # The field is repeated beyond its edge, so that a window that starts near the edge needs no wrapping.
    return np.tile((field / field.std()).astype(np.float32), (2, 2))[: _TILE + 256, : _TILE + 256]


def noise(exponent: float, across: Field, down: Field, *, stretch: int = 1) -> Field:
    """Return windows (N, 64, 64) of a fixed noise field with spectrum 1/f^exponent and unit deviation.

    ``across``, ``down`` (N,) in [0, 1) place the window; ``stretch`` skips rows, which flattens the grain.
    """
    tile = _tile(exponent)
    # With stretch 4 a window covers 256 rows, so it starts in the upper half of the tile in order to end inside the
    # field.
    left, top = (across * _TILE).astype(int), (down * (_TILE if stretch == 1 else _TILE // 2)).astype(int)
    return np.stack([tile[t : t + SIZE * stretch : stretch, i : i + SIZE] for t, i in zip(top, left, strict=True)])


def blend(image: Field, colour: object, alpha: Field | float) -> None:
    """Paint ``colour`` (3,), (N, 3) or (N, 3, 64, 64) over ``image`` (N, 3, 64, 64) in place, opacity (N, 64, 64)."""
    paint = np.asarray(colour, dtype=np.float32)
    paint = paint if paint.ndim == 4 else paint.reshape(-1, 3, 1, 1)
    image += (paint - image) * (alpha if isinstance(alpha, float) else alpha[:, None])


_ROWS, _COLUMNS = (axis.astype(np.float32) for axis in np.mgrid[:SIZE, :SIZE])
_UP = 1 - _ROWS / (SIZE - 1)


def _gradient(count: int, low: object, high: object) -> Field:
    """Return (count, 3, 64, 64) from colour ``low`` at the bottom to ``high`` at the top."""
    ends = [np.asarray(end, dtype=np.float32).reshape(1, 3, 1, 1) for end in (low, high)]
    return np.repeat(ends[0] + (ends[1] - ends[0]) * _UP, count, axis=0)


def _below(line: Field | NDArray[np.floating]) -> Field:
    """Return the antialiased mask (N, 64, 64) of what lies below ``line`` (N, 1, 64 or 1), in rows from the top."""
    return np.clip(_ROWS - line + np.float32(0.5), 0, 1).astype(np.float32)


def _rows(uniform: Field, low: float, high: float) -> Field:
    """Return (N, 1, 1) heights, in rows from the top, between two fractions of the frame."""
    return ((low + (high - low) * uniform) * SIZE).astype(np.float32)[:, None, None]


def _sky(u: Field) -> Field:
    image = _gradient(len(u), (0.72, 0.86, 0.97), (0.24, 0.50, 0.86))
    # Clouds: the larger values of a smooth noise.
    blend(image, (1, 1, 1), np.clip(noise(1.7, u[:, 0], u[:, 1]) * 0.55 - 0.05, 0, 0.92))
    return image


def _meadow(u: Field) -> Field:
    image = _gradient(len(u), (0.93, 0.95, 0.90), (0.45, 0.70, 0.93))
    # A far hill, a near one below it, and blades of grass on both.
    hill = _rows(u[:, 2], 0.35, 0.6) + 3.5 * np.sin(_COLUMNS[:1] * 0.09 + 6.28 * u[:, 3, None, None])
    blend(image, (0.47, 0.69, 0.37), _below(hill))
    blend(image, (0.25, 0.54, 0.20), _below(hill + 7 + 2 * np.sin(_COLUMNS[:1] * 0.13 + 6.28 * u[:, 4, None, None])))
    grass = np.clip(noise(0.7, u[:, 0], u[:, 1]) * 0.4, 0, 0.6) * _below(hill + 4)
    blend(image, (0.62, 0.78, 0.30), grass)
    return image


def _desert(u: Field) -> Field:
    image = _gradient(len(u), (0.99, 0.86, 0.62), (0.55, 0.74, 0.88))
    # The two dunes share a phase. The near dune moves by twice the phase, so that the two are never parallel.
    phase = 6.28 * u[:, 3, None, None]
    far = _rows(u[:, 2], 0.35, 0.55) + 4 * np.sin(_COLUMNS[:1] * 0.08 + phase)
    blend(image, (0.90, 0.70, 0.42), _below(far))
    near = far + 14 - 5 * np.sin(_COLUMNS[:1] * 0.06 + 2 * phase)
    blend(image, (0.80, 0.55, 0.28), _below(near))
    ripples = np.sin(_ROWS * 0.9 + 0.35 * _COLUMNS + 2 * noise(1.7, u[:, 0], u[:, 1]))
    blend(image, (0.97, 0.80, 0.52), np.clip(ripples * 0.3, 0, 0.3) * _below(near))
    return image


def _ocean(u: Field) -> Field:
    image = _gradient(len(u), (0.95, 0.80, 0.74), (0.52, 0.66, 0.86))
    horizon = _rows(u[:, 2], 0.2, 0.4)
    sea = _below(horizon)
    # The water is turquoise at the horizon and darkens until 40 rows below it.
    depth = np.clip((_ROWS - horizon) / 40, 0, 1).astype(np.float32)
    blend(image, (0.16, 0.55, 0.66), sea)
    blend(image, (0.03, 0.22, 0.42), depth)
    waves = np.clip(noise(1.2, u[:, 0], u[:, 1], stretch=4) * 0.5 - 0.25, 0, 0.75)
    blend(image, (0.82, 0.94, 0.95), waves * sea)
    return image


def _night(u: Field) -> Field:
    image = _gradient(len(u), (0.16, 0.12, 0.30), (0.02, 0.03, 0.11))
    glow = np.clip(noise(2.2, u[:, 2], u[:, 3]) * 0.35, 0, 0.6) * _UP
    blend(image, (0.16, 0.50, 0.48), glow.astype(np.float32))
    # White noise of deviation 1 exceeds 2.3 at about one pixel in a hundred.
    stars = np.clip((noise(0.0, u[:, 0], u[:, 1]) - 2.3) * 1.6, 0, 1)
    blend(image, (1.0, 0.97, 0.86), stars)
    return image


def _snow(u: Field) -> Field:
    image = _gradient(len(u), (0.86, 0.90, 0.95), (0.60, 0.68, 0.78))
    drift = _rows(u[:, 2], 0.5, 0.75) + 3 * np.sin(_COLUMNS[:1] * 0.1 + 6.28 * u[:, 3, None, None])
    shade = np.clip(noise(1.7, u[:, 0], u[:, 1]) * 0.2, 0, 0.4)
    blend(image, (0.97, 0.98, 1.0), _below(drift))
    blend(image, (0.74, 0.82, 0.92), shade * _below(drift))
    # Flakes are painted after the snow drift, because they fall in front of it.
    flakes = np.clip(noise(0.25, u[:, 4], u[:, 5]) - 1.6, 0, 0.9)
    blend(image, (1, 1, 1), flakes)
    return image


def _wall(u: Field) -> Field:
    tall, wide = 8.0, 16.0
    row = (_ROWS + tall * u[:, 2, None, None]) / tall
    course = np.floor(row)
    # Every other course of bricks is moved by half a brick.
    column = (_COLUMNS + wide * u[:, 3, None, None]) / wide + 0.5 * np.mod(course, 2)
    brick = np.floor(column)
    # A hash that is common in shaders: the fractional part of a large multiple of a sine looks random for each brick.
    tint = np.mod(np.sin(course * 12.9 + brick * 78.2 + 6.28 * u[:, 4, None, None]) * 437.6, 1).astype(np.float32)
    image = _gradient(len(u), (0.60, 0.27, 0.20), (0.69, 0.35, 0.26))
    blend(image, (0.42, 0.20, 0.17), tint * 0.75)
    # Distances across and down to the edge of the brick have the same unit, so that the mortar is equally wide both
    # ways.
    joint = np.minimum(0.5 - np.abs(row - course - 0.5), (0.5 - np.abs(column - brick - 0.5)) * (wide / tall))
    blend(image, (0.80, 0.76, 0.70), np.clip(1.3 - joint * tall, 0, 1).astype(np.float32))
    blend(image, (0.2, 0.1, 0.1), np.clip(noise(0.7, u[:, 0], u[:, 1]) * 0.12, 0, 0.4))
    return image


def _wood(u: Field) -> Field:
    wide = 16.0
    plank = (_COLUMNS + wide * u[:, 2, None, None]) / wide
    number = np.floor(plank)
    tint = np.mod(np.sin(number * 45.2 + 6.28 * u[:, 3, None, None]) * 437.6, 1).astype(np.float32)
    image = _gradient(len(u), (0.70, 0.49, 0.29), (0.78, 0.58, 0.37))
    blend(image, (0.52, 0.34, 0.18), tint * 0.6)
    # The rows of the stretched noise become columns: the grain runs along the planks.
    grain = noise(1.2, u[:, 0], u[:, 1], stretch=4).transpose(0, 2, 1)
    blend(image, (0.36, 0.21, 0.10), np.clip(grain * 0.25, 0, 0.5))
    seam = 0.5 - np.abs(plank - number - 0.5)
    blend(image, (0.22, 0.12, 0.06), np.clip(1.2 - seam * wide, 0, 0.9).astype(np.float32))
    return image


SCENES: dict[str, Callable[[Field], Field]] = {
    "sky": _sky,
    "meadow": _meadow,
    "desert": _desert,
    "ocean": _ocean,
    "night": _night,
    "snow": _snow,
    "wall": _wall,
    "wood": _wood,
}


def paint(scene: str, scenery: Field) -> Field:
    """Return backgrounds (N, 3, 64, 64) float32 in [0, 1] of one scene.

    ``scenery`` (N, 6) float32 uniforms in [0, 1): horizon, phases and noise windows. Raises KeyError for a scene
    that is not in SCENES.
    """
    return SCENES[scene](scenery)
