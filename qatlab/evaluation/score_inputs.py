"""The inputs of OOD scores besides an image's features: negative texts, fits on calibration images, patch scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qatlab.core.errors import UserError
from qatlab.evaluation.evaluation import ALWAYS
from qatlab.evaluation.negatives import GENERIC, Words, load_words, negative_labels, word_features
from qatlab.metrics.features import fit_knn, fit_mahalanobis, fit_vim
from qatlab.metrics.ood import inputs_of
from qatlab.models.clip import Clip
from qatlab.models.patches import patches_of
from qatlab.models.zeroshot import text_features
from qatlab.suites.heads import Head
from qatlab.suites.suite import EvaluationSet, Suite

# Inputs from the text tower, and inputs that are estimated on the images of calibration sets.
TEXTS = frozenset({"negatives", "generic"})
ESTIMATED = frozenset({"gaussian", "neighbours", "subspace"})
K = 10
"""The neighbour whose distance is kNN's score; with fewer calibration images it is the farthest of them."""


@dataclass(frozen=True)
class Needs:
    """The inputs that scores can be given, by ID reference; ``lacking`` says which scores are left out and why."""

    available: Mapping[str, frozenset[str]]
    lacking: list[str]


def needs(asked: Sequence[str], clip: Clip, suite: Suite, visual: nn.Module | None = None) -> Needs:
    """Return the inputs that model and suite can give to the scores ``asked`` for; UserError where none is possible.

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
            # The error reads "<what is impossible>: <reason>.
            # <remedy>", of which the line below takes the reason alone.
            why["local"] = f"the image tower gives no patch features: {str(error).partition(': ')[2].partition('.')[0]}"
    there = ALWAYS | (wanted - why.keys())
    available = {}
    # {score: {reason: [references]}}, so that references with the same reason share a sentence.
    reasons: dict[str, dict[str, list[str]]] = {score: {} for score in asked}
    for reference in sorted({entry.source.reference for entry in suite.sets}):
        unfit = _unfit(suite, reference)
        available[reference] = there - unfit.keys()
        for score in asked:
            if found := [unfit[name] for name in sorted(inputs_of([score])) if name in unfit]:
                reasons[score].setdefault(found[0], []).append(reference)
    lacking = []
    for score in asked:
        # An input that the model lacks is missing for every reference, so no reference is named.
        if found := [why[name] for name in sorted(inputs_of([score])) if name in why]:
            lacking.append(f"{score} is left out: {found[0]}")
            continue
        lacking += [f"{score} is left out for {', '.join(names)}: {reason}" for reason, names in reasons[score].items()]
    # Without this error a run that was asked for scores would finish without any.
    if asked and not any(inputs_of([score]) <= have for score in asked for have in available.values()):
        raise UserError(f"none of the scores can be computed. {'; '.join(lacking)}.")
    return Needs(available, lacking)


def _unfit(suite: Suite, reference: str) -> dict[str, str]:
    """Return {input: reason} of the inputs that cannot be estimated on the calibration images of an ID reference."""
    labels = _calibration_labels(suite, reference)
    if not len(labels):
        return dict.fromkeys(ESTIMATED, "no calibration set has that reference")
    # fit_vim keeps half of the dimensions and needs more images than that number.
    unfit, principal = {}, suite.heads[reference].classes.features.shape[1] // 2
    # The covariance is estimated from the differences of images to the
    # mean of their class: a class with one image gives no difference.
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

    ``features(entry)`` gives the features (n, D) of a calibration set. ``cache`` says whether text features may be kept
    on disk, which is of no use for a tower that this run alone has quantized or trained.
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
        self._makers: dict[str, Callable[[str], Any]] = {
            "negatives": self._negatives,
            "generic": self._generic,
            "gaussian": self._gaussian,
            "neighbours": self._neighbours,
            "subspace": self._subspace,
        }

    def of(self, names: frozenset[str], reference: str, device: torch.device) -> dict[str, Any]:
        """Return {name: input} for the sets of an ID reference."""
        found = {}
        # Patch scores belong to single images, so the code that feeds the batches adds them.
        for name in names - ALWAYS - {"local"}:
            if (name, reference) not in self._made:
                self._made[name, reference] = _moved(self._makers[name](reference), device)
            found[name] = self._made[name, reference]
        return found

    def _negatives(self, reference: str) -> Any:
        words, features = self._words
        return negative_labels(self.clip, self.heads[reference].classes.names, words, features, cache=self.cache)

    @cached_property
    def _words(self) -> tuple[Words, Tensor]:
        # The words are encoded once, because there may be 70,000 words and all ID references share them.
        words = load_words(self.words)
        return words, word_features(self.clip, words, self.cache)

    def _generic(self, reference: str) -> Tensor:
        texts = GENERIC["embedded" if self.words == "embedded" else "generic"]
        return text_features(self.clip, list(texts), self.cache)

    def _gaussian(self, reference: str) -> Any:
        return self._estimated("mahalanobis", reference, lambda x, labels: fit_mahalanobis(x, labels))

    def _neighbours(self, reference: str) -> Any:
        return self._estimated("knn", reference, lambda x, _: fit_knn(x, min(K, len(x))))

    def _subspace(self, reference: str) -> Any:
        classes = self.heads[reference].classes.features
        return self._estimated("vim", reference, lambda x, _: fit_vim(x, classes))

    def _estimated(self, score: str, reference: str, fit: Callable[[Tensor, Tensor], Any]) -> Any:
        """Return the input of ``score`` that ``fit`` makes of the features and labels of calibration images."""
        sets = _calibration(self.suite, reference)
        features = torch.cat([self.features(entry) for entry in sets])
        labels = _calibration_labels(self.suite, reference)
        try:
            return fit(features, labels)
        except ValueError as error:
            # qatlab.metrics knows arrays alone, so the name of the set and the remedy are added here.
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
