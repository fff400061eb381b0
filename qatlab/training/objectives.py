"""The objectives of training: functions of student, teacher and text features, mixed by the weights ``objective.*``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid, softmax

from qatlab.config import ObjectiveConfig, require_objective
from qatlab.config.blocks import WEIGHT, check_block, factory
from qatlab.core.domains import AtLeast, require
from qatlab.core.errors import UserError


@dataclass
class Features:
    """The features of one batch, all unit vectors; None where the objectives in use do not need them.

    ``student`` and ``teacher`` (B, D) are features of the images, ``captions`` (B, D) of each image's text, ``bank``
    (T, D) of the texts that logits are computed with, ``classes`` (C, D) of the class prompts. ``labels`` are (B,).
    ``caption_ids`` (B,) are equal where two captions are equal. ``scale`` () is the logit scale, ``bias`` () the logit
    bias of a model that has one, as SigLIP has.
    """

    student: Tensor
    scale: Tensor
    teacher: Tensor | None = None
    captions: Tensor | None = None
    bank: Tensor | None = None
    classes: Tensor | None = None
    labels: Tensor | None = None
    caption_ids: Tensor | None = None
    bias: Tensor | None = None


INPUTS = tuple(entry.name for entry in fields(Features))
"""What an objective may ask for, by the names of its parameters."""


def contrastive(student: Tensor, captions: Tensor, caption_ids: Tensor, scale: Tensor) -> Tensor:
    """Return CLIP's symmetric image-caption cross-entropy, () (Radford et al. 2021, Figure 3).

    An image's target is divided evenly among the captions that are equal to its own.
    """
    logits = scale * student @ captions.T
    # A caption that occurs twice in a batch is right for both images; the paper's loss would count each as wrong once.
    target = (caption_ids[:, None] == caption_ids).float()
    target = target / target.sum(1, keepdim=True)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def kl(student: Tensor, teacher: Tensor, bank: Tensor, scale: Tensor) -> Tensor:
    """Return KL(teacher || student) of the softmax over image-text logits, mean over the batch, ().

    It is 0 where student and teacher are equal. The texts are ``bank``. Source: Hinton et al. 2015 with the model's own
    temperature 1 / scale.
    """
    log_student = log_softmax(scale * student @ bank.T, dim=1)
    log_teacher = log_softmax(scale * teacher @ bank.T, dim=1)
    # The sum is written out, because kl_div with its default reduction divides by the number of texts too.
    return (log_teacher.exp() * (log_teacher - log_student)).sum(1).mean()


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance of unit features, summed over dimensions (2 - 2 cos), mean over the batch, ()."""
    return (student - teacher).square().sum(1).mean()


def class_cross_entropy(student: Tensor, classes: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Return the cross-entropy of the class prompts' logits against the labels, mean over the batch, ()."""
    return cross_entropy(scale * student @ classes.T, labels)


def sigmoid(student: Tensor, captions: Tensor, caption_ids: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return SigLIP's loss of every image with every caption, summed over captions, mean over images, ().

    A pair belongs together where the caption is equal to the image's own. Source: Zhai et al. 2023, Eq. 1, in which all
    captions differ.
    """
    logits = scale * student @ captions.T + bias
    sign = torch.where(caption_ids[:, None] == caption_ids, 1.0, -1.0)
    return -logsigmoid(sign * logits).sum(1).mean()


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (contrastive, kl, feature_mse, class_cross_entropy, sigmoid)
}
"""The objectives by name, each a function of some of ``INPUTS``."""


@dataclass(frozen=True)
class Term:
    """One term of the sum: what computes it of the inputs that it ``needs``, its weight, and the ``option`` that asks for it."""

    function: Callable[..., Tensor]
    weight: float
    needs: frozenset[str]
    option: str

    @property
    def own(self) -> bool:
        """Return whether this is an objective of the user's own."""
        return self.option.startswith("objective.extra.")

    def __call__(self, batch: Features) -> Tensor:
        """Return the unweighted value, (); raises UserError for an objective of one's own that gives something else."""
        value = self.function(**{name: getattr(batch, name) for name in self.needs})
        if self.own and not (isinstance(value, Tensor) and value.shape == ()):
            got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"{self.option} gives {got}: an objective is one number, such as a mean over the batch.")
        return value


class Objective:
    """The weighted sum of objectives; it also tells which inputs a training step has to compute.

    Raises UserError for no objective at all, and for one of the user's own that does not fit.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        require_objective(config)
        terms = {name: _packaged(name, getattr(config, name)) for name in OBJECTIVES}
        for name, block in config.extra.items():
            if block is not None:  # null leaves one of a recipe out
                terms[name] = _own(name, block)
        self.terms = {name: term for name, term in terms.items() if term.weight}

    def __contains__(self, name: str) -> bool:
        return name in self.terms

    def __str__(self) -> str:
        return " + ".join(f"{term.weight:g} {name}" for name, term in self.terms.items())

    def needing(self, name: str) -> str | None:
        """Return the option of the first objective that needs the input ``name``, one of ``INPUTS``; None where none does."""
        return next((term.option for term in self.terms.values() if name in term.needs), None)

    @property
    def needs_teacher(self) -> bool:
        """Return whether the unquantized encoder, the teacher, has to run."""
        return self.needing("teacher") is not None

    @property
    def has_own(self) -> bool:
        """Return whether an objective of the user's own is in the sum."""
        return any(term.own for term in self.terms.values())

    def __call__(self, batch: Features) -> dict[str, Tensor]:
        """Return every term () by name, unweighted, and their weighted sum as "loss"."""
        values = {name: term(batch) for name, term in self.terms.items()}
        return values | {"loss": torch.stack([self.terms[name].weight * value for name, value in values.items()]).sum()}


def _packaged(name: str, weight: float) -> Term:
    function = OBJECTIVES[name]
    return Term(function, weight, frozenset(inspect.signature(function).parameters), f"objective.{name}")


def _own(name: str, block: Mapping[str, Any]) -> Term:
    """Return the term of a block of ``objective.extra``: the function that it names, with the block's options set."""
    option = f"objective.extra.{name}"
    check_block(option, block)
    if name in (*OBJECTIVES, "loss"):
        raise UserError(f"{option}: {name} is a name of qatlab's own objectives; give yours another one.")
    weight: Any = block.get(WEIGHT)
    require({WEIGHT: weight}, {WEIGHT: Annotated[float, AtLeast(0)]}, f"{option}.")
    function = factory({key: value for key, value in block.items() if key != WEIGHT})
    # By its signature, as no table of qatlab's can hold a function of the user: what it is not given it cannot read.
    needs = frozenset(inspect.signature(function).parameters) & frozenset(INPUTS) - block.keys()
    if "student" not in needs:
        raise UserError(
            f"{option} has no parameter student, so that it can train nothing; an objective takes what it needs of "
            f"{', '.join(INPUTS)}."
        )
    return Term(function, weight, needs, option)


def teacher_probabilities(features: Tensor, texts: Tensor, scale: float) -> Tensor:
    """Return the softmax (N, T) of ``scale`` times the cosines of unit ``features`` (N, D) and ``texts`` (T, D)."""
    return softmax(scale * features.double() @ texts.double().T, dim=1)
