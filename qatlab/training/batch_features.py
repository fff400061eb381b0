"""The tensors of a batch that objectives read: features of the student and of the frozen towers, ids and labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize

from qatlab.core.errors import UserError
from qatlab.core.ranks import rank
from qatlab.data import Captioned, Preprocess
from qatlab.models.clip import Clip
from qatlab.training.frozen import FrozenFeatures
from qatlab.training.global_batch import Batch, Rows
from qatlab.training.memory import saved_bytes
from qatlab.training.objectives import Objective
from qatlab.training.stopwatch import phase


class TrainingTowers(Protocol):
    """The parts of the trained module that ``BatchFeatures`` needs; ``Student`` has them.

    ``clip`` is the full-precision model, ``both_towers`` the model that learns from scratch or None, ``bank`` a table
    of texts (N, D) or None, ``device`` the device of all, ``global_step`` the number of the step.
    """

    bank: Tensor | None
    both_towers: Any
    preprocess: Preprocess

    @property
    def clip(self) -> Clip: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102
    @property
    def global_step(self) -> int: ...  # noqa: D102
    def embed(self, images: Tensor, visual: nn.Module | None = None) -> Tensor:
        """Return unit features (B, D) float32 of uint8 ``images`` (B, 3, S, S), by the student or by ``visual``."""

    def parameters(self) -> Iterator[nn.Parameter]: ...  # noqa: D102


class BatchFeatures:
    """The tensors of a batch, or of a part of a batch, that the objectives in use need, with a row per image.

    ``learned`` tensors come from trained modules, ``frozen`` ones from the teacher, a frozen text tower or the data.
    """

    def __init__(self, towers: TrainingTowers, objective: Objective, seed: int, teacher_bf16: bool) -> None:
        self.towers, self.objective, self.seed, self.teacher_bf16 = towers, objective, seed, teacher_bf16
        # Without a bank of texts the captions of the batch stand in for it.
        self.reads_captions = bool(objective.needing("captions") or (objective.needing("bank") and towers.bank is None))
        # Whether the loss is computed of all images of the global batch at once: where it compares images with captions of
        # others. What an objective of the user's own compares is not known, so it gets all of them.
        self.in_batch = self.reads_captions or objective.has_own
        # The features of looped samples, by their row in the data; None for streamed samples.
        self._teacher_of: FrozenFeatures | None = None
        self._texts_of: FrozenFeatures | None = None

    def learned(self, part: Batch, index: int) -> Rows:
        """Return the features (B, D) of part ``index`` that training changes, by name, with their graph."""
        towers = self.towers
        # The seed depends on the part, so that dropout is the same when a part is encoded again or a run is resumed.
        torch.manual_seed(hash((self.seed, towers.global_step, rank(), index)) % 2**63)
        # On a CPU the backward of torch's fused attention takes half
        # of a small model's step, and plain products are faster.
        plain = towers.both_towers is not None and towers.device.type == "cpu"
        with phase("student"), sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            rows = {"student": towers.embed(part["images"])}
            if towers.both_towers is not None and self.reads_captions:
                rows["captions"] = self.texts(part["tokens"])
        return rows

    def frozen(self, part: Batch) -> Rows:
        """Return the tensors that training does not change, by name: features (B, D), ids and labels (B,).

        Raises UserError where labels are needed and the data has none.
        """
        rows = {}
        with torch.no_grad(), phase("teacher"):
            if self.objective.needs_teacher:
                known = self._teacher_of
                rows["teacher"] = self.teacher(part["images"]) if known is None else known[part["rows"]]
            if self.reads_captions and self.towers.both_towers is None:
                known = self._texts_of
                rows["captions"] = self.texts(part["tokens"]) if known is None else known[part["rows"]]
        if self.objective.needing("caption_ids"):
            rows["caption_ids"] = part["caption_ids"]
        if (option := self.objective.needing("labels")) is not None:
            if "labels" not in part:
                raise UserError(
                    f"{option} needs labelled training images, which this data= has not; use data=embedded_stream or give "
                    "another objective a weight."
                )
            rows["labels"] = part["labels"]
        return rows

    def remember(self, looped: Captioned | None) -> None:
        """Prepare tables of frozen features for ``looped`` samples; None is given for streamed samples."""
        # A model that learns from scratch has no frozen text tower.
        self._teacher_of = self._texts_of = None
        if looped is None or self.towers.both_towers is not None:
            return
        device = self.towers.device

        def texts(start: int, stop: int) -> Tensor:
            """Return the text features (N, D) of the looped samples from ``start`` to ``stop``."""
            tokenizer = self.towers.clip.tokenizer
            assert tokenizer is not None
            return self.texts(tokenizer(looped.captions[start:stop]).to(device))

        count = len(looped.keys)
        self._teacher_of = FrozenFeatures(count, lambda start, stop: self.teacher(looped.images[start:stop].to(device)))
        self._texts_of = FrozenFeatures(count, texts)

    def teacher(self, images: Tensor) -> Tensor:
        """Return the unquantized encoder's features (B, D) of uint8 ``images`` (B, 3, S, S), float32.

        With fit.teacher_bf16 the products are computed in bfloat16.
        """
        towers = self.towers
        with torch.autocast(towers.device.type, torch.bfloat16, enabled=self.teacher_bf16):
            return towers.embed(images, towers.clip.visual)

    def texts(self, tokens: Tensor) -> Tensor:
        """Return unit text features (N, D) of ``tokens`` (N, context), with a graph if the text tower is trained."""
        model: Any = self.towers.clip.model
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.towers.both_towers is not None):
            return normalize(model.encode_text(tokens).float(), dim=-1)

    def bytes_per_image(self) -> int:
        """Return the bytes that one image, with its caption where captions are trained on, keeps for the backward."""
        size, device = self.towers.preprocess.size, self.towers.device
        model: Any = self.towers.clip.model
        part: Batch = {"images": torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)}
        if model is not None:
            part["tokens"] = torch.zeros(1, model.context_length, dtype=torch.long, device=device)
        return saved_bytes(lambda: self.learned(part, 0), self.towers.parameters())
