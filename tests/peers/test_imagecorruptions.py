"""Corruptions against imagecorruptions, fed with the same draws, and against OpenCV where that package leaves ImageNet-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from qatlab.data.corruptions import TABLES, corrupt
from qatlab.data.corruptions.blur import disk
from qatlab.data.corruptions.spatter import canny, equalized, relief, steps
from qatlab.data.embedded.sets import EmbeddedSet

peer = pytest.importorskip(
    "imagecorruptions.corruptions", reason="imagecorruptions is not installed: the extra 'peers'"
)
cv2 = pytest.importorskip("cv2")
pytestmark = pytest.mark.peers

# Levels: (largest difference, mean difference). Elastic transform and frost are not ImageNet-C's there.
CLOSE = {
    "defocus_blur": (1, 0.05),
    "motion_blur": (1, 0.6),  # rounded here as in ImageMagick, cut off there
    "zoom_blur": (1, 0.01),
    "fog": (1, 0.01),
    "snow": (2, 0.1),
    "brightness": (1, 0.1),
    "saturate": (1, 0.1),
    "spatter": (60, 0.05),  # a few pixels whose nearest edge is another one in chess moves
}
EQUAL = [name for name in TABLES["imagenet_c"] if name not in CLOSE and name not in ("elastic_transform", "frost")]


def zoom_with_the_middle_kept(x: np.ndarray, factor: float) -> np.ndarray:
    """ImageNet-C's; the package cuts off below and at the right."""
    height, width = (int(np.ceil(side / factor)) for side in x.shape[:2])
    top, left = (x.shape[0] - height) // 2, (x.shape[1] - width) // 2
    large = ndimage.zoom(x[top : top + height, left : left + width], (factor, factor, 1), order=1)
    top, left = (large.shape[0] - x.shape[0]) // 2, (large.shape[1] - x.shape[1]) // 2
    return large[top : top + x.shape[0], left : left + x.shape[1]]


@contextmanager
def draws_of(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name in ("normal", "poisson", "uniform"):
            patch.setattr(np.random, name, getattr(rng, name))
        patch.setattr(np.random, "randint", lambda low, high, size: rng.integers(low, high, size=size))
        patch.setattr(np.random, "seed", lambda _: None)
        patch.setattr(peer, "_shuffle_pixels_njit_glass_blur", peer._shuffle_pixels_njit_glass_blur.py_func)
        patch.setattr(peer, "clipped_zoom", zoom_with_the_middle_kept)
        yield


def theirs(image: np.ndarray, name: str, severity: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    rng = np.random.default_rng(0)
    seed = {"impulse_noise": {"seed": rng}, "glass_blur": {"seed": 0}}.get(name, {})
    with draws_of(rng, monkeypatch):
        return np.uint8(getattr(peer, name)(Image.fromarray(image), severity, **seed)).astype(int)


def pictures() -> list[np.ndarray]:
    images = EmbeddedSet("id", 3).__getitems__([0, 1, 2])
    whole = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image, _ in images]
    return [np.array(picture.resize(size)) for picture, size in zip(whole, [(64, 64), (72, 48), (48, 96)], strict=True)]


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", [*EQUAL, *CLOSE])
def test_same_draws_give_the_same_image(name: str, severity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for image in pictures():
        expected = theirs(image, name, severity, monkeypatch)
        mine = corrupt(image, name, severity, "imagenet_c", np.random.default_rng(0))
        largest, mean = CLOSE.get(name, (0, 0))
        difference = np.abs(mine - expected)
        assert difference.max() <= largest
        assert difference.mean() <= mean


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("severity", range(1, 6))
def test_elastic_transform_is_opencv_s_map_and_scipy_s_displacement(table: str, severity: int) -> None:
    alpha, sigma, affine = TABLES[table]["elastic_transform"][severity - 1]
    side = 224 if table == "imagenet_c" else 32
    image = np.array(Image.fromarray(pictures()[0]).resize((side, side)))
    rng = np.random.default_rng(0)
    middle, arm = np.float32([side // 2, side // 2]), side // 3
    before = np.float32([middle + arm, [middle[0] + arm, middle[1] - arm], middle - arm])
    after = before + rng.uniform(-affine, affine, size=before.shape).astype(np.float32)
    transform = cv2.getAffineTransform(before, after)
    x = cv2.warpAffine(np.float32(image) / 255, transform, (side, side), borderMode=cv2.BORDER_REFLECT_101)
    right, down = (
        alpha * ndimage.gaussian_filter(rng.uniform(-1, 1, (side, side)), sigma, mode="reflect", truncate=3)
        for _ in "xy"
    )
    rows, columns = np.mgrid[:side, :side]
    places = [rows + down, columns + right]
    channels = [ndimage.map_coordinates(x[..., c], places, order=1, mode="reflect") for c in range(3)]
    expected = np.clip(np.stack(channels, 2), 0, 1) * 255
    mine = corrupt(image, "elastic_transform", severity, table, np.random.default_rng(0))
    assert np.abs(mine - expected).mean() < 1  # half a level is cut off, and OpenCV's coordinates are in 1/32 pixel


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("severity", range(1, 6))
def test_disk_is_opencv_s(table: str, severity: int) -> None:
    radius, alias = TABLES[table]["defocus_blur"][severity - 1]
    np.testing.assert_allclose(disk(radius, alias), peer.disk(radius, alias), atol=1e-6)


@pytest.mark.parametrize("case", [(224, 4, 0.69), (224, 2, 0.68), (32, 0.7, 0.66), (100, 1, 0.3)])
def test_edges_distances_and_relief_are_opencv_s(case: tuple[int, float, float]) -> None:
    side, blur, threshold = case
    liquid = ndimage.gaussian_filter(np.random.default_rng(0).normal(0.65, 0.3, (side, side)), blur)
    drops = (np.clip(liquid * (liquid >= threshold), 0, 1) * 255).astype(np.uint8)
    edges = cv2.Canny(drops, 50, 150)
    np.testing.assert_array_equal(canny(drops, 50, 150), edges > 0)
    distance = np.minimum(cv2.distanceTransform(255 - edges, cv2.DIST_L2, 5), 20)
    difference = np.abs(np.minimum(steps(edges > 0), 20) - distance)
    assert difference.max() < 0.7
    assert (difference > 1e-3).mean() < 0.01
    levels = cv2.blur(distance, (3, 3)).astype(np.uint8)
    np.testing.assert_array_equal(equalized(levels), cv2.equalizeHist(levels))
    kernel = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    expected = cv2.blur(cv2.filter2D(cv2.equalizeHist(levels), cv2.CV_8U, kernel), (3, 3))
    assert (np.abs(relief(drops) - expected) > 1).mean() < 0.02
