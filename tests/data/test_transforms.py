"""Decoding against open_clip's own PIL transform, on real photographs and on the odd formats."""

import io
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip import image_transform
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image

from qatlab.data.transforms import BadImage, Preprocess
from qatlab.errors import UserError

DATA = Path(os.environ.get("QATLAB_TEST_DATA") or Path(__file__).parents[2] / "../shared/data")
PREPROCESS = Preprocess(224, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real images at {DATA} (QATLAB_TEST_DATA)")


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(width, height):
    """A smooth coloured picture with some noise."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width, 3))
    return Image.fromarray((np.stack([x % 200, y % 190, (x + y) % 210], -1) + noise).astype("uint8"))


def levels(data, preprocess=PREPROCESS, **options):
    """Our pixels minus those of open_clip's transform, in uint8 levels, and the error in normalised units."""
    reference = image_transform(preprocess.size, is_train=False, **options)(Image.open(io.BytesIO(data)).convert("RGB"))
    ours = preprocess.decode(data)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    difference = ours - (reference * std + mean) * 255
    return difference.abs(), (preprocess.normalize(ours[None])[0] - reference).abs()


@needs_data
@pytest.mark.parametrize("pattern", ["dtd10/*/*.jpg", "imagenet1k/*/*", "cifar10/test/*/*.png", "tinyimagenet/*/*"])
def test_real_images_within_one_level(pattern):
    files = sorted(DATA.glob(pattern))
    pairs = [levels(file.read_bytes()) for file in files[:: len(files) // 12]]
    difference = torch.stack([pair[0] for pair in pairs])
    assert difference.max() < 2.01
    assert (difference > 1.01).float().mean() < 1e-5  # torch's 16-bit filter weights; see the docstring
    assert torch.stack([pair[1] for pair in pairs]).mean() <= 1e-3


@needs_data
def test_shard_photographs_of_the_right_size_are_untouched():
    import webdataset as wds

    samples = wds.WebDataset(str(DATA / "flickr8k/00000.tar"), shardshuffle=False)
    for _, sample in zip(range(10), samples, strict=False):
        difference, error = levels(sample["jpg"])
        assert difference.max() < 0.01
        assert error.max() < 1e-6


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "I;16", "YCbCr"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_formats_and_colour_modes(mode, kind):
    image = picture(90, 70)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype("uint16") * 3)
    else:
        image = image.convert(mode)
    try:
        data = encoded(image, kind)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"{kind} cannot store {mode}")
    preprocess = Preprocess(48, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    difference, _ = levels(data, preprocess)
    assert difference.max() < 2.01
    assert (difference > 1.01).float().mean() < 1e-3


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(101, 77), (77, 101), (33, 250), (48, 48), (20, 31)])
def test_resize_modes(resize_mode, interpolation, size):
    preprocess = Preprocess(48, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, interpolation, resize_mode)
    difference, _ = levels(
        encoded(picture(*size), "PNG"), preprocess, resize_mode=resize_mode, interpolation=interpolation
    )
    assert difference.max() < 2.01
    assert (difference > 1.01).float().mean() < 1e-3


def test_exif_orientation_is_ignored_as_open_clip_does():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain = encoded(picture(60, 80), exif=exif), encoded(picture(60, 80))
    assert torch.equal(PREPROCESS.decode(turned), PREPROCESS.decode(plain))


def test_normalize_equals_open_clip_bit_for_bit():
    image = picture(224, 224)
    reference = image_transform(224, is_train=False)(image)
    ours = PREPROCESS.normalize(PREPROCESS.decode(encoded(image, "PNG"))[None])
    assert ours.dtype == torch.float32
    assert torch.equal(ours[0], reference)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unknown image format"),
        (b"not an image", "unknown image format"),
        (b"\xff\xd8\xff\xe0 nothing follows", "(?i)truncated"),
        (encoded(picture(100, 100))[:1500], "truncated"),
        (encoded(picture(100, 100), "PNG")[:1500], "truncated"),
        (encoded(picture(20000, 1), "PNG"), "narrow"),
    ],
)
def test_broken_images_name_the_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        PREPROCESS.decode(data)


def test_from_open_clip():
    settings = {
        "size": (32, 32),
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "random",
        "resize_mode": "squash",
    }
    ours = Preprocess.from_open_clip(SimpleNamespace(preprocess_cfg=settings))
    assert ours == Preprocess(32, (0.5,) * 3, (0.25,) * 3, "bicubic", "squash")
    older = SimpleNamespace(image_size=(64, 64), image_mean=None, image_std=None)
    assert Preprocess.from_open_clip(older) == Preprocess(64, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    with pytest.raises(UserError, match="32 × 64"):
        Preprocess.from_open_clip(SimpleNamespace(preprocess_cfg={**settings, "size": (32, 64)}))
    with pytest.raises(UserError, match="'area'"):
        Preprocess(32, (0.5,) * 3, (0.25,) * 3, interpolation="area")
