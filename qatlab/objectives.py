"""What training can minimise: functions of student, teacher and text features, mixed by the weights of `objective.*`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax

from qatlab.config import ObjectiveConfig
from qatlab.errors import UserError


@dataclass
class Features:
    """The features of one batch, all unit vectors; None where the objectives in use do not need them.

    ``student``, ``teacher`` (B, D); ``captions`` (B, D) text of each image; ``bank`` (T, D) texts that logits are formed
    with; ``classes`` (C, D) class prompts; ``labels`` (B,); ``caption_ids`` (B,), the same where two captions are;
    ``scale`` () the logit scale.
    """

    student: Tensor
    scale: Tensor
    teacher: Tensor | None = None
    captions: Tensor | None = None
    bank: Tensor | None = None
    classes: Tensor | None = None
    labels: Tensor | None = None
    caption_ids: Tensor | None = None


def contrastive(batch: Features) -> Tensor:
    """Return CLIP's symmetric image-caption cross-entropy, (); equal captions share their target.

    Source: Radford et al. 2021, Figure 3; with all captions distinct it is exactly that.
    """
    assert batch.captions is not None
    assert batch.caption_ids is not None
    logits = batch.scale * batch.student @ batch.captions.T
    target = (batch.caption_ids[:, None] == batch.caption_ids).float()
    target = target / target.sum(1, keepdim=True)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def kl(batch: Features) -> Tensor:
    """Return KL(teacher || student) of the softmax over image-text logits, mean over the batch, (); 0 at student = teacher.

    The texts are ``bank``. Source: Hinton et al. 2015 with the model's own temperature 1 / scale.
    """
    assert batch.teacher is not None
    assert batch.bank is not None
    student = log_softmax(batch.scale * batch.student @ batch.bank.T, dim=1)
    teacher = log_softmax(batch.scale * batch.teacher @ batch.bank.T, dim=1)
    return (teacher.exp() * (teacher - student)).sum(1).mean()


def feature_mse(batch: Features) -> Tensor:
    """Return the squared distance of unit features, summed over dimensions (2 - 2 cos), mean over the batch, ()."""
    assert batch.teacher is not None
    return (batch.student - batch.teacher).square().sum(1).mean()


def class_cross_entropy(batch: Features) -> Tensor:
    """Return the cross-entropy of the class prompts' logits against the labels, mean over the batch, ()."""
    assert batch.classes is not None
    assert batch.labels is not None
    return cross_entropy(batch.scale * batch.student @ batch.classes.T, batch.labels)


OBJECTIVES: dict[str, Callable[[Features], Tensor]] = {
    f.__name__: f for f in (contrastive, kl, feature_mse, class_cross_entropy)
}


class Objective:
    """The weighted sum of objectives; knows what it needs before anything is trained."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.weights = {name: weight for name, weight in asdict(config).items() if weight}
        negative = [name for name, weight in self.weights.items() if weight < 0]
        if negative:
            raise UserError(f"objective.{negative[0]}={self.weights[negative[0]]}: a weight cannot be negative.")
        if not self.weights:
            raise UserError(
                f"no objective: give one of {', '.join(f'objective.{name}' for name in OBJECTIVES)} a weight, "
                "or leave fit.steps out where nothing is to be trained."
            )

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def __str__(self) -> str:
        return " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())

    @property
    def needs_teacher(self) -> bool:
        """Return whether the unquantized encoder has to run."""
        return "kl" in self or "feature_mse" in self

    def __call__(self, batch: Features) -> dict[str, Tensor]:
        """Return every term () by name and their weighted sum as 'loss'."""
        terms = {name: OBJECTIVES[name](batch) for name in self.weights}
        return terms | {"loss": torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()}


def teacher_probabilities(features: Tensor, texts: Tensor, scale: float) -> Tensor:
    """Return the softmax (N, T) of ``scale`` times the cosines of unit ``features`` (N, D) and ``texts`` (T, D)."""
    return softmax(scale * features.double() @ texts.double().T, dim=1)
