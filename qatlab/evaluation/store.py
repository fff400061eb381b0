"""Image features on disk, by model and image, so that no encoder has to see an image twice."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from qatlab.core.errors import UserError
from qatlab.core.files import atomic, cache_root
from qatlab.core.hashing import digest
from qatlab.core.ranks import is_first

# Folders of the cache in which earlier releases kept features and decoded images by name instead of content.
SUPERSEDED = ("features", "decoded")
# Images whose features are written together; an interrupted process loses the features of no more than these.
SHARD = 1024


class FeatureStore:
    """The features of one model on images that are prepared alike, in ``folder``, a file for at most SHARD images.

    An image is known by an id, a hash of its content, whatever dataset it belongs to. Each file holds ``ids`` (n,)
    int64 and ``features`` (n, D) float32 with a checksum over both. Files appear whole or not at all, and any number of
    processes may add files. Of a file without any image that is asked for, only the ids are read. ``damaged`` names
    files that were cut short or changed; these are put aside, and their images count as missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[Path] = []
        self._where: dict[int, tuple[Path, int]] = {}
        self._known: set[Path] = set()
        self._whole: set[Path] = set()  # files whose checksum this process has found right

    def missing(self, ids: Sequence[int]) -> list[int]:
        """Return the ``ids`` that have no features yet, each once, in the order of ``ids``."""
        self._look()
        asked = dict.fromkeys(ids)
        # A damaged file must be found here, before the pass, so that its images are embedded in that pass. Damage that
        # is found later, on reading, ends the run.
        for file in {self._where[of_image][0] for of_image in asked if of_image in self._where} - self._whole:
            self._features(file)
        return [of_image for of_image in asked if of_image not in self._where]

    def write(self, ids: Sequence[int], features: Tensor) -> None:
        """Add the ``features`` (n, D) of n images; raises UserError when the disk is full."""
        tensors = {
            "ids": torch.tensor(ids, dtype=torch.int64),
            "features": features.detach().float().cpu().contiguous(),
        }
        mark = _digest(tensors["ids"], tensors["features"])
        # Files are named by content, so that two jobs that embed the same images write the same file.
        with atomic(self.folder / f"{mark[:16]}.safetensors") as temporary:
            temporary.write_bytes(save(tensors, {"sha256": mark}))

    def read(self, ids: Sequence[int]) -> Tensor:
        """Return the features (n, D), float32, of the images with the given ``ids``, in that order.

        Raises UserError with the number of missing images; a damaged file that is found on reading makes its images
        missing.
        """
        self._look()
        # {file: [(place in the result, row of the file), ...]}, so
        # that each file is read once, whatever the order of ``ids``.
        wanted: dict[Path, list[tuple[int, int]]] = {}
        for i, of_image in enumerate(ids):
            if of_image in self._where:
                file, row = self._where[of_image]
                wanted.setdefault(file, []).append((i, row))
        found: dict[Path, Tensor] = {}
        for file in wanted:
            features = self._features(file)
            if features is not None:
                found[file] = features
        # Missing images are looked for after the files were read,
        # because reading a damaged file removes its images from _where.
        if missing := [of_image for of_image in dict.fromkeys(ids) if of_image not in self._where]:
            damaged = f"; {self.damaged[0]} is damaged" if self.damaged else ""
            raise UserError(
                f"{self.folder} lacks the features of {len(missing)} of {len(ids)} images{damaged}: give the same "
                "command again, and they are computed."
            )
        result = torch.empty(len(ids), next(iter(found.values())).shape[1])
        for file, pairs in wanted.items():
            into, out_of = np.array(pairs).T
            result[torch.from_numpy(into)] = found[file][torch.from_numpy(out_of)]
        return result

    def _look(self) -> None:
        """Take in the ids of files that were added since the last call."""
        for file in sorted(self.folder.glob("*.safetensors")):
            # A name that begins with a dot is a file that another process is still writing.
            if file in self._known or file.name.startswith("."):
                continue
            try:
                with safe_open(file, "pt") as stored:
                    ids = stored.get_tensor("ids").tolist()
            except FileNotFoundError:  # another process has put the damaged file aside
                continue
            except (SafetensorError, OSError):
                self._put_aside(file)
                continue
            self._known.add(file)
            self._where |= {of_image: (file, row) for row, of_image in enumerate(ids)}

    def _features(self, file: Path) -> Tensor | None:
        """Return the features in a file, or None where the file is damaged or was put aside."""
        try:
            with safe_open(file, "pt") as stored:
                ids, features = stored.get_tensor("ids"), stored.get_tensor("features")
                whole = (stored.metadata() or {}).get("sha256") == _digest(ids, features)
        except FileNotFoundError:  # another process has put the damaged file aside
            self._forget(file)
            return None
        except (SafetensorError, OSError):
            whole = False
        if not whole:
            self._put_aside(file)
            return None
        self._whole.add(file)
        found: Tensor = features
        return found

    def _put_aside(self, file: Path) -> None:
        self.damaged.append(file)
        self._forget(file)
        with suppress(FileNotFoundError):  # another process may have found the damage first
            file.rename(file.with_suffix(".damaged"))

    def _forget(self, file: Path) -> None:
        self._known.discard(file)
        self._where = {of_image: where for of_image, where in self._where.items() if where[0] != file}


@lru_cache(1)
def tell_superseded() -> None:
    """Print, once in a process, how many bytes that earlier releases kept of images are no longer read."""
    if not is_first():
        return
    size, old = 0, [cache_root() / name for name in SUPERSEDED]
    old = [folder for folder in old if folder.is_dir()]
    for folder in old:
        # st_blocks counts blocks of 512 bytes: files of decoded images have holes, which take no room on the disk.
        size += sum(512 * file.stat().st_blocks for file in folder.rglob("*") if file.is_file())
    if old:
        named = " and ".join(map(str, old))
        print(
            f"images are known by content now: {size} bytes of an earlier release in {named} may be deleted", flush=True
        )


def _digest(ids: Tensor, features: Tensor) -> str:
    # The shape is hashed too, because the same bytes are other features when the rows have another width.
    return digest(ids.numpy().tobytes(), str(tuple(features.shape)), features.numpy().tobytes())
