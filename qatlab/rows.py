"""What objectives read of a batch: features of the student and of the frozen towers, ids and labels, a row per image."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize

from qatlab.data import Captioned
from qatlab.errors import UserError
from qatlab.frozen import FrozenFeatures
from qatlab.globalbatch import Batch, Rows, rank
from qatlab.memory import saved_bytes
from qatlab.objectives import Objective
from qatlab.phases import phase

if TYPE_CHECKING:
    from qatlab.module import Student


class BatchRows:
    """The rows of a batch, or of a part of one, that the objectives in use need, and only those.

    ``learned`` rows come from what is trained, ``frozen`` ones from what is not: the teacher, the text tower, the data.
    """

    def __init__(self, module: Student, objective: Objective) -> None:
        self.module, self.objective = module, objective
        # Whether the loss compares the images of a batch with each other's captions.
        self.in_batch = "contrastive" in objective or ("kl" in objective and module.bank is None)
        self._teacher_of: FrozenFeatures | None = None  # looped samples, by row
        self._texts_of: FrozenFeatures | None = None

    def learned(self, part: Batch, index: int) -> Rows:
        """Return the features of part ``index`` that training changes, with their graph."""
        module = self.module
        # Dropout, where a tower has it, is drawn anew for every part, and equally when a part is repeated or a run resumed.
        torch.manual_seed(hash((module.config.seed, module.global_step, rank(), index)) % 2**63)
        # On a CPU the fused attention's backward takes half of a small model's step; the plain one is faster there.
        plain = module.both_towers is not None and module.device.type == "cpu"
        with phase("student"), sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            rows = {"student": module.embed(part["images"])}
            if module.both_towers is not None and self.in_batch:
                rows["captions"] = self.texts(part["tokens"])
        return rows

    def frozen(self, part: Batch) -> Rows:
        """Return the rows that training does not change; raises UserError for labels that the data has not."""
        rows = {}
        with torch.no_grad(), phase("teacher"):
            if self.objective.needs_teacher:
                known = self._teacher_of
                rows["teacher"] = self.teacher(part["images"]) if known is None else known[part["rows"]]
            if self.in_batch and self.module.both_towers is None:
                known = self._texts_of
                rows["captions"] = self.texts(part["tokens"]) if known is None else known[part["rows"]]
        if "contrastive" in self.objective:
            rows["caption_ids"] = part["caption_ids"]
        if "class_cross_entropy" in self.objective:
            if "labels" not in part:
                raise UserError(
                    "objective.class_cross_entropy needs labelled training images, which this data= has not; use "
                    "data=embedded_stream or give another objective a weight."
                )
            rows["labels"] = part["labels"]
        return rows

    def remember(self, looped: Captioned | None) -> None:
        """Have the frozen towers see every looped sample once; streamed ones they see as they come."""
        self._teacher_of = self._texts_of = None
        if looped is None or self.module.both_towers is not None:
            return
        device, tokenizer = self.module.device, self.module.clip.tokenizer

        def texts(start: int, stop: int) -> Tensor:
            assert tokenizer is not None
            return self.texts(tokenizer(looped.captions[start:stop]).to(device))

        count = len(looped.captions)
        self._teacher_of = FrozenFeatures(count, lambda start, stop: self.teacher(looped.images[start:stop].to(device)))
        self._texts_of = FrozenFeatures(count, texts)

    def teacher(self, images: Tensor) -> Tensor:
        """Return the unquantized encoder's features (B, D), in float32 or, by fit.teacher_bf16, from bfloat16 products."""
        module = self.module
        with torch.autocast(module.device.type, torch.bfloat16, enabled=module.config.fit.teacher_bf16):
            return module.embed(images, module.clip.visual)

    def texts(self, tokens: Tensor) -> Tensor:
        """Return unit text features (N, D), with gradient only where the text tower is trained too."""
        model: Any = self.module.clip.model
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.module.both_towers is not None):
            return normalize(model.encode_text(tokens).float(), dim=-1)

    def bytes_per_image(self) -> int:
        """Return the bytes that one image, and its caption where that is trained on, keeps for the backward."""
        size, device = self.module.preprocess.size, self.module.device
        model: Any = self.module.clip.model
        part: Batch = {"images": torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)}
        if model is not None:
            part["tokens"] = torch.zeros(1, model.context_length, dtype=torch.long, device=device)
        return saved_bytes(lambda: self.learned(part, 0), self.module.parameters())
