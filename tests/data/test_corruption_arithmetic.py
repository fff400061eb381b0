"""What each corruption computes, against the standard library, scipy, Pillow, a formula or a loop over pixels."""

import colorsys
import io
import math

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from qatlab.data.corruptions import TABLES, corrupt
from qatlab.data.corruptions.blur import disk, shuffled
from qatlab.data.corruptions.digital import elastic_transform, smooth
from qatlab.data.corruptions.filters import moved, plasma, zoomed
from qatlab.data.corruptions.textures import COLOURS, drawn


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def corrupted(image, name, severity, table="imagenet_c", seed=0):
    return corrupt(image, name, severity, table, np.random.default_rng(seed))


def off_by(left, right):
    return np.abs(np.asarray(left, dtype=float) - right).max()


# The mean is given half a level: values are cut off, not rounded.
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("severity", range(1, 4))
def test_noise_has_the_moments_of_its_formula(table, severity):
    level = 0.4
    grey = np.full((224, 224, 3), round(level * 255), dtype=np.uint8)
    rows = TABLES[table]
    expected = {
        "gaussian_noise": rows["gaussian_noise"][severity - 1][0],
        "shot_noise": math.sqrt(level / rows["shot_noise"][severity - 1][0]),
        "speckle_noise": level * rows["speckle_noise"][severity - 1][0],
    }
    for name, sigma in expected.items():
        x = corrupted(grey, name, severity, table).astype(float) / 255
        assert x.mean() + 0.5 / 255 == pytest.approx(level, abs=0.004), name
        assert x.std() == pytest.approx(sigma, rel=0.04), name


@pytest.mark.parametrize("severity", range(1, 6))
def test_impulses_hit_their_share_of_the_values_half_of_them_white(severity):
    amount = TABLES["imagenet_c"]["impulse_noise"][severity - 1][0]
    x = corrupted(np.full((224, 224, 3), 100, dtype=np.uint8), "impulse_noise", severity)
    n = x.size
    for value in (0, 255):
        assert (x == value).sum() == pytest.approx(n * amount / 2, abs=4 * math.sqrt(n * amount / 2))
    assert np.isin(x, (0, 100, 255)).all()


@pytest.mark.parametrize("delta", [1, 2, 4])
@pytest.mark.parametrize("shape", [(30, 30), (17, 40), (9, 9), (7, 50)])
def test_glass_copies_as_the_loop_over_views_does(delta, shape):
    image = random_image(*shape)
    rng = np.random.default_rng(delta)
    expected = image.copy()
    height, width = shape
    for h in range(height - delta, delta, -1):
        for w in range(width - delta, delta, -1):
            dx, dy = rng.integers(-delta, delta, size=2)
            expected[h, w], expected[h + dy, w + dx] = expected[h + dy, w + dx], expected[h, w]
    np.testing.assert_array_equal(shuffled(image, delta, np.random.default_rng(delta)), expected)


@pytest.mark.parametrize("angle", [-135, -90, -45, -20.5, 0, 33, 45])
def test_motion_averages_along_a_line(angle):
    image = random_image(20, 14).astype(np.float64)
    weights = np.array([math.exp(-i * i / (2 * 5**2)) for i in range(21)])
    expected = np.zeros_like(image)
    for y in range(20):
        for x in range(14):
            for i, weight in enumerate(weights / weights.sum()):
                down = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
                right = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
                expected[y, x] += weight * image[min(max(y + down, 0), 19), min(max(x + right, 0), 13)]
    np.testing.assert_allclose(moved(image, 10, 5, angle), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(32, 32), (45, 70)])
@pytest.mark.parametrize("factor", [1, 1.03, 1.26, 2.5, 4.5])
def test_zoom_keeps_the_middle_of_scipy_s(shape, factor):
    x = random_image(*shape) / 255
    starts = [(side - math.ceil(side / factor)) // 2 for side in shape]
    inner = [slice(start, start + math.ceil(side / factor)) for start, side in zip(starts, shape, strict=True)]
    large = ndimage.zoom(x[inner[0], inner[1]], (factor, factor, 1), order=1)
    top, left = ((have - want) // 2 for have, want in zip(large.shape, shape, strict=False))
    expected = large[top : top + shape[0], left : left + shape[1]]
    np.testing.assert_allclose(zoomed(x, [factor]), expected, atol=1e-5)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("severity", range(1, 6))
def test_defocus_is_a_correlation_with_a_disk(table, severity):
    image = random_image(40, 33)
    kernel = disk(*TABLES[table]["defocus_blur"][severity - 1])
    assert kernel.sum() == pytest.approx(1, abs=0.013)  # a disk as wide as its kernel gains what is mirrored at the rim
    expected = np.stack([ndimage.correlate(c, kernel, mode="mirror") for c in np.moveaxis(image / 255, 2, 0)], 2)
    assert off_by(corrupted(image, "defocus_blur", severity, table), np.floor(expected * 255 + 1e-9)) <= 1


@pytest.mark.parametrize("sigma", [0, 0.96, 2.44, 19.52, 170.8])
def test_displacements_are_smoothed_as_scipy_does(sigma):
    field = np.random.default_rng(0).uniform(-1, 1, (40, 57))
    expected = ndimage.gaussian_filter(field, sigma, mode="reflect", truncate=3)
    np.testing.assert_allclose(smooth(field, sigma), expected, atol=1e-12)


def test_elastic_moves_three_points_where_it_says():
    rows, columns = np.mgrid[:90, :120]
    ramp = np.stack([2 * rows, 2 * columns, rows + columns], 2).astype(np.uint8)
    middle, arm = np.array([60, 45]), 30
    before = middle + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + np.random.default_rng(3).uniform(-6, 6, (3, 2))
    x = elastic_transform(ramp, np.random.default_rng(3), 0, 0, 6) * 255
    for (x0, y0), (x1, y1) in zip(before, after, strict=True):
        found = [ndimage.map_coordinates(x[..., c], [[y1], [x1]], order=1)[0] for c in range(3)]
        np.testing.assert_allclose(found, [2 * y0, 2 * x0, y0 + x0], atol=1e-3)


def test_elastic_displaces_by_smooth_noise():
    image = random_image(50, 40)
    rng = np.random.default_rng(0)
    rng.uniform(size=(3, 2))
    right, down = (
        12 * ndimage.gaussian_filter(rng.uniform(-1, 1, (50, 40)), 2.5, mode="reflect", truncate=3) for _ in "xy"
    )
    rows, columns = np.mgrid[:50, :40]
    expected = [
        ndimage.map_coordinates(c, [rows + down, columns + right], order=1, mode="reflect")
        for c in np.moveaxis(image / 255, 2, 0)
    ]
    np.testing.assert_allclose(
        elastic_transform(image, np.random.default_rng(0), 12, 2.5, 0), np.stack(expected, 2), atol=1e-12
    )


def hsv(image, change):
    out = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in image.reshape(-1, 3) / 255]
    return (np.clip(np.array(out).reshape(image.shape), 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("severity", range(1, 6))
def test_brightness_and_saturation_against_colorsys(table, severity):
    image = random_image(24, 24)
    image[0] = np.arange(0, 240, 10)[:, None]  # greys, the first of them black
    added = TABLES[table]["brightness"][severity - 1][0]
    factor, offset = TABLES[table]["saturate"][severity - 1]
    lighter = hsv(image, lambda h, s, v: (h, s, min(v + added, 1)))
    assert off_by(corrupted(image, "brightness", severity, table), lighter) <= 1
    richer = hsv(image, lambda h, s, v: (h, min(s * factor + offset, 1), v))
    assert off_by(corrupted(image, "saturate", severity, table), richer) <= 1


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("severity", range(1, 6))
def test_jpeg_and_pixelate_are_pillow_s(table, severity):
    image = ndimage.gaussian_filter(random_image(37, 52), (2, 2, 0))
    picture, file = Image.fromarray(image), io.BytesIO()
    picture.save(file, "JPEG", quality=TABLES[table]["jpeg_compression"][severity - 1][0])
    np.testing.assert_array_equal(corrupted(image, "jpeg_compression", severity, table), np.asarray(Image.open(file)))
    factor = TABLES[table]["pixelate"][severity - 1][0]
    small = picture.resize((int(52 * factor), int(37 * factor)), Image.Resampling.BOX)
    expected = np.asarray(small.resize((52, 37), Image.Resampling.BOX))
    np.testing.assert_array_equal(corrupted(image, "pixelate", severity, table), expected)


def test_contrast_keeps_the_mean_of_each_channel():
    image = (random_image(64, 64) * [0.2, 0.5, 1]).astype(np.uint8)
    for severity, factor in enumerate((0.4, 0.3, 0.2, 0.1, 0.05), 1):
        x = corrupted(image, "contrast", severity).astype(float)
        np.testing.assert_allclose(x.mean((0, 1)) + 0.5, image.mean((0, 1)), atol=0.6)
        np.testing.assert_allclose(x.std((0, 1)), image.std((0, 1)) * factor, atol=0.2)


def test_fog_is_a_cloud_between_nothing_and_white():
    cloud = plasma(64, 2, np.random.default_rng(0))
    assert (cloud.min(), cloud.max()) == (0, 1)
    rough, fine = (np.abs(np.diff(plasma(64, decay, np.random.default_rng(0)))).mean() for decay in (1.4, 3))
    assert rough > 2 * fine
    black = corrupted(np.zeros((64, 64, 3), dtype=np.uint8), "fog", 3)
    assert not black.any()  # the brightest value of the image is what fog is as bright as
    image = np.full((64, 64, 3), 200, dtype=np.uint8)
    cloud = plasma(64, 1.7, np.random.default_rng(0))[..., None]
    assert off_by(corrupted(image, "fog", 3), (200 / 255 + 2.5 * cloud) * 200 / (200 / 255 + 2.5)) <= 1


def test_frost_is_a_weighted_sum_with_one_of_five_textures(tmp_path):
    for number in range(5):
        name = f"frost{number + 1}.{'png' if number < 3 else 'jpg'}"
        Image.new("RGB", (90, 60), (number * 40,) * 3).save(tmp_path / name)
    image = np.full((40, 100, 3), 50, dtype=np.uint8)  # wider than the textures, which are enlarged
    seen = {
        int(corrupt(image, "frost", 2, "imagenet_c", np.random.default_rng(seed), str(tmp_path))[0, 0, 0])
        for seed in range(40)
    }
    assert seen == {40 + int(0.6 * number * 40) for number in range(5)}


def test_drawn_frost_has_the_colours_it_is_to_have():
    for number, (mean, spread) in enumerate(COLOURS):
        x = drawn(number) / 255
        np.testing.assert_allclose(x.mean((0, 1)), mean, atol=0.01)
        np.testing.assert_allclose(x.std((0, 1)), spread, atol=0.01)


def test_water_adds_light_and_mud_takes_it_away():
    grey = np.full((128, 128, 3), 128, dtype=np.uint8)
    for severity in (1, 2, 3):
        water = corrupted(grey, "spatter", severity)
        assert water.min() == 128
        assert 0.01 < (water > 128).mean() < 0.5
        reds, greens, blues = np.moveaxis(water.astype(int) - 128, 2, 0)
        np.testing.assert_array_equal(greens, blues)
        assert (reds <= greens).all()
    for severity in (4, 5):
        mud = corrupted(grey, "spatter", severity)
        assert mud.max() == 128
        assert (mud.min((0, 1)) == [63, 42, 20]).all()
