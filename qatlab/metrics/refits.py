"""Recalibrations for comparison, each fitted on other images than those it is scored on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression, minimize
from torch import Tensor

from qatlab.metrics.bins import outcomes
from qatlab.metrics.calibration import ZeroShot, blocks, check_labels, score_zero_shot
from qatlab.metrics.temperature import fit_logit_scale


def folds(images: int, k: int = 5, seed: int = 0) -> np.ndarray:
    """Return the fold of each image, (N,) int64 in 0..k-1: sizes differ by at most one, the order is drawn by ``seed``.

    Raises ValueError unless 2 <= k <= N.
    """
    if not 2 <= k <= images:
        raise ValueError(f"{images} images cannot be divided into {k} folds")
    # i mod k gives folds whose sizes differ by at most one; the permutation then puts the images into folds at random.
    return np.random.default_rng(seed).permutation(np.arange(images) % k)


def refit_temperature(
    cosines: Tensor, labels: Tensor, logit_scale: float, fold: np.ndarray
) -> tuple[ZeroShot, np.ndarray]:
    """Return every image scored at the scale fitted on the other folds, and whether it kept ``logit_scale``, (N,) bool.

    A fit that ends at its bound does not determine the scale and is not used. Guo et al. 2017. ``cosines`` (N, C),
    ``labels`` (N,) int64 in 0..C-1, ``fold`` (N,) from ``folds``. Errors as ``fit_logit_scale``.
    """
    parts, kept = [], np.zeros(len(fold), bool)
    for held_out, rest in _splits(fold):
        fit = fit_logit_scale(cosines[rest], labels[rest], current=logit_scale)
        # At a bound the search ended but the likelihood is not
        # highest, for example where all images are classified right.
        kept[held_out] = fit.at_bound
        scale = logit_scale if fit.at_bound else fit.logit_scale
        parts.append((held_out, score_zero_shot(cosines[held_out], labels[held_out], scale)))
    return _in_order(parts), kept


def refit_vector(cosines: Tensor, labels: Tensor, logit_scale: float, fold: np.ndarray) -> ZeroShot:
    """Return every image, (N,) each, scored with one scale and one bias per class that were fitted on the other folds.

    Guo et al. 2017. ``cosines`` (N, C), ``labels`` (N,) int64 in 0..C-1, ``fold`` (N,) from ``folds``; the fit starts
    at ``logit_scale``. The predictions change, and a class that the other folds lack is never predicted again.
    """
    parts = []
    for held_out, rest in _splits(fold):
        scale, bias = fit_vector_scaling(cosines[rest], labels[rest], logit_scale)
        # The logits already include the scale, so the scoring multiplies them by 1.
        parts.append((held_out, score_zero_shot(cosines[held_out] * scale + bias, labels[held_out], 1.0)))
    return _in_order(parts)


def refit_isotonic(confidence: Any, correct: Any, fold: np.ndarray) -> np.ndarray:
    """Return every image's confidence, (N,) float64, mapped by the isotonic regression of the other folds.

    ``confidence`` (N,) in [0, 1] and ``correct`` (N,) bool or 0/1, arrays or tensors. Zadrozny & Elkan 2002; straight
    between the fitted points and constant beyond them. Raises ValueError as the calibration errors do.
    """
    confidences, hits = outcomes(confidence, correct)
    mapped = np.empty_like(confidences)
    for held_out, rest in _splits(fold):
        # Equal confidences must get one value, so they enter the regression as one point, weighted by their number.
        points, position, images = np.unique(confidences[rest], return_inverse=True, return_counts=True)
        share = np.bincount(position, weights=hits[rest]) / images
        mapped[held_out] = np.interp(confidences[held_out], points, isotonic_regression(share, weights=images).x)
    return mapped


def fit_vector_scaling(cosines: Tensor, labels: Tensor, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Return scale and bias of each class, (C,) float64, that minimise the cross-entropy of softmax(scale c + bias).

    ``cosines`` (N, C), ``labels`` (N,) int64; the fit starts from ``logit_scale`` and no bias. The objective is convex;
    L-BFGS stops after 200 steps, which a class without images (its bias has no minimum) reaches. Raises ValueError on
    a label outside 0..C-1.
    """
    check_labels(labels, cosines.shape[1])
    images, classes = cosines.shape
    # Cosines are centred on the mean of their class first. Scale and bias
    # then hardly depend on each other, so that L-BFGS takes few steps.
    middle = cosines.mean(dim=0, dtype=torch.float64)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the mean cross-entropy and its slope, (2 C,) float64, at ``parameters`` (2 C,), scales then biases."""
        scale, bias = torch.from_numpy(parameters).split(classes)
        total, slope_scale, slope_bias = 0.0, torch.zeros_like(scale), torch.zeros_like(bias)
        for rows in blocks(cosines):
            centred = (cosines[rows].double() - middle) * logit_scale
            logits = centred * scale + bias
            chance = torch.softmax(logits, dim=1)
            own = labels[rows, None]
            total += float((torch.logsumexp(logits, dim=1) - logits.gather(1, own).squeeze(1)).sum())
            # The slope of the cross-entropy by the logits is softmax minus one-hot, so 1 is subtracted at the label.
            chance.scatter_add_(1, own, -torch.ones_like(own, dtype=torch.float64))
            slope_scale += (chance * centred).sum(dim=0)
            slope_bias += chance.sum(dim=0)
        return total / images, torch.cat([slope_scale, slope_bias]).numpy() / images

    # The fit starts at the model's own logits: a scale of 1 on s (c − mean), and a bias that adds s mean again.
    start = np.concatenate([np.ones(classes), (logit_scale * middle).numpy()])
    options = {"maxiter": 200, "maxfun": 400, "ftol": 1e-13, "gtol": 1e-7}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    scale, bias = torch.from_numpy(found.x).split(classes)
    # The parameters of centred cosines are converted to those of raw cosines.
    return scale * logit_scale, bias - scale * logit_scale * middle


def _splits(fold: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (held-out images, the others) of every fold."""
    return [(np.flatnonzero(fold == part), np.flatnonzero(fold != part)) for part in np.unique(fold)]


def _in_order(parts: list[tuple[np.ndarray, ZeroShot]]) -> ZeroShot:
    """Return the held-out images of all folds in the order of the set."""
    order = np.argsort(np.concatenate([held_out for held_out, _ in parts]))
    scored = [of_fold for _, of_fold in parts]
    return ZeroShot(*(torch.cat(columns)[order] for columns in zip(*scored, strict=True)))
