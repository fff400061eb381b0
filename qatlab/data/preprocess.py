"""Preprocessing: the bytes of an image file become the pixels that an open_clip encoder expects."""

from __future__ import annotations

import io
import os
import stat
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from qatlab.core.errors import UserError
from qatlab.core.limits import limits
from qatlab.core.resizing import INTERPOLATIONS, RESIZE_MODES

JPEG_START = b"\xff\xd8"
# JPEG markers by ITU-T T.81, table B.1: the first set has no length behind the marker, the second starts a frame, whose
# header says the size of the image.
_BARE = {0x01, *range(0xD0, 0xD8)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# Pillow hands EPS files to Ghostscript, a program that runs the code in the file. No image may ask for that.
RUNS_PROGRAMS = {"EPS"}
# limits.pixels refuses an image that is too large with a UserError, so Pillow's warning would say the same twice.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(ValueError):  # noqa: N818 - what it says reads better than BadImageError
    """An image that cannot be used; the text of the error gives the reason."""


@dataclass(frozen=True)
class Preprocess:
    """The evaluation transform of one open_clip model: decode, resize, crop to ``size`` × ``size``, normalise.

    The result is within one uint8 level of ``open_clip.image_transform(is_train=False)`` on the image converted to RGB,
    as the loaders of open_clip and torchvision give it. About one value in a million differs by two levels, because
    torch resizes with 16-bit weights and PIL with 22-bit ones. Like these loaders it ignores the EXIF orientation,
    drops alpha without a background, and clips 16-bit greys at 255. ``mean`` and ``std`` are per channel on the [0, 1]
    scale; ``resize_mode`` is shortest (side to ``size``, then centre crop), longest (then pad with ``fill_color``) or
    squash. Raises UserError on an unknown interpolation or resize mode.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __repr__(self) -> str:
        """Return the options, by which stores of features know what their images went through."""
        # Squashed images had other pixels in earlier releases, and stored features of theirs are not these.
        order = ", order='as Pillow 13'" if self.resize_mode == "squash" else ""
        return f"Preprocess({', '.join(f'{name}={value!r}' for name, value in vars(self).items())}{order})"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(f"interpolation is '{self.interpolation}', expected one of: {', '.join(INTERPOLATIONS)}.")
        if self.resize_mode not in RESIZE_MODES:
            raise UserError(f"resize_mode is '{self.resize_mode}', expected one of: {', '.join(RESIZE_MODES)}.")

    @classmethod
    def from_open_clip(cls, visual: Any) -> Preprocess:
        """Return the transform of an open_clip image tower, from its ``preprocess_cfg`` or its older attributes.

        Raises UserError when the tower takes an image that is not square.
        """
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        # Towers of older open_clip releases have image_mean and image_std, but no preprocess_cfg.
        settings = getattr(visual, "preprocess_cfg", None) or {}
        size = settings.get("size") or visual.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        if height != width:
            raise UserError(f"The model takes images of {height} × {width} pixels; qatlab reads square ones only.")
        interpolation = settings.get("interpolation") or "bicubic"
        return cls(
            size=int(height),
            mean=_three(settings.get("mean") or getattr(visual, "image_mean", None) or OPENAI_DATASET_MEAN),
            std=_three(settings.get("std") or getattr(visual, "image_std", None) or OPENAI_DATASET_STD),
            # In open_clip "random" draws a filter for each training image. Its evaluation transform is bicubic then.
            interpolation="bicubic" if interpolation == "random" else interpolation,
            resize_mode=settings.get("resize_mode") or "shortest",
            fill_color=settings.get("fill_color") or 0,
        )

    def decode(self, data: bytes) -> Tensor:
        """Return the image as (3, size, size) uint8; raises BadImage naming the reason."""
        return self.fit(read_rgb(data)).contiguous()

    def fit(self, image: Tensor) -> Tensor:
        """Return (3, H, W) uint8 resized and cropped to (3, size, size); an image of that size is returned as it is.

        Raises BadImage for a strip that would be too large after the resize.
        """
        height, width = image.shape[-2:]
        # An image of the right size is not resampled: a resize to the same size would still cost its time.
        if (height, width) == (self.size, self.size):
            return image
        target = self._resized(height, width)
        # A strip of 1 × 60 000 pixels is a small file, but resized to a short side of 224 it would fill the memory.
        if target[0] * target[1] > limits().pixels:
            raise BadImage(f"{width} × {height} pixels is too narrow a strip to resize")
        for sides in (*self._on_the_way(height, width), target):
            image = F.resize(image, sides, interpolation=InterpolationMode(self.interpolation), antialias=True)
        if self.resize_mode == "longest":
            image = self._padded(image)
        return F.center_crop(image, [self.size, self.size])

    def normalize(self, images: Tensor) -> Tensor:
        """Return (B, 3, S, S) uint8 as float32, (pixel / 255 − mean) / std, on the device of ``images``."""
        # The constants are made on the device of the images, so that no copy crosses between devices.
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)

    def _resized(self, height: int, width: int) -> list[int]:
        """Return the height and width before the crop, rounded as torchvision (shortest) and open_clip (longest) do."""
        if self.resize_mode == "squash":
            return [self.size, self.size]
        if self.resize_mode == "longest":
            ratio = max(height, width) / self.size
            return [max(1, round(height / ratio)), max(1, round(width / ratio))]
        # torchvision cuts the longer side off to an integer instead of rounding it.
        long = int(self.size * max(height, width) / min(height, width))
        return [self.size, long] if height <= width else [long, self.size]

    def _on_the_way(self, height: int, width: int) -> list[list[int]]:
        """Return the height and width, in a list, that an image has between two passes, where a call for each is needed."""
        # An image is resized in two passes, with rounding and clipping between them, so that their order changes pixels by up
        # to 9 levels. torch resizes the rows first. Pillow 13, and open_clip with it, resizes the columns of an image first
        # that loses far more of its height than of its width.
        if self.resize_mode == "squash" and height > self.size and height - self.size > 2 * (width - self.size):
            return [[self.size, width]]
        return []

    def _padded(self, image: Tensor) -> Tensor:
        missing = [max(0, self.size - image.shape[-1]), max(0, self.size - image.shape[-2])]
        # open_clip puts the odd pixel on the right and at the bottom.
        sides = [missing[0] // 2, missing[1] // 2, (missing[0] + 1) // 2, (missing[1] + 1) // 2]
        return F.pad(image, sides, fill=self.fill_color)


def read_file(path: Path) -> bytes:
    """Return the content of an image file; raises OSError, and BadImage for no regular file or above limits.member_bytes."""
    # Without O_NONBLOCK, opening a named pipe would wait until another process writes into the pipe.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        # The open file is checked and not the path, because the path may name another file a moment later.
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("it is no regular file")
        _refuse_long(status.st_size)
        return file.read()


def read_rgb(data: bytes) -> Tensor:
    """Return the pixels of an image file as (3, H, W) uint8 at full size; raises BadImage naming the reason.

    torchvision reads JPEGs. PIL reads all other formats, and the JPEGs that torchvision refuses (CMYK, damaged files);
    what PIL cannot read is a bad image. An image whose header says more than limits.pixels is not decoded.
    """
    if data.startswith(JPEG_START):
        _refuse_large(*jpeg_size(data))
        try:
            # torch warns about a buffer that it may not write to; a bytearray may be written to.
            pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.UNCHANGED)
        except RuntimeError:
            return _read_with_pil(data)
        # Four channels are CMYK, left to PIL. One channel is grey, which expand repeats without a copy.
        if pixels.shape[0] != 4:
            return pixels.expand(3, -1, -1)
    return _read_with_pil(data)


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) from the first frame header of a JPEG, (0, 0) without one; libjpeg finds the same header."""
    place, end = 2, len(data)
    while True:
        # libjpeg skips bytes that stand before a marker, and repeated 0xFF bytes. A decoder and this function must find the
        # same header, or a file could show a small size here and a huge one there.
        place = data.find(0xFF, place)
        while 0 <= place < end and data[place] == 0xFF:
            place += 1
        if not 0 < place < end - 7:
            return 0, 0
        marker = data[place]
        if marker in _FRAMES:
            # Behind the marker: two bytes of length, one of precision, two of height, two of width.
            height, width = data[place + 4 : place + 6], data[place + 6 : place + 8]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        # 0xFF00 is the byte 0xFF itself, escaped, and no marker.
        if marker and marker not in _BARE:
            place += int.from_bytes(data[place + 1 : place + 3], "big")
        place += 1


def _read_with_pil(data: bytes) -> Tensor:
    # In some formats a frame may be larger than the header says. Pillow refuses such frames above this limit of its
    # own.
    Image.MAX_IMAGE_PIXELS = limits().pixels
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            _refuse_large(*image.size)
            pixels = image.convert("RGB")
    except (BadImage, MemoryError):
        raise
    # A decoder raises errors of any class on a damaged file (RuntimeError in AVIF, KeyError in TIFF). The try block holds
    # nothing but the decoding, so every error in it is the fault of the image.
    except Exception as error:
        # Pillow's text contains a memory address, with which every such image would count as a reason of its own.
        reason = "unknown image format" if "cannot identify" in str(error) else str(error)
        raise BadImage(f"{reason or type(error).__name__} ({len(data)} bytes)") from error
    return F.pil_to_tensor(pixels)


@lru_cache(1)
def _formats() -> list[str]:
    """Return the names of the formats that Pillow reads by itself, the usual ones first."""
    # Without init() Pillow knows five formats, and loads the others at the first file that none of the five reads.
    Image.init()
    usual = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"]
    return [*usual, *(name for name in Image.ID if name in Image.OPEN and name not in {*usual, *RUNS_PROGRAMS})]


def _refuse_large(width: int, height: int) -> None:
    if width * height > (bound := limits().pixels):
        raise BadImage(f"{width} × {height} pixels are above limits.pixels={bound}")


def _refuse_long(size: int) -> None:
    if size > (bound := limits().member_bytes):
        raise BadImage(f"{size} bytes are above limits.member_bytes={bound}")


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = [float(value) for value in values]
    return first, second, third
