"""From an image file's bytes to the pixels an open_clip encoder expects."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from qatlab.errors import UserError

JPEG_START = b"\xff\xd8"
MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
RESIZE_MODES = ("shortest", "longest", "squash")
# What Pillow's decoders raise on damaged files; anything else is a defect of the program and keeps its traceback.
DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


class BadImage(ValueError):  # noqa: N818 - what it says reads better than BadImageError
    """An image that no decoder can read; the text says why."""


@dataclass(frozen=True)
class Preprocess:
    """The evaluation transform of one open_clip model: decode, resize, crop to ``size`` × ``size``, normalise.

    Within one uint8 level of ``open_clip.image_transform(is_train=False)`` (two for about one value in a million: torch
    resizes with 16-bit weights, PIL with 22) on the image converted to RGB, which is what open_clip's and torchvision's
    loaders hand it. Like theirs it ignores the EXIF orientation and drops alpha without a
    background, and PIL clips 16-bit greys at 255. ``mean`` and ``std`` are per channel on the [0, 1] scale;
    ``resize_mode`` is shortest (side to ``size``, then centre crop), longest (then pad with ``fill_color``) or squash.
    Raises UserError on an unknown interpolation or resize mode.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        if self.interpolation not in MODES:
            raise UserError(f"interpolation is '{self.interpolation}', expected one of: {', '.join(MODES)}.")
        if self.resize_mode not in RESIZE_MODES:
            raise UserError(f"resize_mode is '{self.resize_mode}', expected one of: {', '.join(RESIZE_MODES)}.")

    @classmethod
    def from_open_clip(cls, visual: Any) -> Preprocess:
        """Return the transform of an open_clip image tower, from its ``preprocess_cfg`` or its older attributes.

        Raises UserError when the tower takes an image that is not square.
        """
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

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
            # open_clip's "random" draws a filter while training and is bicubic in evaluation
            interpolation="bicubic" if interpolation == "random" else interpolation,
            resize_mode=settings.get("resize_mode") or "shortest",
            fill_color=settings.get("fill_color") or 0,
        )

    def decode(self, data: bytes) -> Tensor:
        """Return the image as (3, size, size) uint8; raises BadImage naming the reason."""
        return self.fit(read_rgb(data)).contiguous()

    def fit(self, image: Tensor) -> Tensor:
        """Return (3, H, W) uint8 resized and cropped to (3, size, size); an image of that size is returned as it is."""
        height, width = image.shape[-2:]
        if (height, width) == (self.size, self.size):
            return image
        target = self._resized(height, width)
        if target[0] * target[1] > 4 * Image.MAX_IMAGE_PIXELS:  # type: ignore[operator]
            raise BadImage(f"{width} × {height} pixels is too narrow a strip to resize")
        image = F.resize(image, target, interpolation=MODES[self.interpolation], antialias=True)
        if self.resize_mode == "longest":
            image = self._padded(image)
        return F.center_crop(image, [self.size, self.size])

    def normalize(self, images: Tensor) -> Tensor:
        """Return (B, 3, S, S) uint8 as float32, (pixel / 255 − mean) / std, on the device of ``images``."""
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)

    def _resized(self, height: int, width: int) -> list[int]:
        """The height and width before the crop, rounded as torchvision (shortest) and open_clip (longest) do."""
        if self.resize_mode == "squash":
            return [self.size, self.size]
        if self.resize_mode == "longest":
            ratio = max(height, width) / self.size
            return [max(1, round(height / ratio)), max(1, round(width / ratio))]
        long = int(self.size * max(height, width) / min(height, width))
        return [self.size, long] if height <= width else [long, self.size]

    def _padded(self, image: Tensor) -> Tensor:
        missing = [max(0, self.size - image.shape[-1]), max(0, self.size - image.shape[-2])]
        sides = [missing[0] // 2, missing[1] // 2, (missing[0] + 1) // 2, (missing[1] + 1) // 2]
        return F.pad(image, sides, fill=self.fill_color)


def read_rgb(data: bytes) -> Tensor:
    """Return the pixels of an image file as (3, H, W) uint8 at full size; raises BadImage naming the reason.

    JPEGs are read by torchvision; what it refuses (CMYK, damaged files) and every other format by PIL, which has the
    last word on what is broken.
    """
    if data.startswith(JPEG_START):
        try:
            # a bytearray, because torch warns about a buffer that it may not write to
            pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.UNCHANGED)
        except RuntimeError:
            return _read_with_pil(data)
        if pixels.shape[0] != 4:
            return pixels.expand(3, -1, -1)
    return _read_with_pil(data)


def _read_with_pil(data: bytes) -> Tensor:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return F.pil_to_tensor(image.convert("RGB"))
    except (*DECODER_ERRORS, Image.DecompressionBombError) as error:
        # Pillow's text names the memory address of the buffer, which would make each reason unique
        reason = "unknown image format" if "cannot identify" in str(error) else str(error)
        raise BadImage(f"{reason or type(error).__name__} ({len(data)} bytes)") from error


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = [float(value) for value in values]
    return first, second, third
