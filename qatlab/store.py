"""Image features on disk, by model and images: what an encoder has seen once it never sees again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from qatlab.cache import atomic
from qatlab.errors import UserError

SHARD = 1024  # images whose features are written together: what an interrupted pass loses at most


class FeatureStore:
    """The features of one model on one pool of images, in ``folder``, a file for each SHARD images or fewer.

    A pool is a dataset as it lies on disk with its preprocessing and corruption, whichever of its images a set picks;
    images go by an id, a hash of what each is. Each file holds ``ids`` (n,) int64 and ``features`` (n, D) float32 with a checksum
    over both. Files appear whole or not at all, and any number of processes may add some. ``damaged`` names files that
    were cut short or changed; they are put aside, and their images count as missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[Path] = []
        self._where: dict[int, tuple[Path, int]] = {}
        self._files: dict[Path, Tensor] = {}

    def missing(self, ids: Sequence[int]) -> list[int]:
        """Return those of ``ids`` that have no features yet, each once, in the order given."""
        self._look()
        return [of_image for of_image in dict.fromkeys(ids) if of_image not in self._where]

    def write(self, ids: Sequence[int], features: Tensor) -> None:
        """Add the ``features`` (n, D) of n images; raises UserError when the disk is full."""
        tensors = {
            "ids": torch.tensor(ids, dtype=torch.int64),
            "features": features.detach().float().cpu().contiguous(),
        }
        digest = _digest(tensors["ids"], tensors["features"])
        with atomic(self.folder / f"{digest[:16]}.safetensors") as temporary:
            temporary.write_bytes(save(tensors, {"sha256": digest}))

    def read(self, ids: Sequence[int]) -> Tensor:
        """Return the features (n, D), float32, of the images with the given ``ids``, in that order.

        Raises UserError naming how many are missing: a damaged file, found on reading, makes its images so.
        """
        if missing := self.missing(ids):
            found = f"; {self.damaged[0]} is damaged" if self.damaged else ""
            raise UserError(
                f"{self.folder} lacks the features of {len(missing)} of {len(ids)} images{found}: give the same "
                "command again, and they are computed."
            )
        rows: dict[Path, list[tuple[int, int]]] = {}
        for i, of_image in enumerate(ids):
            file, row = self._where[of_image]
            rows.setdefault(file, []).append((i, row))
        first = self._files[next(iter(rows))]
        result = torch.empty(len(ids), first.shape[1])
        for file, pairs in rows.items():
            into, out_of = np.array(pairs).T
            result[torch.from_numpy(into)] = self._files[file][torch.from_numpy(out_of)]
        return result

    def _look(self) -> None:
        """Take in the files that were added since."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file in self._files or file.name.startswith("."):
                continue
            try:
                with safe_open(file, "pt") as stored:
                    ids, features = stored.get_tensor("ids"), stored.get_tensor("features")
                    whole = (stored.metadata() or {}).get("sha256") == _digest(ids, features)
            except FileNotFoundError:  # another process has put it aside
                continue
            except (SafetensorError, OSError):
                whole = False
            if not whole:
                self.damaged.append(file)
                with suppress(FileNotFoundError):  # another process may find it too
                    file.rename(file.with_suffix(".damaged"))
                continue
            self._files[file] = features
            self._where |= {of_image: (file, row) for row, of_image in enumerate(ids.tolist())}


def fingerprint(model: nn.Module, *parts: str) -> str:
    """Return 16 hex digits of ``model``, its structure and every tensor of its state, and of ``parts``."""
    digest = hashlib.sha256("\n".join([repr(model), *parts]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(ids: Tensor, features: Tensor) -> str:
    digest = hashlib.sha256(ids.numpy().tobytes())
    digest.update(str(tuple(features.shape)).encode())
    digest.update(features.numpy().tobytes())
    return digest.hexdigest()
