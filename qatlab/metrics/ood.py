"""Scores that tell in-distribution (ID) from out-of-distribution (OOD) images, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from qatlab.metrics.calibration import blocks, softmax_peak
from qatlab.metrics.features import knn, mahalanobis, vim
from qatlab.metrics.glmcm import gl_mcm
from qatlab.metrics.neglabel import generic_negative, neglabel


def msp(cosines: Tensor, logit_scale: float) -> Tensor:
    """Return max_k softmax(s c)_k, (N,) float64 in (0, 1], of ``cosines`` (N, C). Hendrycks & Gimpel 2017."""
    return 1 / softmax_peak(cosines, logit_scale).mass


def energy(cosines: Tensor, logit_scale: float) -> Tensor:
    """Return logsumexp_k(s c_k) / s, (N,) float64 in units of a cosine, of ``cosines`` (N, C).

    The negative free energy at temperature 1/s, Liu et al. 2020, eq. 4; it tends to MaxLogit as s grows.
    """
    peak = softmax_peak(cosines, logit_scale)
    return peak.cosine + peak.mass.log() / logit_scale


def max_logit(cosines: Tensor) -> Tensor:
    """Return max_k c_k, (N,) float64, of ``cosines`` (N, C). Hendrycks et al. 2022."""
    return cosines.amax(dim=1).double()


def entropy(cosines: Tensor, logit_scale: float) -> Tensor:
    """Return minus the entropy of softmax(s c), (N,) float64 in −log C..0 nats, of ``cosines`` (N, C).

    MCM's code compares with it, at a scale of 1 (Ming et al. 2022).
    """
    values = []
    for rows in blocks(cosines):
        gaps = cosines[rows].double()
        top, best = gaps.max(dim=1, keepdim=True)
        gaps = (gaps - top).mul_(logit_scale)
        # Σ over all classes but the top one, whose own term is 1: certain images would tie in log(1 + Σ)
        others = gaps.exp().scatter_(1, best, 0.0)
        mass = others.sum(dim=1)
        values.append((others * gaps).sum(dim=1) / (1 + mass) - mass.log1p())
    return torch.cat(values)


def mcm(cosines: Tensor, temperature: float = 1.0) -> Tensor:
    """Return max_k softmax(c / τ)_k, (N,) float64, of raw ``cosines`` (N, C). Ming et al. 2022, eq. 1.

    τ = 1 is their code's. With 1000 classes the scores of all images then lie within about 1e-3, hence float64.
    """
    return msp(cosines, 1 / temperature)


SCORES: dict[str, Callable[..., Tensor]] = {"msp": msp, "energy": energy, "max_logit": max_logit, "mcm": mcm}
"""The scores of every evaluation: name -> function of (cosines (N, C), ...) giving (N,) float64."""

ALL_SCORES: dict[str, Callable[..., Tensor]] = SCORES | {
    "entropy": entropy,
    "gl_mcm": gl_mcm,
    "neglabel": neglabel,
    "generic_negative": generic_negative,
    "mahalanobis": mahalanobis,
    "knn": knn,
    "vim": vim,
}
"""Every score: name -> function giving (N,) float64, higher = more in-distribution.

A score asks for what it needs by the names of its parameters: ``cosines`` (N, C) to the ID classes; the settings
``logit_scale`` and ``temperature``; ``features`` (N, D), unit rows; ``local`` (N,) of ``glmcm.local_mcm``; ``negatives``, the
``neglabel.NegLabels``; ``generic`` (K, D), encoded prompts of no class; and what was fitted on ID images that are not
scored: ``gaussian``, ``neighbours``, ``subspace`` (``features.fit_*``).
"""


def inputs_of(names: Iterable[str]) -> set[str]:
    """Return what the named ``ALL_SCORES`` need together, by the names above; a parameter with a default is no need."""
    asked = (parameter for name in names for parameter in signature(ALL_SCORES[name]).parameters.values())
    return {parameter.name for parameter in asked if parameter.default is Parameter.empty}


def score_images(
    names: Iterable[str], cosines: Tensor, logit_scale: float, temperature: float, **inputs: Any
) -> dict[str, Tensor]:
    """Return {name: (N,) float64 score} for the named ``ALL_SCORES``, each given those of the inputs that it asks for.

    Raises ValueError when a score needs what is not there.
    """
    given = {"cosines": cosines, "logit_scale": logit_scale, "temperature": temperature, **inputs}
    scored = {}
    for name in names:
        if missing := sorted(inputs_of([name]) - given.keys()):
            raise ValueError(f"the score {name!r} needs {', '.join(missing)}")
        score = ALL_SCORES[name]
        scored[name] = score(**{key: given[key] for key in signature(score).parameters.keys() & given.keys()})
    return scored
