"""The towers of a run: the full-precision model, the models made of it, and the entries of rows that describe them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from qatlab.config import ModelConfig, QuantConfig, deciding, is_quantized
from qatlab.core.hashing import digest
from qatlab.deploy.tower import DeployedTower
from qatlab.models.clip import Clip
from qatlab.models.fingerprint import fingerprint
from qatlab.models.quantized import method
from qatlab.quant import quant_layers
from qatlab.quant.inspect.bits import average_bits
from qatlab.quant.inspect.coverage import SHARES
from qatlab.quant.layers.linear import QuantLayer
from qatlab.results.rowfile import Row
from qatlab.results.stages import FP32, QUANTIZED
from qatlab.towers.registry import final_projections
from qatlab.training.student import Student


@dataclass
class RunTowers:
    """The towers of a run, which its stages replace one after the other.

    ``full`` is the model in full precision, ``student`` the encoder that is quantized and trained, ``class_clip`` the
    model whose text tower encodes the class prompts that the student is scored with. ``asked`` are the options of
    quantization as the user gave them; ``quant`` are the same options with the bits that a plan chose. ``model`` are
    the options of the model with its preprocessing written out. ``exports`` {stage: integer model of the student}.
    ``shares`` (how much of the products is rounded) and ``drift`` (how far class embeddings moved) are entries of rows.
    """

    model: ModelConfig
    full: Clip
    student: Student
    class_clip: Clip
    asked: QuantConfig
    quant: QuantConfig
    from_scratch: bool
    precision: str
    device: str
    shares: dict[str, float] | None = None
    drift: dict[str, float] = field(default_factory=dict)
    exports: dict[str, DeployedTower] = field(default_factory=dict)

    def key(self, visual: nn.Module) -> str:
        """Return the key of an encoder in the feature stores: a hash of its weights, options, precision and device."""
        if visual is self.full.visual:
            return self.full_key
        # The options of quantization are part of the key, because the tensors do not show all of them. quant.partial is
        # not, because it only allows a low coverage and changes no feature.
        return self._key(visual, json.dumps(deciding(replace(self.quant, partial=False))))

    @cached_property
    def full_key(self) -> str:
        """Return the key of the encoder in full precision, which no stage changes."""
        return self._key(self.full.visual)

    def _key(self, visual: nn.Module, *options: str) -> str:
        # Precision and device are part of the key, because they change the last bits of features.
        return fingerprint(visual, repr(self.full.preprocess), self.precision, self.device, *options)

    @cached_property
    def full_id(self) -> str | None:
        """Return eight hex digits that identify the full-precision model on any device; None for a training from scratch."""
        if self.from_scratch:
            return None
        # Precision and device are left out, because a table has one FP32 column per model, wherever it was computed.
        table = self.full.text_table
        texts = "" if table is None else digest(table.features.numpy().tobytes())
        return fingerprint(self.full.visual, json.dumps(self.full.facts), repr(self.full.preprocess), texts)[:8]

    def facts(self, stage: str) -> Row:
        """Return the entries that describe the model in every row of ``stage``."""
        quantized = stage != FP32
        quant = self.asked if quantized else QuantConfig()
        layers = self.layers() if quantized else []
        # The objective belongs to the training, so rows of earlier stages do not have it.
        objective = self.student.objective if stage not in (FP32, QUANTIZED) else None
        return {
            **self.full.facts,
            "fp32_id": self.full_id,
            "method": method(quant) or "fp32",
            "tower": quant.tower if method(quant) else None,
            "weight_bits": average_bits(layers, "weight"),
            "act_bits": average_bits(layers, "act"),
            **(self.shares if self.shares and quantized else dict.fromkeys(SHARES)),
            "final_projection": self._final_projection() if is_quantized(quant, "visual") else None,
            **(self.drift if quantized else {}),
            "objective": str(objective) if objective else None,
        }

    def layers(self) -> list[QuantLayer]:
        """Return the quantized layers that the scored towers really have."""
        found = list(quant_layers(self.student.visual).values())
        text = self.class_clip.model  # differs from the full-precision model only where the text tower is quantized
        if text is not None and text is not self.full.model:
            found += quant_layers(text).values()
        return found

    def _final_projection(self) -> str:
        """Return "quantized" or "full precision" for the student's final projection, as its layers are."""
        layers = quant_layers(self.student.visual)
        rounded = any(name in layers for name in final_projections(self.full.visual))
        return "quantized" if rounded else "full precision"
