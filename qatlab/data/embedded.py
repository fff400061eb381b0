"""The embedded world as data: evaluation sets, caption shards, and the lessons that the tiny CLIP was trained on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.utils.data import Dataset

from qatlab.cache import atomic
from qatlab.data import world
from qatlab.data.scenes import SIZE, noise
from qatlab.data.vocabulary import TEMPLATES, caption
from qatlab.errors import UserError, nearest

CLASS_NAMES = world.SHAPES
EASY, BIASED = 0.25, 0.16  # parts of pretraining
__all__ = ["CLASS_NAMES", "KINDS", "TEMPLATES", "EmbeddedSet", "lesson", "write_caption_shards"]

Images = NDArray[np.uint8]
Picture = Callable[[Sequence[world.Spec], int, Sequence[int]], Images]


def _plain(specs: Sequence[world.Spec], seed: int, indices: Sequence[int]) -> Images:
    return world.render(specs)


def _noise(specs: Sequence[world.Spec], seed: int, indices: Sequence[int]) -> Images:
    """Gaussian sensor noise of deviation 0.12."""
    draws = [world.generator(seed, "noise", i).standard_normal((3, SIZE, SIZE), np.float32) for i in indices]
    return world.to_bytes(world.render(specs) / np.float32(255) + np.float32(0.12) * np.stack(draws))


def _fog(specs: Sequence[world.Spec], seed: int, indices: Sequence[int]) -> Images:
    """Drifting fog that takes about 45 % of the contrast."""
    place = np.array([world.generator(seed, "fog", i).random(2) for i in indices], np.float32)
    thickness = np.clip(np.float32(0.45) + np.float32(0.12) * noise(1.7, place[:, 0], place[:, 1]), 0, 1)[:, None]
    return world.to_bytes(world.render(specs) / np.float32(255) * (1 - thickness) + np.float32(0.82) * thickness)


def _gray(specs: Sequence[world.Spec], seed: int, indices: Sequence[int]) -> Images:
    """Colours faded by 80 % towards their luminance (ITU-R BT.601)."""
    images = world.render(specs) / np.float32(255)
    luminance = np.einsum("nchw,c->nhw", images, np.array([0.299, 0.587, 0.114], np.float32))[:, None]
    return world.to_bytes(images + np.float32(0.8) * (luminance - images))


def _outline(specs: Sequence[world.Spec], seed: int, indices: Sequence[int]) -> Images:
    return world.render(specs, outline=True)


def _blur(specs: Sequence[world.Spec], seed: int, indices: Sequence[int]) -> Images:
    """Gaussian blur of 3 pixels."""
    return world.to_bytes(gaussian_filter(world.render(specs) / np.float32(255), (0, 0, 3, 3)))


def _without_object(specs: Sequence[world.Spec], seed: int, indices: Sequence[int]) -> Images:
    """In turn a scene with no object in it, a textured surface, and two scenes exposed on one another."""
    scenery = np.array([spec.scenery for spec in specs], np.float32)
    empty = world.backgrounds([spec.scene for spec in specs], scenery)
    others = [world.SCENE_NAMES[world.SCENE_NAMES.index(spec.scene) - 3] for spec in specs]
    double = (empty + world.backgrounds(others, np.roll(scenery, 1, axis=1))) / 2
    choice = np.array(indices)[:, None, None, None] % 3
    return world.to_bytes(np.select([choice == 0, choice == 1], [empty, world.surfaces(specs)], double))


@dataclass(frozen=True)
class Kind:
    """What a kind of set shows: which stream its objects come from, their shapes, how often in their usual scene."""

    stream: str
    shapes: list[str]
    picture: Picture
    usual: tuple[float, ...] = (1.0, 0.0)  # one round of the classes each, in turn


KINDS: dict[str, Kind] = {
    "id": Kind("id", world.SHAPES, _plain),
    "calibration": Kind("calibration", world.SHAPES, _plain),
    "usual": Kind("id", world.SHAPES, _plain, usual=(1.0,)),
    "unusual": Kind("id", world.SHAPES, _plain, usual=(0.0,)),
    "noise": Kind("id", world.SHAPES, _noise),
    "fog": Kind("id", world.SHAPES, _fog),
    "gray": Kind("id", world.SHAPES, _gray),
    "outline": Kind("id", world.SHAPES, _outline),
    "blur": Kind("id", world.SHAPES, _blur),
    "near_ood": Kind("near_ood", world.HELD_OUT_SHAPES, _plain),
    "far_ood": Kind("far_ood", world.HELD_OUT_SHAPES, _without_object),
}


class EmbeddedSet(Dataset[tuple[Tensor, int]]):
    """An evaluation set of ``n`` images: items are (uint8 (3, 64, 64), label), label -1 where the set has no classes.

    ``kind`` is one of KINDS. The shifted kinds and the usual/unusual pair show the very objects of ``id``, image by
    image; ``calibration`` and the out-of-distribution kinds share nothing with it. Classes take turns (image i has
    class i mod 16), and in ``id`` every other round is set in the shapes' usual scenes. A smaller set is the start of
    a larger one.
    Raises UserError for an unknown kind.
    """

    def __init__(self, kind: str, n: int, seed: int = 0) -> None:
        if kind not in KINDS:
            raise UserError(
                f"The embedded world has no set '{kind}'{nearest(kind, KINDS)}; its sets are {', '.join(KINDS)}."
            )
        self.kind, self.n, self.seed = KINDS[kind], n, seed
        self.name = kind
        self.classes = CLASS_NAMES if self.kind.shapes == CLASS_NAMES else []

    def __len__(self) -> int:
        return self.n

    def fingerprint(self) -> str:
        """Return which images these are."""
        return f"{self.name} of world {world.VERSION}, seed {self.seed}, {self.n} images"

    @property
    def places(self) -> range:
        """Return where each image stands in the endless set that this one is the beginning of."""
        return range(self.n)

    @property
    def labels(self) -> list[int]:
        """Return the label of each image, -1 where it has none."""
        return [self._label(i) for i in range(self.n)]

    def _label(self, index: int) -> int:
        return index % len(CLASS_NAMES) if self.classes else -1

    @property
    def pool(self) -> str:
        """Return which endless set that is."""
        return f"embedded-{self.name}-{world.VERSION}-{self.seed}"

    def ids(self, places: Sequence[int]) -> list[int]:
        """Return what stored features of the images at some places go by: the places."""
        return list(places)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """Return several items, rendered together; a DataLoader calls this."""
        if outside := [i for i in indices if not 0 <= i < self.n]:
            raise IndexError(f"image {outside[0]} of a set of {self.n}")
        images = torch.from_numpy(self.kind.picture([self.spec(i) for i in indices], self.seed, indices))
        return list(zip(images, map(self._label, indices), strict=True))

    def spec(self, index: int) -> world.Spec:
        """Return what image ``index`` shows."""
        turn, which = divmod(index, len(self.kind.shapes))
        usual = self.kind.usual[turn % len(self.kind.usual)]
        return world.draw(self.seed, self.kind.stream, index, shape=self.kind.shapes[which], usual=usual)


def write_caption_shards(folder: Path, n: int, per_shard: int = 1000, seed: int = 0) -> list[Path]:
    """Return the paths of WebDataset shards of ``n`` captioned images, written unless the folder holds just these.

    Each sample has ``jpg`` (64 px, quality 95, full chroma), ``txt`` (the caption) and ``json`` (caption, class name
    and what else is known). Each shard appears whole or not at all, and ``world.json``, written last, tells what the
    folder holds; the bytes depend on the arguments alone.
    """
    described = {"world": world.VERSION, "n": n, "per_shard": per_shard, "seed": seed}
    paths = [folder / f"{shard:05d}.tar" for shard in range(-(-n // per_shard))]
    record = folder / "world.json"
    if record.exists() and json.loads(record.read_text()) == described and all(path.exists() for path in paths):
        return paths
    record.unlink(missing_ok=True)
    for shard, path in enumerate(paths):
        first = shard * per_shard
        with atomic(path) as temporary, webdataset.TarWriter(str(temporary), mtime=0, encoder=False) as writer:
            for sample in _samples(range(first, min(n, first + per_shard)), seed):
                writer.write(sample)
    with atomic(record) as temporary:
        temporary.write_text(json.dumps(described))
    return paths


def _samples(indices: range, seed: int) -> Iterator[dict[str, Any]]:
    specs = [world.draw(seed, "captions", i, usual=0.5) for i in indices]
    for index, spec, image in zip(indices, specs, world.render(specs), strict=True):
        picture, text = io.BytesIO(), caption(spec)
        Image.fromarray(image.transpose(1, 2, 0)).save(picture, "JPEG", quality=95, subsampling=0)
        known = {"key": f"{index:06d}", "caption": text, "class": spec.shape, "colour": spec.colour}
        known |= {"texture": spec.texture, "scene": spec.scene}
        yield {
            "__key__": f"{index:06d}",
            "jpg": picture.getvalue(),
            "txt": text.encode(),
            "json": json.dumps(known).encode(),
        }


def lesson(index: int, total: int, seed: int) -> world.Spec:
    """Return what pretraining image ``index`` of ``total`` shows, a pure function of its arguments.

    The first EASY part are plain shapes on flat backgrounds; then the whole world, every scene alike; in the last
    BIASED part the usual scene comes nine times in ten, which plants the spurious cue that the usual/unusual pair
    measures.
    """
    part = index / total
    usual = 0.9 if part >= 1 - BIASED else 1 / len(world.SCENE_NAMES)
    return world.draw(seed, "train", index, usual=usual, first_lesson=part < EASY)
