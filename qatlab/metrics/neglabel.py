"""Scores against texts that belong to no ID class: NegLabel, and generic negative prompts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qatlab.metrics.calibration import softmax_peak

LOGIT_SCALE = 100.0
"""The factor of the cosines in NegLabel's code: a constant that depends neither on the model nor on a refit."""

# Images, or candidates, per block: their logits have some megabytes, which stay in a core's cache.
_IMAGES = 128
_CANDIDATES = 1024


class NegLabels(NamedTuple):
    """What ``neglabel`` compares images with: ``inside`` (C, D), the ID classes, ``groups`` (G, g, D), the negatives.

    Unit float32 rows. The classes are encoded with NegLabel's own prompt, so they need not be the zero-shot head's.
    """

    inside: Tensor
    groups: Tensor


def mine(candidates: Tensor, inside: Tensor, fraction: float = 0.15, percentile: float = 0.95) -> Tensor:
    """Return the rows (K,) int64 of the ``candidates`` that are least like the ID classes, the least first.

    A candidate's likeness is the ``percentile``, interpolated, of its cosines to all of ``inside`` (C, D);
    K = ⌊``fraction`` M⌋ of the M candidates (M, D) are kept. Nouns and adjectives are mined apart, one call each. Unit
    rows; computed in float64, ties in the order given. Raises ValueError where no candidate would be left.
    Jiang et al. 2024 (NegLabel), whose code has these defaults.
    """
    kept = int(len(candidates) * fraction)
    if not kept:
        raise ValueError(f"{fraction:g} of {len(candidates)} candidates is none")
    head = inside.double().T
    # float64 is needed, because many candidates are almost equally unlike the classes, and float32 would tie them.
    likeness = [torch.quantile(rows.double() @ head, percentile, dim=1) for rows in candidates.split(_CANDIDATES)]
    # A stable sort gives the same candidates on every device, and keeps ties in the order given.
    return torch.cat(likeness).argsort(stable=True)[:kept]


def grouped(negatives: Tensor, groups: int = 100, seed: int = 0) -> Tensor:
    """Return the ``negatives`` (M, D) in random groups (G, ⌊M/G⌋, D).

    The last M mod G are dropped, then the rest is permuted by ``seed``, as in NegLabel's code. Raises ValueError where
    there are fewer negatives than groups.
    """
    if len(negatives) < groups:
        raise ValueError(f"{len(negatives)} negative labels do not fill {groups} groups")
    kept = len(negatives) - len(negatives) % groups
    # The numbers are drawn on the CPU, because the generator of a GPU draws others from the same seed.
    order = torch.randperm(kept, generator=torch.Generator().manual_seed(seed))
    return negatives[order.to(negatives.device)].unflatten(0, (groups, -1))


def neglabel(features: Tensor, negatives: NegLabels) -> Tensor:
    """Return the softmax mass on the ID classes, mean over the groups of negatives, (N,) float64 in [0, 1].

    ``features`` (N, D) unit float32; each group's softmax runs over all ID classes and that group, at ``LOGIT_SCALE``.
    Products and sums of exponentials are float32; the mass of each group is float64, because near 1 float32 would give
    ties. All images of a set in one call are cut into the same blocks everywhere, so the bits do not depend on the
    number of processes. Jiang et al. 2024 (NegLabel).
    """
    # One matrix product serves all groups, whose sums are separated afterwards.
    inside, outside = negatives.inside.T, negatives.groups.flatten(0, 1).T
    shape = negatives.groups.shape[:2]
    scores = []
    for rows in features.split(_IMAGES):
        # The features are scaled instead of the logits, because (B, D) numbers are fewer than (B, G g).
        logits = rows * LOGIT_SCALE
        own = (logits @ inside).logsumexp(dim=1, keepdim=True)
        others = (logits @ outside).unflatten(1, shape).logsumexp(dim=2)
        # sigmoid(log a − log b) = a / (a + b), with a the sum over
        # the ID classes and b the sum over one group of negatives.
        scores.append((own - others).double().sigmoid_().mean(dim=1))
    return torch.cat(scores)


def generic_negative(cosines: Tensor, features: Tensor, generic: Tensor, logit_scale: float) -> Tensor:
    """Return the softmax mass on the ID classes beside a few prompts of no class, (N,) float64 in [0, 1].

    ``cosines`` (N, C) to the ID classes, ``features`` (N, D) and ``generic`` (K, D) unit rows, ``logit_scale`` s > 0.
    No published code defines this score; its prompts are ``qatlab.evaluation.negatives.GENERIC``.
    """
    # The formula is NegLabel's with all generic prompts as the only group: sigmoid(log a − log b) = a / (a + b).
    own, others = (_log_mass(values, logit_scale) for values in (cosines, features @ generic.T))
    return (own - others).sigmoid()


def _log_mass(cosines: Tensor, logit_scale: float) -> Tensor:
    """Return logsumexp(s c), (N,) float64."""
    peak = softmax_peak(cosines, logit_scale)
    return peak.cosine * logit_scale + peak.mass.log()
