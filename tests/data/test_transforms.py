"""Decoding against open_clip's own PIL transform, on real photographs and on the odd formats."""

import io
import os
import random
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from open_clip import image_transform
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image

from qatlab.core.errors import UserError
from qatlab.core.limits import use_limits
from qatlab.data import preprocess as transforms
from qatlab.data.preprocess import BadImage, Preprocess, jpeg_size, read_file, read_rgb

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


SQUASH = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}
# Before release 13 Pillow resized the rows of every image first.
orders = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow resizes the rows of all images first"
)


@needs_data
@orders
@pytest.mark.parametrize("pattern", ["dtd10/*/*.jpg", "imagenet1k/*/*", "sun8/*/*", "tinyimagenet/*/*"])
@pytest.mark.parametrize("size", [224, 378])
def test_models_d10_real_images_are_squashed_within_two_levels(pattern, size):
    """As SigLIP (224), and DFN5B and worldwide-378 do it; orders of the two passes differ by up to 9 levels."""
    files, preprocess = sorted(DATA.glob(pattern)), Preprocess(size, SQUASH["mean"], SQUASH["std"], "bicubic", "squash")
    tall = [file for file in files[:: len(files) // 25] if np.less(*Image.open(file).size)]
    chosen = [*tall[:4], *files[:: len(files) // 6]]
    difference = torch.stack([levels(file.read_bytes(), preprocess, **SQUASH)[0] for file in chosen])
    assert difference.max() < 2.01
    assert (difference > 1.01).float().mean() < 2e-5


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_models_d10_the_order_of_the_passes_is_that_of_pillow_13(interpolation):
    """Black and white noise, in two calls of Pillow, whose order no release decides."""
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    preprocess = Preprocess(48, (0.5,) * 3, (0.5,) * 3, interpolation, "squash")
    made = np.random.default_rng(0)
    for width, height in [(60, 72), (60, 73), (48, 49), (20, 49), (20, 47), (90, 70), (70, 140), (30, 30)]:
        pixels = (255 * made.integers(0, 2, (height, width, 3))).astype("uint8")
        columns_first = height > 48 and height - 48 > 2 * (width - 48)
        half = (width, 48) if columns_first else (48, height)
        expected = Image.fromarray(pixels).resize(half, filters[interpolation]).resize((48, 48), filters[interpolation])
        ours = preprocess.fit(torch.from_numpy(pixels).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        assert np.abs(ours.astype(int) - np.asarray(expected)).max() <= 2


def test_models_d10_features_of_squashed_images_are_computed_anew():
    squashed = Preprocess(48, (0.5,) * 3, (0.5,) * 3, resize_mode="squash")
    assert repr(squashed).endswith("resize_mode='squash', fill_color=0, order='as Pillow 13')")
    assert repr(Preprocess(4, (0.0,) * 3, (1.0,) * 3)) == (
        "Preprocess(size=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation='bicubic', resize_mode='shortest', "
        "fill_color=0)"
    )


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


def claiming(width, height, kind="JPEG"):
    """A small file whose header claims another size."""
    data = bytearray(encoded(picture(16, 16), kind))
    if kind == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    else:
        data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("side", [20_000, 65_500])
def test_faults_s6_no_decoder_begins_on_an_image_above_the_limit(monkeypatch, kind, side):
    asked = []
    monkeypatch.setattr(transforms, "decode_jpeg", lambda *args, **options: asked.append(args))
    monkeypatch.setattr(Image.Image, "convert", lambda *args: asked.append(args))
    reason = f"{side} × {side} pixels are above limits.pixels=89478485|exceeds limit of 178956970 pixels"
    with pytest.raises(BadImage, match=reason):
        read_rgb(claiming(side, side, kind))
    assert asked == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "GIF", "TIFF", "BMP", "PPM"])
def test_faults_s6_the_limit_is_an_option_and_the_same_for_every_decoder(monkeypatch, kind):
    monkeypatch.setenv("QATLAB_LIMITS", "{}")
    data = encoded(picture(40, 30), kind)
    use_limits(pixels=1200, member_bytes=2**20, names=10)
    assert read_rgb(data).shape == (3, 30, 40)
    use_limits(pixels=1199, member_bytes=2**20, names=10)
    with pytest.raises(BadImage, match=r"40 × 30 pixels are above limits\.pixels=1199"):
        read_rgb(data)


def test_faults_s6_a_limit_above_pillows_own_is_one(monkeypatch):
    monkeypatch.setenv("QATLAB_LIMITS", "{}")
    data = claiming(20_000, 20_000, "PNG")
    use_limits(pixels=10**9, member_bytes=2**20, names=10)
    with pytest.raises(BadImage, match=r"truncated|broken|not enough"):  # it is looked at, and holds too little
        read_rgb(data)


def test_faults_s6_nor_is_an_image_enlarged_above_it(monkeypatch):
    monkeypatch.setenv("QATLAB_LIMITS", "{}")
    use_limits(pixels=10_000, member_bytes=2**20, names=10)
    assert Preprocess(48, (0.5,) * 3, (0.5,) * 3).fit(torch.zeros(3, 1, 4, dtype=torch.uint8)).shape == (3, 48, 48)
    with pytest.raises(BadImage, match="5 × 1 pixels is too narrow a strip to resize"):
        Preprocess(48, (0.5,) * 3, (0.5,) * 3).fit(torch.zeros(3, 1, 5, dtype=torch.uint8))


@needs_data
def test_faults_s6_the_size_is_read_off_a_jpeg_as_pillow_reads_it():
    files = sorted(DATA.glob("imagenet1k/*/*"))[::20]
    sized = [(file.read_bytes(), Image.open(file)) for file in files]
    assert len(sized) > 40
    assert [jpeg_size(data) for data, image in sized if image.format == "JPEG"] == [
        image.size for _, image in sized if image.format == "JPEG"
    ]


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"icc_profile": b"\xff\xc0" * 50_000}, {"comment": b"\xff\xc0\x00"}]
)
def test_faults_s6_also_behind_profiles_and_comments_that_hold_markers(options):
    data = encoded(picture(50, 20), **options)
    assert jpeg_size(data) == (50, 20)
    assert jpeg_size(data[:2] + b"junk\xff\xff" + data[3:]) == (50, 20)  # libjpeg skips what stands between segments
    assert jpeg_size(data[:10]) == (0, 0)
    for cut in range(0, 700, 7):
        assert jpeg_size(data[:cut]) in ((0, 0), (50, 20))


@pytest.mark.parametrize("kind", ["AVIF", "WEBP", "TIFF", "GIF", "PNG", "JPEG", "JPEG2000"])
def test_data_t3_whatever_a_decoder_raises_on_a_damaged_file_is_the_images_fault(kind):
    data = encoded(picture(32, 32), kind)
    draw = random.Random(0)
    places = range(len(data)) if kind == "AVIF" else sorted(draw.sample(range(len(data)), min(300, len(data))))
    refused = 0
    for place in list(places)[:300]:
        broken = bytearray(data)
        broken[place] = 0 if broken[place] else 255
        try:
            read_rgb(bytes(broken))
        except BadImage:
            refused += 1
    assert refused > 0


def test_data_t3_a_lack_of_memory_and_a_defect_of_the_program_keep_their_traceback(monkeypatch):
    data = encoded(picture(32, 32), "PNG")

    def failing(error):
        def fail(*args, **options):
            raise error

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "convert", failing(MemoryError()))
        with pytest.raises(MemoryError):
            read_rgb(data)
    with monkeypatch.context() as patch:
        patch.setattr(transforms.F, "pil_to_tensor", failing(RuntimeError("a defect")))
        with pytest.raises(RuntimeError, match="a defect"):
            read_rgb(data)


def test_data_t3_an_image_starts_no_other_program(monkeypatch):
    """Pillow hands PostScript to Ghostscript, by the content, whatever the file is called."""
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *args, **options: started.append(args))
    monkeypatch.setattr("subprocess.check_call", lambda *args, **options: started.append(args))
    with pytest.raises(BadImage, match="unknown image format"):
        read_rgb(encoded(picture(16, 16), "EPS"))
    assert started == []


def test_faults_s8_what_is_no_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("QATLAB_LIMITS", "{}")
    use_limits(pixels=1, member_bytes=9, names=1)
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(BadImage, match="no regular file"):
            read_file(path)
    (tmp_path / "a.png").write_bytes(b"123456789")
    assert read_file(tmp_path / "a.png") == b"123456789"
    (tmp_path / "a.png").write_bytes(b"1234567890")
    with pytest.raises(BadImage, match=r"10 bytes are above limits\.member_bytes=9"):
        read_file(tmp_path / "a.png")
