"""Corruptions as a whole: constants, what decides an image, severity, shapes, the two regimes and each mistake's sentence."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from qatlab.core.errors import UserError
from qatlab.data.corruptions import TABLES, Corrupt, corrupt
from qatlab.data.embedded.sets import EmbeddedSet
from qatlab.data.preprocess import BadImage, Preprocess

DOCS = Path(__file__).parents[2] / "docs/CORRUPTIONS.md"
NAMES = list(TABLES["imagenet_c"])
PREPROCESS = Preprocess(32, (0.5,) * 3, (0.5,) * 3)
# Their constants trade strength against something else from one severity to the next (mud for water, a rougher cloud,
# less reach for more passes, no affine map, more colour for less), and snow and frost can whiten only what is dark.
UNEVEN = {"glass_blur", "snow", "frost", "fog", "elastic_transform", "spatter", "saturate"}


def drawn(number, side=64):
    images = EmbeddedSet("id", number).__getitems__(list(range(number)))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image, _ in images]
    return [np.array(picture.resize((side, side))) for picture in pictures]


@pytest.fixture(scope="module")
def picture():
    return drawn(1)[0]


def documented():
    """{(corruption, column): five tuples} of the table in the documentation, which was not written from the code."""
    found = {}
    for name, *columns in re.findall(r"^\| `(\w+)`: .*? \| ([\d.,() ]+) \| ([\d.,() ]+) \|$", DOCS.read_text(), re.M):
        for table, text in zip(TABLES, columns, strict=True):
            rows = re.findall(r"\(([^)]*)\)", text) or text.split()
            found[name, table] = tuple(tuple(float(part) for part in row.split(",")) for row in rows)
    return found


def test_constants_are_those_in_the_documentation():
    expected = documented()
    assert set(expected) == {(name, table) for name in NAMES for table in TABLES}
    for (name, table), rows in expected.items():
        assert TABLES[table][name] == rows, (name, table)
    assert len(NAMES) == 19


class Corrupted(Dataset):
    def __init__(self, images, step):
        self.images = images
        self.step = step

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.step.fit(PREPROCESS, torch.from_numpy(self.images[index]).permute(2, 0, 1), f"{index}.png")


def read(images, step, workers=0, order=None):
    loader = DataLoader(Corrupted(images, step), batch_size=3, num_workers=workers, sampler=order)
    return torch.cat(list(loader))


@pytest.mark.parametrize("name", ["glass_blur", "snow"])
def test_an_image_is_the_same_whatever_the_workers_and_the_order(name):
    images, step = drawn(8), Corrupt(name, 3, seed=5)
    alone = read(images, step)
    torch.testing.assert_close(read(images, step, workers=2), alone, rtol=0, atol=0)
    torch.testing.assert_close(read(images, step, order=range(7, -1, -1)).flip(0), alone, rtol=0, atol=0)
    torch.testing.assert_close(read(images, pickle.loads(pickle.dumps(step))), alone, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_generator_decides_everything_and_the_global_state_nothing(name, picture):
    first = corrupt(picture, name, 3, "imagenet_c", np.random.default_rng(1))
    np.random.seed(7)
    torch.manual_seed(7)
    before = picture.copy()
    np.testing.assert_array_equal(corrupt(picture, name, 3, "imagenet_c", np.random.default_rng(1)), first)
    np.testing.assert_array_equal(picture, before)


def test_seed_severity_corruption_and_key_change_the_draws():
    grey = np.full((16, 16, 3), 128, dtype=np.uint8)
    steps = [Corrupt("gaussian_noise", 1), Corrupt("gaussian_noise", 1, seed=1), Corrupt("gaussian_noise", 2)]
    noise = [step(grey, key).astype(float) - 128 for step in steps for key in ("a", "b")]
    # the severities differ in strength; after scaling, equal draws would have a correlation of one
    rest = np.corrcoef([n.ravel() for n in noise]) - np.eye(6)
    assert np.abs(rest).max() < 0.2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("shape", [(224, 224), (64, 64), (32, 32), (45, 70), (70, 45), (8, 300)])
def test_shape_and_dtype_are_kept(name, table, shape, picture):
    image = np.asarray(Image.fromarray(picture).resize(shape[::-1]))
    for severity in (1, 5):
        out = corrupt(image, name, severity, table, np.random.default_rng(0))
        assert (out.shape, out.dtype) == ((*shape, 3), np.uint8)


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("name", NAMES)
def test_black_and_white_stay_in_range(name, value):
    flat = np.full((32, 32, 3), value, dtype=np.uint8)
    for severity in range(1, 6):
        with np.errstate(all="raise"):
            out = corrupt(flat, name, severity, "imagenet_c", np.random.default_rng(0))
        if name in ("defocus_blur", "gaussian_blur", "glass_blur", "motion_blur", "zoom_blur", "pixelate", "contrast"):
            assert np.abs(out.astype(int) - value).max() <= 1


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNEVEN])
@pytest.mark.parametrize("table", TABLES)
def test_each_severity_is_farther_from_the_image(name, table):
    images = drawn(8, 112 if table == "imagenet_c" else 32)
    ratios = []
    for severity in range(1, 6):
        made = [corrupt(image, name, severity, table, np.random.default_rng(i)) for i, image in enumerate(images)]
        errors = [np.mean((x.astype(float) - image) ** 2) for x, image in zip(made, images, strict=True)]
        ratios.append(np.mean(10 * np.log10(255**2 / np.array(errors))))
    assert ratios == sorted(ratios, reverse=True)


def test_the_regimes_differ_in_what_is_corrupted(picture):
    image = torch.from_numpy(picture).permute(2, 0, 1)
    after, before = (Corrupt("contrast", 1, order=o) for o in ("resize_then_corrupt", "corrupt_then_resize"))
    rng = np.random.default_rng(0)
    small = PREPROCESS.fit(image).permute(1, 2, 0).numpy()
    expected = corrupt(np.ascontiguousarray(small), "contrast", 1, "imagenet_c", rng)
    np.testing.assert_array_equal(after.fit(PREPROCESS, image, "a").permute(1, 2, 0), expected)
    large = torch.from_numpy(corrupt(picture, "contrast", 1, "cifar_c", rng)).permute(2, 0, 1)
    torch.testing.assert_close(before.fit(PREPROCESS, image, "a"), PREPROCESS.fit(large))
    assert after.fit(PREPROCESS, image, "a").is_contiguous()


def test_fingerprints_differ_with_what_decides_the_image(tmp_path):
    for number in range(1, 6):
        Image.new("RGB", (40, 40)).save(tmp_path / f"frost{number}.{'png' if number < 4 else 'jpg'}")
    steps = [
        Corrupt("frost", 1),
        Corrupt("frost", 2),
        Corrupt("fog", 1),
        Corrupt("frost", 1, seed=1),
        Corrupt("frost", 1, order="corrupt_then_resize"),
        Corrupt("frost", 1, table="cifar_c"),
        Corrupt("frost", 1, textures=str(tmp_path)),
    ]
    assert len({step.fingerprint() for step in steps}) == len(steps)
    assert Corrupt("fog", 1).fingerprint() == "fog/1/resize_then_corrupt/imagenet_c/0/1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "gausian_noise"}, "did you mean 'gaussian_noise'"),
        ({"severity": 6}, "severity of fog is 6, expected 1, 2, 3, 4 or 5"),
        ({"severity": 0}, "severity of fog is 0"),
        ({"table": "cifar"}, "did you mean 'cifar_c'"),
        ({"order": "corrupt"}, "there are resize_then_corrupt and corrupt_then_resize"),
        ({"name": "frost", "textures": "/nowhere"}, "/nowhere has no frost1.png"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        Corrupt(**{"name": "fog", "severity": 1, **options})


def test_what_cannot_be_corrupted():
    rng = np.random.default_rng(0)
    with pytest.raises(BadImage, match="40 × 7 pixels are too few"):
        corrupt(np.zeros((7, 40, 3), dtype=np.uint8), "fog", 1, "cifar_c", rng)
    for wrong in (np.zeros((32, 32), dtype=np.uint8), np.zeros((32, 32, 3))):
        with pytest.raises(ValueError, match="expected"):
            corrupt(wrong, "fog", 1, "cifar_c", rng)
