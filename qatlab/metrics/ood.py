"""Scores that separate in-distribution (ID) from out-of-distribution (OOD) images, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from importlib import import_module
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

    MCM's code has this score for comparison, at a scale of 1 (Ming et al. 2022).
    """
    values = []
    for rows in blocks(cosines):
        gaps = cosines[rows].double()
        # The top cosine is subtracted, so that no exponent is above 0 and no scale overflows.
        top, best = gaps.max(dim=1, keepdim=True)
        gaps = (gaps - top).mul_(logit_scale)
        # The sum leaves out the top class, whose term is exactly 1. For very certain images the sum is tiny: 1 + sum
        # would round to 1 and tie such images, but log1p keeps them apart.
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

The parameters have the same names everywhere: ``cosines`` (N, C) to the ID classes; the settings ``logit_scale`` and
``temperature``; ``features`` (N, D), unit rows; ``local`` (N,) of ``glmcm.local_mcm``; ``negatives``, the
``neglabel.NegLabels``; ``generic`` (K, D), encoded prompts of no class; and what was fitted on ID images that are not
scored: ``gaussian``, ``neighbours``, ``subspace`` (``features.fit_*``).
"""

NEEDS: dict[str, tuple[str, ...]] = {
    "msp": ("cosines", "logit_scale"),
    "energy": ("cosines", "logit_scale"),
    "max_logit": ("cosines",),
    "mcm": ("cosines",),
    "entropy": ("cosines", "logit_scale"),
    "gl_mcm": ("cosines", "local"),
    "neglabel": ("features", "negatives"),
    "generic_negative": ("cosines", "features", "generic", "logit_scale"),
    "mahalanobis": ("features", "gaussian"),
    "knn": ("features", "neighbours"),
    "vim": ("features", "cosines", "logit_scale", "subspace"),
}
"""The inputs without which each of ``ALL_SCORES`` cannot be computed, by the names of its parameters."""

INPUTS = (
    *("cosines", "logit_scale", "temperature", "features", "local", "negatives", "generic"),
    *("gaussian", "neighbours", "subspace"),
)
"""What a score may ask for, by the names of its parameters."""

# Inputs that a score takes where they are given; the score has a default for each of them.
_OPTIONS: dict[str, tuple[str, ...]] = {"mcm": ("temperature",), "gl_mcm": ("temperature", "local_weight")}


class ScoreShapeError(ValueError):
    """A score gave something else than a number for every image."""


def score_function(name: str) -> Callable[..., Tensor]:
    """Return the function of a score: one of ``ALL_SCORES``, or what a dotted name, "my.scores.mine", names, imported.

    Raises ImportError or AttributeError where that names nothing.
    """
    if name in ALL_SCORES:
        return ALL_SCORES[name]
    module, _, function = name.rpartition(".")
    found: Callable[..., Tensor] = getattr(import_module(module), function)
    return found


def needs_of(name: str) -> tuple[str, ...]:
    """Return what a score cannot be computed without: by ``NEEDS``, or those of ``INPUTS`` that its parameters name."""
    if name in NEEDS:
        return NEEDS[name]
    # By its signature, as no table can hold a function of the user.
    return tuple(parameter for parameter in inspect.signature(score_function(name)).parameters if parameter in INPUTS)


def has_temperature(name: str) -> bool:
    """Return whether a score takes MCM's temperature."""
    return "temperature" in (*needs_of(name), *_OPTIONS.get(name, ()))


def inputs_of(names: Iterable[str]) -> set[str]:
    """Return what the named scores need together, by the names of their parameters (``needs_of``)."""
    return {need for name in names for need in needs_of(name)}


def score_images(
    names: Iterable[str], cosines: Tensor, logit_scale: float, temperature: float, **inputs: Any
) -> dict[str, Tensor]:
    """Return {name: (N,) float64 score} for the named scores, each given those of the inputs that it asks for.

    Names are those of ``ALL_SCORES`` and dotted ones (``score_function``). ``cosines`` (N, C) to the ID classes,
    ``logit_scale`` s > 0, ``temperature`` that of MCM and GL-MCM; ``ALL_SCORES`` says what the other ``inputs`` may be.
    Inputs that no named score asks for are ignored. Raises ValueError when a score needs an input that is missing, and
    when one gives no number per image.
    """
    given = {"cosines": cosines, "logit_scale": logit_scale, "temperature": temperature, **inputs}
    scored = {}
    for name in names:
        # Inputs are checked before the call, because Python's error would name a parameter that the user does not know.
        if missing := sorted(inputs_of([name]) - given.keys()):
            raise ValueError(f"the score {name!r} needs {', '.join(missing)}")
        wanted = (*needs_of(name), *_OPTIONS.get(name, ()))
        values = score_function(name)(**{key: given[key] for key in wanted if key in given})
        if values.shape != cosines.shape[:1]:
            raise ScoreShapeError(f"the score {name!r} gives {tuple(values.shape)} for {len(cosines)} images")
        scored[name] = values.double()
    return scored
