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

from qatlab.core.checksums import read_json, write_json
from qatlab.core.damage import whole
from qatlab.core.errors import UserError, nearest
from qatlab.core.files import atomic
from qatlab.core.hashing import file_digest
from qatlab.data.embedded import world
from qatlab.data.embedded.scenes import SIZE, noise
from qatlab.data.embedded.vocabulary import TEMPLATES, caption

CLASS_NAMES = world.SHAPES
HASHES = "sha256"
# Shares of pretraining: the first quarter shows easy images, the last 16 % teach the spurious cue (see ``lesson``).
EASY, BIASED = 0.25, 0.16
__all__ = ["CLASS_NAMES", "KINDS", "TEMPLATES", "EmbeddedSet", "lesson", "write_caption_shards"]

Images = NDArray[np.uint8]
Picture = Callable[[Sequence[world.Spec], int, Sequence[int]], Images]


# A picture function also takes a seed and the indices of the images, for random numbers of its own, and returns images
# (N, 3, 64, 64) uint8.
def _plain(specs: Sequence[world.Spec], seed: int, indices: Sequence[int]) -> Images:
    return world.render(specs)


def _noise(specs: Sequence[world.Spec], seed: int, indices: Sequence[int]) -> Images:
    """Return the world under Gaussian sensor noise of deviation 0.12."""
    # Each index has random numbers of its own, so that image i has the same noise in a set of any size and in any
    # batch.
    draws = [world.generator(seed, "noise", i).standard_normal((3, SIZE, SIZE), np.float32) for i in indices]
    return world.to_bytes(world.render(specs) / np.float32(255) + np.float32(0.12) * np.stack(draws))


def _fog(specs: Sequence[world.Spec], seed: int, indices: Sequence[int]) -> Images:
    """Return the world under drifting fog that takes about 45 % of the contrast."""
    place = np.array([world.generator(seed, "fog", i).random(2) for i in indices], np.float32)
    thickness = np.clip(np.float32(0.45) + np.float32(0.12) * noise(1.7, place[:, 0], place[:, 1]), 0, 1)[:, None]
    return world.to_bytes(world.render(specs) / np.float32(255) * (1 - thickness) + np.float32(0.82) * thickness)


def _gray(specs: Sequence[world.Spec], seed: int, indices: Sequence[int]) -> Images:
    """Return the world with colours faded by 80 % towards their luminance (ITU-R BT.601)."""
    images = world.render(specs) / np.float32(255)
    luminance = np.einsum("nchw,c->nhw", images, np.array([0.299, 0.587, 0.114], np.float32))[:, None]
    return world.to_bytes(images + np.float32(0.8) * (luminance - images))


def _outline(specs: Sequence[world.Spec], seed: int, indices: Sequence[int]) -> Images:
    return world.render(specs, outline=True)


def _blur(specs: Sequence[world.Spec], seed: int, indices: Sequence[int]) -> Images:
    """Return the world under a Gaussian blur of 3 pixels."""
    return world.to_bytes(gaussian_filter(world.render(specs) / np.float32(255), (0, 0, 3, 3)))


def _without_object(specs: Sequence[world.Spec], seed: int, indices: Sequence[int]) -> Images:
    """Return in turn a scene without an object, a textured surface, and two scenes as in a double exposure."""
    scenery = np.array([spec.scenery for spec in specs], np.float32)
    empty = world.backgrounds([spec.scene for spec in specs], scenery)
    # The scene three places earlier in the list is always another scene than the image's own.
    others = [world.SCENE_NAMES[world.SCENE_NAMES.index(spec.scene) - 3] for spec in specs]
    double = (empty + world.backgrounds(others, np.roll(scenery, 1, axis=1))) / 2
    # The kind of picture depends on the index alone, so that it is the same in every batch.
    choice = np.array(indices)[:, None, None, None] % 3
    return world.to_bytes(np.select([choice == 0, choice == 1], [empty, world.surfaces(specs)], double))


@dataclass(frozen=True)
class Kind:
    """The content of a kind of set: the random stream of its objects, their shapes, and how they are drawn."""

    stream: str
    shapes: list[str]
    picture: Picture
    # The probability that an object is in the usual scene of its shape; the values take turns from round to round of
    # the classes.
    usual: tuple[float, ...] = (1.0, 0.0)


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

    ``kind`` is one of KINDS. The shifted kinds and the usual/unusual pair show the same objects as ``id``, image by
    image; ``calibration`` and the out-of-distribution kinds show other objects. Classes take turns (image i has class
    i mod 16), and in ``id`` every other round of classes shows the shapes in their usual scenes. A smaller set is the
    start of a larger one. ``rows`` are the labels of the classes where they are not 0 to 15.
    Raises UserError for an unknown kind.
    """

    def __init__(self, kind: str, n: int, seed: int = 0, rows: Sequence[int] = range(len(CLASS_NAMES))) -> None:
        if kind not in KINDS:
            raise UserError(
                f"The embedded world has no set '{kind}'{nearest(kind, KINDS)}; its sets are {', '.join(KINDS)}."
            )
        self.kind, self.n, self.seed = KINDS[kind], n, seed
        self.name, self.rows = kind, rows
        # Held-out shapes belong to no class: their sets have no labels.
        self.classes = CLASS_NAMES if self.kind.shapes == CLASS_NAMES else []

    def __len__(self) -> int:
        return self.n

    def fingerprint(self) -> str:
        """Return a text that identifies the images: kind, version of the world, seed and number."""
        return f"{self.name} of world {world.VERSION}, seed {self.seed}, {self.n} images"

    @property
    def places(self) -> range:
        """Return the place of each image in the endless set of which this set is the beginning."""
        return range(self.n)

    @property
    def labels(self) -> list[int]:
        """Return the label of each image, -1 where it has none."""
        return [self._label(i) for i in range(self.n)]

    def _label(self, index: int) -> int:
        return self.rows[index % len(CLASS_NAMES)] if self.classes else -1

    @property
    def pool(self) -> str:
        """Return the name of the endless set of which this set is the beginning; features are stored under this name."""
        return f"embedded-{self.name}-{world.VERSION}-{self.seed}"

    def ids(self, places: Sequence[int]) -> list[int]:
        """Return ids of the images at ``places`` for stored features: the places, because an index decides an image."""
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
        """Return the Spec of image ``index``."""
        turn, which = divmod(index, len(self.kind.shapes))
        usual = self.kind.usual[turn % len(self.kind.usual)]
        return world.draw(self.seed, self.kind.stream, index, shape=self.kind.shapes[which], usual=usual)


def write_caption_shards(folder: Path, n: int, per_shard: int = 1000, seed: int = 0) -> list[Path]:
    """Return the paths of WebDataset shards of ``n`` captioned images, written unless the folder already holds them.

    Each sample has ``jpg`` (64 px, quality 95, full chroma), ``txt`` (the caption) and ``json`` (caption, class,
    colour, texture and scene). Each shard is written whole or not at all. ``world.json``, written last, has the
    arguments and the hash of each shard; a shard that was changed since is set aside and written again. The bytes
    depend only on the arguments.
    """
    described = {"world": world.VERSION, "n": n, "per_shard": per_shard, "seed": seed}
    paths = [folder / f"{shard:05d}.tar" for shard in range(-(-n // per_shard))]
    record = folder / "world.json"
    known = whole(record, read_json) or {}
    # The record of an earlier release has no hashes: its shards are accepted without a check.
    hashes = known.pop(HASHES, {})
    if known != described:
        # The record is removed first. An interruption here then leaves shards without a record, which are written
        # again.
        record.unlink(missing_ok=True)
        for path in paths:
            path.unlink(missing_ok=True)

    def unchanged(path: Path) -> str:
        # A shard without a hash in the record is compared with itself, and so accepted.
        if (found := file_digest(path)) != hashes.get(path.name, found):
            raise ValueError("its checksum is wrong")
        return found

    found = {path.name: whole(path, unchanged) for path in paths}
    for shard, path in enumerate(paths):
        if found[path.name] is None:
            first = shard * per_shard
            _write_shard(path, range(first, min(n, first + per_shard)), seed)
            found[path.name] = file_digest(path)
    # The record is written last, so that it never lists a shard that does not exist.
    if found != hashes:
        with atomic(record) as temporary:
            write_json(temporary, {**described, HASHES: found})
    return paths


def _write_shard(path: Path, indices: range, seed: int) -> None:
    # mtime=0, because with the time of writing in it a tar would have other bytes each time.
    with atomic(path) as temporary, webdataset.TarWriter(str(temporary), mtime=0, encoder=False) as writer:
        for sample in _samples(indices, seed):
            writer.write(sample)


def _samples(indices: range, seed: int) -> Iterator[dict[str, Any]]:
    specs = [world.draw(seed, "captions", i, usual=0.5) for i in indices]
    for index, spec, image in zip(indices, specs, world.render(specs), strict=True):
        picture, text = io.BytesIO(), caption(spec)
        # subsampling=0 keeps the colours at full size: at 64 pixels the usual halving would smear small objects.
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
    """Return the Spec of pretraining image ``index`` of ``total``, a pure function of its arguments.

    The first share EASY shows plain shapes on flat backgrounds. Then come all textures and scenes, with equal
    probabilities. In the last share BIASED a shape is in its usual scene nine times in ten: this teaches the spurious
    cue that the usual/unusual pair measures.
    """
    part = index / total
    # 1/8 gives all eight scenes the same probability, so that a scene says nothing about the shape.
    usual = 0.9 if part >= 1 - BIASED else 1 / len(world.SCENE_NAMES)
    return world.draw(seed, "train", index, usual=usual, first_lesson=part < EASY)
