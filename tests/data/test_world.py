from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from qatlab.core.errors import UserError
from qatlab.data.embedded import shapes, world
from qatlab.data.embedded.scenes import SCENES
from qatlab.data.embedded.vocabulary import END, TEMPLATES, WORDS, caption, tokenize


def specs(count: int, seed: int = 0) -> list[world.Spec]:
    return [world.draw(seed, "test", i) for i in range(count)]


def large(shape: str, **changes: object) -> world.Spec:
    """A white, upright shape of radius 24 px on the flat black background, unlit."""
    fixed = {"colour": "white", "texture": "plain", "scene": world.FLAT, "x": 0.0, "y": 0.0, "size": 0.75, "angle": 0.0}
    spec = replace(world.draw(0, "test", 0, shape=shape), stretch=1.0, light=1.0, scenery=(0.0,) * 6, **fixed)
    return replace(spec, **changes)


def test_the_world_has_its_size() -> None:
    assert len(world.SHAPES) == 16
    assert len(world.HELD_OUT_SHAPES) == 6
    assert not set(world.SHAPES) & set(world.HELD_OUT_SHAPES)
    assert (len(world.COLOURS), len(world.TEXTURES), len(SCENES)) == (10, 4, 8)


def test_an_image_is_the_same_alone_and_in_company() -> None:
    together = world.render(specs(40))
    assert together.shape == (40, 3, 64, 64)
    assert together.dtype == np.uint8
    for i in (0, 7, 39):
        np.testing.assert_array_equal(world.render([world.draw(0, "test", i)])[0], together[i])
    np.testing.assert_array_equal(world.render(specs(40)[::-1])[::-1], together)


def test_seed_stream_and_index_each_change_the_image() -> None:
    base = world.render([world.draw(0, "test", 5)])[0]
    for other in (world.draw(1, "test", 5), world.draw(0, "other", 5), world.draw(0, "test", 6)):
        assert (world.render([other])[0] != base).any()


def test_arguments_change_only_what_they_name() -> None:
    usual, unusual = (world.draw(0, "test", 3, shape="star", usual=p) for p in (1.0, 0.0))
    assert usual.scene == world.usual_scene("star") != unusual.scene
    assert replace(usual, scene=unusual.scene) == unusual


def test_usual_scene_probability() -> None:
    for usual in (0.125, 0.9):
        hits = [
            s.scene == world.usual_scene(s.shape) for s in (world.draw(0, "p", i, usual=usual) for i in range(2000))
        ]
        assert np.mean(hits) == pytest.approx(usual, abs=3.5 * (usual * (1 - usual) / 2000) ** 0.5)
    shared = [world.usual_scene(shape) for shape in world.SHAPES]
    assert all(shared.count(scene) == 2 for scene in SCENES)


def test_a_disc_covers_the_area_of_a_disc() -> None:
    """Antialiasing gives the exact area, which thresholded pixels do not, and a ramp one pixel wide."""
    grid = (2 * np.arange(64, dtype=np.float32) + 1) / 64 - 1
    x, y = np.meshgrid(grid, grid)
    for radius_px in (8.3, 8.5, 8.7):
        scale = np.float32(radius_px / 32 / 0.9)
        pixels = shapes.distance("circle", x / scale, y / scale) * scale * 32
        cover = np.clip(0.5 - pixels, 0, 1)
        assert cover.sum() == pytest.approx(np.pi * radius_px**2, rel=0.005)
        partial = (cover > 0) & (cover < 1)
        assert 0.7 < partial.sum() / (2 * np.pi * radius_px) < 1.5


@pytest.mark.parametrize("shape", world.SHAPES + world.HELD_OUT_SHAPES)
def test_distances_are_those_to_the_outline(shape: str) -> None:
    """Against brute force: the distance to the nearest sign change on a fine grid, wherever that is close."""
    axis = np.linspace(-1.3, 1.3, 261, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    d = shapes.distance(shape, x, y)
    change = np.zeros(d.shape, bool)
    change[:, :-1] |= (d[:, :-1] < 0) != (d[:, 1:] < 0)
    change[:-1] |= (d[:-1] < 0) != (d[1:] < 0)
    outline = np.stack([x[change], y[change]], axis=1)
    assert not (d[[0, -1]] < 0).any()
    assert not (d[:, [0, -1]] < 0).any()
    near = np.argwhere((np.abs(d) < 0.1) & (np.abs(d) > 0.03))[::37]
    brute = np.array([np.hypot(*(outline - [x[r, c], y[r, c]]).T).min() for r, c in near])
    ratio = np.abs(d[tuple(near.T)]) / brute
    assert (np.abs(d[tuple(near.T)]) < brute + 0.02).all()
    assert 0.85 < np.median(ratio) < 1.15


def test_edges_are_antialiased_in_the_image() -> None:
    image = world.render([large("circle")])[0].mean(axis=0)
    row = image[32]
    assert row[32] > 200
    assert row[2] < 60
    levels = [np.unique(world.render([large("circle", x=shift / 320)])[0][0, 32]).size for shift in range(4)]
    assert min(levels) > 3
    moved = [world.render([large("circle", x=shift / 320)])[0][0, 32].astype(float).sum() for shift in range(11)]
    assert np.ptp(moved) < 0.02 * np.mean(moved)  # moves by tenths of a pixel without a jump in brightness


def test_outline_shows_the_scene_through() -> None:
    filled, line = world.render([large("square")])[0], world.render([large("square")], outline=True)[0]
    empty = world.to_bytes(world.backgrounds([world.FLAT], np.zeros((1, 6), np.float32)))[0]
    assert (filled[:, 32, 32] > 200).all()
    faint = empty[:, 32, 32] + 0.35 * (filled[:, 20:44, 20:44].max() - empty[:, 32, 32].astype(float))
    assert np.abs(line[:, 32, 32] - faint).max() < 25
    assert (line.max(axis=(1, 2)) > line[:, 32, 32] + 60).all()


def test_every_texture_and_scene_looks_different() -> None:
    bodies = world.render([large("square", texture=texture) for texture in world.TEXTURES])[:, :, 20:44, 20:44]
    scenes = world.render([large("pill", scene=scene, size=0.2, scenery=(0.3,) * 6) for scene in SCENES])
    for pictures in (bodies, scenes):
        flat = pictures.reshape(len(pictures), -1).astype(float)
        distances = np.abs(flat[:, None] - flat[None]).mean(axis=2)
        assert (distances[~np.eye(len(flat), dtype=bool)] > 5).all()


def test_captions_are_true() -> None:
    seen: set[str] = set()
    for spec in specs(1500):
        words = caption(spec).split()
        seen.update(words)
        assert [w for w in words if w in world.SHAPES] == [spec.shape]
        assert [w for w in words if w in world.COLOURS] in ([], [spec.colour])
        assert [w for w in words if w in world.TEXTURES] in ([], [spec.texture])
        assert [w for w in words if w in SCENES] in ([], [spec.scene])
        assert [w for w in words if w in ("small", "large")] in ([], ["small" if spec.size < 0.54 else "large"])
    assert set(world.SHAPES) | set(world.COLOURS) | set(SCENES) | {"small", "large", "an"} <= seen
    assert set(world.TEXTURES) - seen == {"plain"}


def test_articles() -> None:
    texts = [caption(spec) for spec in specs(500)]
    for text in texts:
        words = text.split()
        for first, second in pairwise(words):
            if first in ("a", "an"):
                assert (first == "an") == (second[0] in "aeiou")


def test_first_lessons_and_held_out_shapes() -> None:
    lesson = world.draw(0, "test", 11, first_lesson=True)
    assert (lesson.texture, lesson.scene) == ("plain", world.FLAT)
    assert world.FLAT not in caption(lesson)
    with pytest.raises(UserError, match="no word for the shape 'arrow'"):
        caption(world.draw(0, "test", 0, shape="arrow"))


def test_tokens() -> None:
    tokens = tokenize(["a red star", "A photo of a circle."])
    assert tokens.shape == (2, 16)
    assert str(tokens.dtype) == "torch.int64"
    assert tokens.argmax(dim=1).tolist() == [4, 6]
    assert (tokens.max(dim=1).values == END).all()
    assert len(WORDS) < END - 2
    assert tokenize("the star").tolist() == tokenize(["the star"]).tolist()
    assert len({tuple(row.tolist()) for row in tokenize(WORDS)}) == len(WORDS)
    tokenize([template.format(shape) for template in TEMPLATES for shape in world.SHAPES])


def test_unknown_word_is_named() -> None:
    with pytest.raises(UserError, match=r"no word 'cirle'.*did you mean 'circle'"):
        tokenize(["a red cirle"])
    with pytest.raises(UserError, match="15 words"):
        tokenize([" ".join(["a"] * 15)])
