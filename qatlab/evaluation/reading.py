"""An encoder with all that a pass over a suite needs to score it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qatlab.core.hashing import digest
from qatlab.evaluation.embedding import Encoder, Local
from qatlab.models.clip import Clip
from qatlab.suites.heads import Head
from qatlab.suites.source import View


@dataclass
class Reading:
    """One encoder with its zero-shot heads, the CLIP whose text tower made them, and the views it is read under."""

    encoder: Encoder
    clip: Clip
    heads: Mapping[str, Head]
    ood_heads: Mapping[str, Head]
    views: list[View]

    @property
    def score_heads(self) -> Mapping[str, Head]:
        """Return the heads of the OOD scores by ID reference: those with own prompts, else those of accuracy."""
        return {**self.heads, **self.ood_heads}

    def ask_for_patches(self, reference: str, temperature: float) -> None:
        """Have patch scores against an ID reference computed too, at the ``temperature`` of MCM."""
        classes = self.score_heads[reference].classes.features
        # A patch score depends on the class embeddings and the temperature too, so both are part of the key.
        compared = digest(classes.numpy().tobytes(), str(temperature))[:8]
        self.encoder.local[f"{self.encoder.key}-local-{compared}-{reference}"] = Local(reference, classes, temperature)

    def local_key(self, reference: str) -> str:
        """Return the key under which the patch scores against an ID reference are stored."""
        return next(key for key, local in self.encoder.local.items() if local.reference == reference)
