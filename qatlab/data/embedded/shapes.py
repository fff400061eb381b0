"""The embedded world's shapes: 16 named ones and 6 held out, each a signed distance to its outline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Point = tuple[float, float]


def _polygon(*corners: Point) -> Callable[[Field, Field], Field]:
    """Return the exact signed distance to a closed polygon (Quilez 2018, "2D distance functions")."""

    def distance(x: Field, y: Field) -> Field:
        square = np.full_like(x, np.inf)
        inside = np.zeros(x.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            ex, ey = np.float32(bx - ax), np.float32(by - ay)
            wx, wy = x - np.float32(ax), y - np.float32(ay)
            # The nearest point of an edge is the foot of the perpendicular, limited to the range between the two
            # corners.
            along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
            np.minimum(square, (wx - along * ex) ** 2 + (wy - along * ey) ** 2, out=square)
            # A point is inside if a ray from it towards +x crosses an odd number of edges; a horizontal edge never
            # counts.
            if ey:
                inside ^= ((y >= ay) != (y >= by)) & ((ex * wy - ey * wx > 0) == (ey > 0))
        return np.where(inside, -1, 1).astype(np.float32) * np.sqrt(square)

    return distance


def _regular(corners: int, radii: Sequence[float] = (1.0,)) -> list[Point]:
    """Return corners on circles, the first at the top; ``radii`` alternate, which makes stars."""
    angles = np.pi / 2 + 2 * np.pi * np.arange(corners) / corners
    return [
        (float(r * np.cos(a)), float(r * np.sin(a))) for a, r in zip(angles, np.resize(radii, corners), strict=True)
    ]


def _disc(x: Field, y: Field, cx: float, cy: float, radius: float) -> Field:
    return np.hypot(x - np.float32(cx), y - np.float32(cy)) - np.float32(radius)


def _circle(x: Field, y: Field) -> Field:
    return _disc(x, y, 0, 0, 0.9)


def _heart(x: Field, y: Field) -> Field:
    """Return the distance to Quilez' heart: a circular lobe on each side, meeting in a right-angled tip."""
    right, up = np.abs(x) / np.float32(1.65), y / np.float32(1.65) + np.float32(0.55)
    # 1.65 and 0.55 move and scale Quilez' heart so that it fits the unit circle.
    lobe = np.hypot(right - np.float32(0.25), up - np.float32(0.75)) - np.float32(np.sqrt(2) / 4)
    middle = np.maximum(right + up, 0) / 2
    tip = np.sqrt(np.minimum(right**2 + (up - 1) ** 2, (right - middle) ** 2 + (up - middle) ** 2))
    return np.where(right + up > 1, lobe, tip * np.sign(right - up)).astype(np.float32) * np.float32(1.65)


def _ring(x: Field, y: Field) -> Field:
    return np.abs(np.hypot(x, y) - np.float32(0.7)) - np.float32(0.24)


def _crescent(x: Field, y: Field) -> Field:
    body, bite = _disc(x, y, -0.1, 0, 0.95), -_disc(x, y, 0.36, 0, 0.78)
    # A crescent is the part of the body outside of the bite: the intersection of two shapes, given by their distances.
    return np.hypot(np.maximum(body, 0), np.maximum(bite, 0)) + np.minimum(np.maximum(body, bite), 0)


def _drop(x: Field, y: Field) -> Field:
    """Return the distance to a circle with the two tangents from a point above it."""
    radius, top, centre = 0.62, 1.02, -0.36
    sine = radius / (top - centre)
    cosine = float(np.sqrt(1 - sine**2))
    x = np.abs(x)
    side = x * np.float32(cosine) + (y - np.float32(top)) * np.float32(sine)
    above = (y - np.float32(centre)) * np.float32(cosine) > x * np.float32(sine)
    return np.where(above, side, _disc(x, y, 0, centre, radius)).astype(np.float32)


def _leaf(x: Field, y: Field) -> Field:
    return np.hypot(np.abs(x) + np.float32(0.62), y) - np.float32(1.18)


def _flower(x: Field, y: Field) -> Field:
    """Return the distance to six petals around a disc."""
    radius, step = np.hypot(x, y), np.float32(np.pi / 3)
    angle = np.mod(np.arctan2(y, x), step) - step / 2
    # The angle is folded into one sixth of the circle, so one petal stands for six.
    petal = _disc(radius * np.cos(angle), radius * np.sin(angle), 0.62, 0, 0.34)
    return np.minimum(petal, radius - np.float32(0.4))


def _pill(x: Field, y: Field) -> Field:
    return np.hypot(np.maximum(np.abs(x) - np.float32(0.56), 0), y) - np.float32(0.42)


def _semicircle(x: Field, y: Field) -> Field:
    return np.maximum(_disc(x, y, 0, -0.42, 1.0), -y - np.float32(0.42))


def _horseshoe(x: Field, y: Field) -> Field:
    centre = np.where(y > 0, np.hypot(x, y), np.abs(x)).astype(np.float32) - np.float32(0.66)
    return np.maximum(np.abs(centre) - np.float32(0.26), -y - np.float32(0.9))


def _clover(x: Field, y: Field) -> Field:
    lobes = np.minimum(_disc(np.abs(x), y, 0.44, -0.12, 0.42), _disc(x, y, 0, 0.5, 0.42))
    stem = np.maximum(np.abs(x) - np.float32(0.11) + y / 8, np.maximum(y, -y - np.float32(0.95)))
    return np.minimum(lobes, stem)


_STAR = _regular(10, (1.05, 0.45))
# The three corners of one arm, mirrored into four quadrants. Mirroring reverses the direction, so every other quadrant
# takes the corners backwards, and the outline runs around the cross once.
_CROSS: list[Point] = [
    (sx * x, sy * y)
    for sx, sy, order in ((1, 1, 1), (-1, 1, -1), (-1, -1, 1), (1, -1, -1))
    for x, y in ((0.95, 0.32), (0.32, 0.32), (0.32, 0.95))[::order]
]
_BOLT: list[Point] = [(0.3, 1.05), (-0.55, -0.12), (-0.08, -0.12), (-0.3, -1.05), (0.55, 0.18), (0.08, 0.18)]
_ARROW: list[Point] = [(0, 1), (0.75, 0.1), (0.3, 0.1), (0.3, -0.95), (-0.3, -0.95), (-0.3, 0.1), (-0.75, 0.1)]

NAMED: dict[str, Callable[[Field, Field], Field]] = {
    "circle": _circle,
    "square": _polygon((0.78, 0.78), (-0.78, 0.78), (-0.78, -0.78), (0.78, -0.78)),
    "triangle": _polygon((0, 0.95), (-0.95, -0.72), (0.95, -0.72)),
    "diamond": _polygon((0, 1.05), (-0.7, 0), (0, -1.05), (0.7, 0)),
    "pentagon": _polygon(*_regular(5)),
    "hexagon": _polygon(*_regular(6)),
    "star": _polygon(*_STAR),
    "heart": _heart,
    "cross": _polygon(*_CROSS),
    "ring": _ring,
    "crescent": _crescent,
    "drop": _drop,
    "leaf": _leaf,
    "flower": _flower,
    "bolt": _polygon(*_BOLT),
    "pill": _pill,
}
HELD_OUT: dict[str, Callable[[Field, Field], Field]] = {
    "semicircle": _semicircle,
    "trapezoid": _polygon((0.5, 0.62), (-0.5, 0.62), (-1.0, -0.62), (1.0, -0.62)),
    "arrow": _polygon(*_ARROW),
    "hourglass": _polygon((0.72, 0.92), (-0.72, 0.92), (-0.14, 0), (-0.72, -0.92), (0.72, -0.92), (0.14, 0)),
    "horseshoe": _horseshoe,
    "clover": _clover,
}


def distance(shape: str, x: Field, y: Field) -> Field:
    """Return the signed distance to the outline of ``shape``, negative inside, in units of its radius.

    ``x``, ``y``: float32 fields of any one shape, y upwards, in the shape's own frame (it lies about within the unit
    circle). Exact for polygons, discs and the heart; where parts meet or overlap a lower bound of the same sign.
    Raises KeyError for a shape that is neither named nor held out.
    """
    # Held-out shapes are drawn by the same code, so that they differ from the named shapes only in their outline.
    found = NAMED.get(shape) or HELD_OUT[shape]
    return found(x, y)
