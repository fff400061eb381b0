"""What OOD scores need besides an image's features: texts of no class, fits on calibration images, scores of patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qatlab.clip import Clip
from qatlab.data.heads import Head
from qatlab.data.negatives import GENERIC, Words, load_words, negative_labels, word_features
from qatlab.data.suites import EvaluationSet, Suite
from qatlab.errors import UserError
from qatlab.evaluation import ALWAYS
from qatlab.metrics.features import fit_knn, fit_mahalanobis, fit_vim
from qatlab.metrics.glmcm import patches_of
from qatlab.metrics.ood import inputs_of
from qatlab.zeroshot import text_features

TEXTS = frozenset({"negatives", "generic"})
FITTED = frozenset({"gaussian", "neighbours", "subspace"})
K = 10
"""kNN's neighbour; fewer where a calibration split is smaller."""


@dataclass(frozen=True)
class Needs:
    """The inputs that the ``asked`` scores need and this model and suite can give, by ID reference; ``lacking`` says why not."""

    available: Mapping[str, frozenset[str]]
    lacking: list[str]


def needs(asked: Sequence[str], clip: Clip, suite: Suite, visual: nn.Module | None = None) -> Needs:
    """Return what the scores ``asked`` for can be given; raises UserError where none of them is left.

    ``visual`` is the image tower that has to give them, by default that of ``clip``.
    """
    wanted = inputs_of(asked)
    why: dict[str, str] = {}
    if TEXTS & wanted and clip.model is None:
        why |= dict.fromkeys(TEXTS, "there is no text tower to encode negative texts with")
    if "local" in wanted:
        try:
            patches_of(visual or clip.visual)
        except UserError as error:
            why["local"] = f"the image tower gives no patch features: {str(error).partition(': ')[2].partition('.')[0]}"
    there = ALWAYS | (wanted - why.keys())
    available = {}
    reasons: dict[str, dict[str, list[str]]] = {score: {} for score in asked}  # {score: {why not: references}}
    for reference in sorted({entry.source.reference for entry in suite.sets}):
        unfit = _unfit(suite, reference)
        available[reference] = there - unfit.keys()
        for score in asked:
            if found := [unfit[name] for name in sorted(inputs_of([score])) if name in unfit]:
                reasons[score].setdefault(found[0], []).append(reference)
    lacking = []
    for score in asked:
        if found := [why[name] for name in sorted(inputs_of([score])) if name in why]:
            lacking.append(f"{score} is left out: {found[0]}")
            continue
        lacking += [f"{score} is left out for {', '.join(names)}: {reason}" for reason, names in reasons[score].items()]
    if asked and not any(inputs_of([score]) <= have for score in asked for have in available.values()):
        raise UserError(f"none of the scores can be computed. {'; '.join(lacking)}.")
    return Needs(available, lacking)


def _unfit(suite: Suite, reference: str) -> dict[str, str]:
    """Why inputs that are fitted on an ID reference's calibration images cannot be, {input: reason}."""
    labels = _calibration_labels(suite, reference)
    if not len(labels):
        return dict.fromkeys(FITTED, "no calibration set has that reference")
    unfit, principal = {}, suite.heads[reference].classes.features.shape[1] // 2
    if int(labels.bincount().max()) < 2:
        unfit["gaussian"] = "no class has two images in its calibration set"
    if len(labels) <= principal:
        unfit["subspace"] = (
            f"its calibration set has {len(labels)} images, no more than the principal space's {principal} dimensions"
        )
    return unfit


def _calibration(suite: Suite, reference: str) -> list[EvaluationSet]:
    return [s for s in suite.sets if s.source.role == "calibration" and s.source.reference == reference]


def _calibration_labels(suite: Suite, reference: str) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *(entry.labels for entry in _calibration(suite, reference))])


class ScoreInputs:
    """The inputs of OOD scores for one encoder, each made when it is first asked for.

    ``features(entry)`` gives those of a calibration set; ``cache`` says whether the text tower is one whose texts may be
    kept on disk.
    """

    def __init__(
        self,
        clip: Clip,
        heads: Mapping[str, Head],
        suite: Suite,
        words: str,
        features: Callable[[EvaluationSet], Tensor],
        cache: bool,
    ) -> None:
        self.clip, self.heads, self.suite, self.words = clip, heads, suite, words
        self.features, self.cache = features, cache
        self._made: dict[tuple[str, str], Any] = {}

    def of(self, names: frozenset[str], reference: str, device: torch.device) -> dict[str, Any]:
        """Return {name: input} for the sets of an ID reference."""
        found = {}
        for name in names - ALWAYS - {"local"}:
            if (name, reference) not in self._made:
                self._made[name, reference] = _moved(getattr(self, f"_{name}")(reference), device)
            found[name] = self._made[name, reference]
        return found

    def _negatives(self, reference: str) -> Any:
        words, features = self._words
        return negative_labels(self.clip, self.heads[reference].classes.names, words, features, cache=self.cache)

    @cached_property
    def _words(self) -> tuple[Words, Tensor]:
        words = load_words(self.words)
        return words, word_features(self.clip, words, self.cache)

    def _generic(self, reference: str) -> Tensor:
        texts = GENERIC["embedded" if self.words == "embedded" else "generic"]
        return text_features(self.clip, list(texts), self.cache)

    def _gaussian(self, reference: str) -> Any:
        return self._fitted("mahalanobis", reference, lambda x, labels: fit_mahalanobis(x, labels))

    def _neighbours(self, reference: str) -> Any:
        return self._fitted("knn", reference, lambda x, _: fit_knn(x, min(K, len(x))))

    def _subspace(self, reference: str) -> Any:
        classes = self.heads[reference].classes.features
        return self._fitted("vim", reference, lambda x, _: fit_vim(x, classes))

    def _fitted(self, score: str, reference: str, fit: Callable[[Tensor, Tensor], Any]) -> Any:
        sets = _calibration(self.suite, reference)
        features = torch.cat([self.features(entry) for entry in sets])
        labels = _calibration_labels(self.suite, reference)
        try:
            return fit(features, labels)
        except ValueError as error:
            named = ", ".join(entry.source.name for entry in sets)
            raise UserError(
                f"{score} cannot be fitted on the calibration set {named}: {error}. Leave the score out, or give the set "
                "more images."
            ) from error


def _moved(value: Any, device: torch.device) -> Any:
    """Return a tensor, or a named tuple of tensors, on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(*(part.to(device) if isinstance(part, Tensor) else part for part in value))
