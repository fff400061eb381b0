"""Scores that tell in-distribution (ID) from out-of-distribution (OOD) images, and how well they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import numpy as np
from torch import Tensor

from qatlab.metrics.calibration import softmax_peak


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


def mcm(cosines: Tensor, temperature: float = 1.0) -> Tensor:
    """Return max_k softmax(c / τ)_k, (N,) float64, of raw ``cosines`` (N, C). Ming et al. 2022, eq. 1.

    τ = 1 is their code's. With 1000 classes the scores of all images then lie within about 1e-3, hence float64.
    """
    return msp(cosines, 1 / temperature)


SCORES: dict[str, Callable[..., Tensor]] = {"msp": msp, "energy": energy, "max_logit": max_logit, "mcm": mcm}
"""Name -> function of (cosines (N, C), ...) giving (N,) float64, higher = more in-distribution.

A score asks for what it needs by the names of its further parameters: ``logit_scale``, ``temperature``.
"""


def score_images(names: Iterable[str], cosines: Tensor, logit_scale: float, temperature: float) -> dict[str, Tensor]:
    """Return {name: (N,) float64 score} for the named ``SCORES``, each given those of the settings that it asks for."""
    settings = {"logit_scale": logit_scale, "temperature": temperature}
    scored = {}
    for name in names:
        asked_for = signature(SCORES[name]).parameters.keys() & settings.keys()
        scored[name] = SCORES[name](cosines, **{key: settings[key] for key in asked_for})
    return scored


def auroc(id_scores: Any, ood_scores: Any) -> float:
    """Return P(ID score > OOD score) + ½ P(equal), the area under the ROC curve, exact in float64.

    ``id_scores`` (N,), ``ood_scores`` (M,), arrays or tensors, higher = more in-distribution, on any scale: 0.5 is
    chance and below 0.5 stays below. Mann & Whitney 1947. Raises ValueError on an empty or non-finite input.
    """
    inside, outside = _sorted(id_scores, "ID"), _sorted(ood_scores, "OOD")
    below = np.searchsorted(outside, inside, side="left").sum()
    not_above = np.searchsorted(outside, inside, side="right").sum()
    return float(int(below) + int(not_above)) / (2 * len(inside) * len(outside))


def fpr95_id_pos(id_scores: Any, ood_scores: Any) -> float:
    """Return the fraction of OOD images accepted at the highest threshold that accepts at least 95 % of the ID images.

    ID is the positive class, as in the code of MCM and NegLabel. Arguments and errors as for ``auroc``.
    """
    inside, outside = _sorted(id_scores, "ID"), _sorted(ood_scores, "OOD")
    threshold = inside[len(inside) - _at_least_95_percent(len(inside))]
    return float(np.mean(outside >= threshold))


def fpr95_ood_pos(id_scores: Any, ood_scores: Any) -> float:
    """Return the fraction of ID images flagged at the lowest threshold that flags at least 95 % of the OOD images.

    OOD is the positive class, as in OpenOOD 1.5 and torch-uncertainty. Arguments and errors as for ``auroc``.
    """
    inside, outside = _sorted(id_scores, "ID"), _sorted(ood_scores, "OOD")
    threshold = outside[_at_least_95_percent(len(outside)) - 1]
    return float(np.mean(inside <= threshold))


def _at_least_95_percent(n: int) -> int:
    """Return the smallest k with k/n >= 0.95, exactly."""
    return -(-95 * n // 100)


def _sorted(scores: Any, side: str) -> np.ndarray:
    values = np.asarray(scores.cpu() if isinstance(scores, Tensor) else scores, dtype=np.float64).ravel()
    if not len(values):
        raise ValueError(f"there are no {side} scores")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{bad} of {len(values)} {side} scores are NaN or infinite")
    return np.sort(values)
