"""One corruption as a step of reading images: its name, severity, order with the resize, and seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qatlab.core.errors import UserError, nearest
from qatlab.core.hashing import sha256
from qatlab.data.corruptions.apply import checked, corrupt
from qatlab.data.corruptions.filters import Image
from qatlab.data.corruptions.textures import fingerprint
from qatlab.data.preprocess import Preprocess

# The table of constants for each order: constants count pixels, of a 224 px input or of CIFAR's 32 px files.
ORDERS = {"resize_then_corrupt": "imagenet_c", "corrupt_then_resize": "cifar_c"}
# Raise this number when a seed gives another image than before, because stored features are kept under the number.
VERSION = 1


@dataclass(frozen=True)
class Corrupt:
    """One corruption of ImageNet-C or CIFAR-C at one severity, in one of two regimes.

    ``order`` is resize_then_corrupt (the model's input is corrupted, with the constants of ImageNet-C) or
    corrupt_then_resize (the image of the file is corrupted, with the constants of CIFAR-C); ``table`` asks for the
    other constants. An image depends on the seed, the corruption, its severity and the image's key, and on nothing
    else. ``textures`` is a folder with ImageNet-C's frost. Raises UserError for an unknown name, severity, order or
    table.
    """

    name: str
    severity: int
    seed: int = 0
    order: str = "resize_then_corrupt"
    table: str | None = None
    textures: str | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise UserError(
                f"The order of corruption '{self.order}' is unknown{nearest(self.order, ORDERS)}; there are "
                f"{' and '.join(ORDERS)}."
            )
        checked(self.name, self.severity, self.constants)
        # A missing texture is reported here, before any image is read.
        if self.name == "frost":
            fingerprint(self.textures)

    @property
    def constants(self) -> str:
        """Return the name of the table of constants."""
        return self.table or ORDERS[self.order]

    def __call__(self, image: Image, key: str) -> Image:
        """Return the (H, W, 3) uint8 ``image`` corrupted; ``key`` names it among the images of its set."""
        text = f"{self.seed}/{self.name}/{self.severity}/{key}"
        # The 128 bits of a hash seed a generator for each image alone, so the order of reading does not matter.
        seed = int.from_bytes(sha256([text])[:16], "little")
        rng = np.random.Generator(np.random.PCG64(seed))
        return corrupt(image, self.name, self.severity, self.constants, rng, self.textures)

    def fit(self, preprocess: Preprocess, image: Tensor, key: str) -> Tensor:
        """Return (3, H, W) uint8 as the model takes it, (3, S, S), corrupted before or after the resize."""
        if self.order == "corrupt_then_resize":
            return preprocess.fit(self._tensor(image, key)).contiguous()
        return self._tensor(preprocess.fit(image), key)

    def fingerprint(self) -> str:
        """Return a text of everything besides the clean images that decides the corrupted ones."""
        ice = f"/{fingerprint(self.textures)}" if self.name == "frost" else ""
        return f"{self.name}/{self.severity}/{self.order}/{self.constants}/{self.seed}/{VERSION}{ice}"

    def _tensor(self, image: Tensor, key: str) -> Tensor:
        corrupted = self(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), key)
        return torch.from_numpy(corrupted.transpose(2, 0, 1).copy())
