"""The embedded world: one object on one scene, rendered by code at 64 px, a pure function of (seed, index)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qatlab.data.embedded.scenes import SCENES, SIZE, Field, blend, noise, paint
from qatlab.data.embedded.shapes import HELD_OUT, NAMED, distance

SHAPES = list(NAMED)
HELD_OUT_SHAPES = list(HELD_OUT)
SCENE_NAMES = list(SCENES)
# Raise this number when an index shows another image than before, because caches of rendered images contain it in
# names.
VERSION = 1
FLAT = "flat"  # the background of the first lessons: a single colour, which captions never mention
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.15, 0.16),
    "orange": (0.96, 0.53, 0.10),
    "yellow": (0.97, 0.86, 0.20),
    "green": (0.16, 0.62, 0.27),
    "cyan": (0.20, 0.76, 0.82),
    "blue": (0.16, 0.33, 0.86),
    "purple": (0.53, 0.24, 0.74),
    "pink": (0.96, 0.52, 0.72),
    "brown": (0.47, 0.28, 0.15),
    "white": (0.95, 0.95, 0.93),
}
TEXTURES = ["plain", "striped", "dotted", "checkered"]
SMALL, LARGE = 0.42, 0.66  # the smallest and the largest radius of an object, where 1 is half of the frame


@dataclass(frozen=True)
class Spec:
    """Everything that decides one image.

    ``x`` (to the right), ``y`` (upwards) and ``size`` (the radius) are in half frames, ``angle`` is in radians.
    ``stretch`` is width over height, ``light`` a factor of brightness. ``tint`` is added to the colour, ``pattern`` is
    the period of the texture in pixels. ``scenery`` are six uniform numbers for the background, and ``wording`` is a
    uniform number that chooses the form of the caption.
    """

    shape: str
    colour: str
    texture: str
    scene: str
    x: float
    y: float
    size: float
    angle: float
    stretch: float
    light: float
    tint: tuple[float, float, float]
    pattern: float
    scenery: tuple[float, ...]
    wording: float


def usual_scene(shape: str) -> str:
    """Return the scene in which a named shape is usually found; two shapes share each scene."""
    return SCENE_NAMES[SHAPES.index(shape) % len(SCENE_NAMES)]


def generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """Return the random generator of one image; streams with different names are independent."""
    # crc32 instead of hash(): Python salts the hashes of texts anew in each process.
    return np.random.default_rng((seed, zlib.crc32(stream.encode()), index))


def draw(
    seed: int, stream: str, index: int, *, shape: str | None = None, usual: float = 0.125, first_lesson: bool = False
) -> Spec:
    """Return the Spec of image ``index`` of a stream.

    ``shape`` is the shape, by default a random named one. ``usual`` is the probability of the shape's usual scene, and
    the other seven scenes share the rest; a held-out shape has no usual scene, and all eight are equally probable. A
    ``first_lesson`` has a plain texture on a flat background, and is nearer to the middle and to upright. All random
    numbers are always drawn, so that the same index shows the same object whatever the other arguments are.
    """
    # More numbers are drawn than are used today, so that a new property can take the next one and change no other.
    u = generator(seed, stream, index).random(24).tolist()
    chosen = shape or SHAPES[int(u[0] * len(SHAPES))]
    size = SMALL + (LARGE - SMALL) * u[4]
    # The range of places keeps the whole object inside the frame, with a margin of 3 %.
    room = 0.97 - size
    calm = 0.4 if first_lesson else 1.0
    return Spec(
        shape=chosen,
        colour=list(COLOURS)[int(u[1] * len(COLOURS))],
        texture="plain" if first_lesson else TEXTURES[int(u[2] * len(TEXTURES))],
        scene=FLAT if first_lesson else _scene(chosen, usual, u[3], u[5]),
        x=calm * room * (2 * u[6] - 1),
        y=calm * room * (2 * u[7] - 1),
        size=size,
        angle=calm * 0.6 * (u[8] - 0.5),
        stretch=0.9 + 0.2 * u[9],
        light=0.8 + 0.25 * u[10],
        tint=(0.12 * (u[11] - 0.5), 0.12 * (u[12] - 0.5), 0.12 * (u[13] - 0.5)),
        pattern=5.5 + 3 * u[14],
        scenery=tuple(u[15:21]),
        wording=u[21],
    )


def _scene(shape: str, usual: float, chance: float, which: float) -> str:
    # A held-out shape has no usual scene, because it never occurs in training.
    if shape not in NAMED:
        return SCENE_NAMES[int(which * len(SCENE_NAMES))]
    home = usual_scene(shape)
    if chance < usual:
        return home
    others = [scene for scene in SCENE_NAMES if scene != home]
    return others[int(which * len(others))]


def render(specs: Sequence[Spec], *, outline: bool = False) -> NDArray[np.uint8]:
    """Return the images (N, 3, 64, 64) uint8 RGB; an image does not depend on the others that it is rendered with.

    Edges are antialiased by the distance to the outline, with a ramp one pixel wide. ``outline`` draws a shape as a
    line around a faint body through which the scene is seen.
    """
    images = backgrounds([spec.scene for spec in specs], np.array([spec.scenery for spec in specs], np.float32))
    # Objects of one shape are painted together, because the distance to the outline is computed for all of them at
    # once.
    for shape in dict.fromkeys(spec.shape for spec in specs):
        members = [i for i, spec in enumerate(specs) if spec.shape == shape]
        group = images[members]
        _paint_object(group, [specs[i] for i in members], outline)
        images[members] = group
    # The light changes the object and the scene in the same way, so it is applied last.
    images *= np.array([spec.light for spec in specs], np.float32)[:, None, None, None]
    return to_bytes(images)


def surfaces(specs: Sequence[Spec]) -> Field:
    """Return frames (N, 3, 64, 64) float32 filled by the specs' colours and textures, tilted by their angles."""
    sine, cosine = _column([np.sin(s.angle) for s in specs]), _column([np.cos(s.angle) for s in specs])
    across, down = _ACROSS * np.float32(SIZE / 2), _DOWN * np.float32(SIZE / 2)
    colour = np.array([COLOURS[s.colour] for s in specs], np.float32)
    return _textured(colour, specs, cosine * across + sine * down, cosine * down - sine * across)


def to_bytes(images: Field) -> NDArray[np.uint8]:
    """Return images in [0, 1] as uint8 levels, clipped and rounded."""
    return (np.clip(images, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)


def backgrounds(scenes: Sequence[str], scenery: Field) -> Field:
    """Return backgrounds (N, 3, 64, 64) float32 in [0, 1] with a fine grain, from scene names and (N, 6) uniforms."""
    images = np.empty((len(scenes), 3, SIZE, SIZE), np.float32)
    for scene in dict.fromkeys(scenes):
        members = [i for i, name in enumerate(scenes) if name == scene]
        u = scenery[members]
        images[members] = (0.15 + 0.7 * u[:, :3, None, None]) if scene == FLAT else paint(scene, u)
    images += np.float32(0.012) * noise(0.0, scenery[:, 5], scenery[:, 4])[:, None]
    return images


_ACROSS, _DOWN = ((2 * axis.astype(np.float32) + 1) / SIZE - 1 for axis in np.mgrid[:SIZE, :SIZE][::-1])


def _column(values: Sequence[float]) -> Field:
    return np.array(values, np.float32)[:, None, None]


def _paint_object(images: Field, specs: Sequence[Spec], outline: bool) -> None:
    """Paint objects of one shape over (N, 3, 64, 64) in place: shadow, textured body lit from above, dark rim."""
    sine, cosine = _column([np.sin(s.angle) for s in specs]), _column([np.cos(s.angle) for s in specs])
    right, up = _ACROSS - _column([s.x for s in specs]), -_DOWN - _column([s.y for s in specs])
    scale = _column([s.size for s in specs])
    wide = scale * _column([s.stretch**0.5 for s in specs])
    high = scale / _column([s.stretch**0.5 for s in specs])
    x, y = (cosine * right + sine * up) / wide, (cosine * up - sine * right) / high
    # Width and height have different scales, and the distance is in units of the shape. The smaller of the two scales
    # gives pixels that are never more than the true distance.
    pixels = distance(specs[0].shape, x, y) * np.minimum(wide, high) * (SIZE / 2)
    colour = np.array([COLOURS[s.colour] for s in specs], np.float32) + np.array([s.tint for s in specs], np.float32)
    if outline:
        blend(images, colour, np.clip(np.float32(0.5) - pixels, 0, 1) * np.float32(0.35))
        blend(images, colour * np.float32(0.8), np.clip(np.float32(1.6) - np.abs(pixels), 0, 1))
        return
    # The shadow is the object itself, moved two pixels to the right and down, and softened.
    shadow = np.clip(np.float32(0.6) - np.roll(pixels, (2, 2), (1, 2)) / 4, 0, 1) * np.float32(0.4)
    # np.roll moves the pixels that leave on one side to the other side, where they are removed.
    shadow[:, :2], shadow[:, :, :2] = 0, 0
    blend(images, (0.02, 0.03, 0.06), shadow)
    # The body is lighter towards the upper left, as if lit from there, and has a darker rim inside the outline.
    shade = np.clip(1 + np.float32(0.16) * y - np.float32(0.06) * x, 0.75, 1.25)
    shade *= 1 - np.float32(0.4) * np.clip(pixels / 2 + 1, 0, 1)
    body = _textured(colour, specs, x * scale * (SIZE / 2), y * scale * (SIZE / 2)) * shade[:, None]
    blend(images, body, np.clip(np.float32(0.5) - pixels, 0, 1))


def _textured(colour: Field, specs: Sequence[Spec], x: Field, y: Field) -> Field:
    """Return body colours (N, 3, 64, 64): the object's colour, and a contrasting tone of it in the texture's pattern."""
    period = _column([s.pattern for s in specs])
    across, down = x / period, y / period
    sharp = period / 2
    tone = np.zeros_like(x)
    for i, spec in enumerate(specs):
        if spec.texture == "striped":
            tone[i] = (np.abs(down[i] - np.floor(down[i]) - 0.5) - 0.25) * 2
        elif spec.texture == "dotted":
            gap = np.hypot(across[i] - np.floor(across[i]) - 0.5, down[i] - np.floor(down[i]) - 0.5)
            tone[i] = (0.3 - gap) * 2
        elif spec.texture == "checkered":
            tone[i] = np.sin(np.pi * across[i]) * np.sin(np.pi * down[i]) * 0.6
        else:
            tone[i] = -1
    alpha: Field = np.clip(tone * sharp + np.float32(0.5), 0, 1)
    # The second tone is darker on bright objects and lighter on dark ones, so every pattern can be seen.
    bright = colour.mean(axis=1, keepdims=True) > np.float32(0.5)
    other = np.where(bright, colour / 2, colour * np.float32(0.45) + np.float32(0.5))
    body = np.broadcast_to(colour[:, :, None, None], (len(specs), 3, SIZE, SIZE)).copy()
    blend(body, other, alpha)
    return body
