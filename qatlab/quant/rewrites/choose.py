"""The choice among rewrites that are drawn at random: the one whose quantized tower is nearest to the tower in full precision."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.quant.layers.walk import device_of, evaluating

Rewrite = Callable[[Any, Iterable[Tensor]], Any]


def least_error(
    tower: nn.Module,
    rewrites: Sequence[Rewrite],
    quantized: Callable[[nn.Module], nn.Module],
    batches: Callable[[], Iterable[Tensor]],
    say: Callable[[str], None],
) -> Rewrite:
    """Return the one of ``rewrites`` after which the ``quantized`` copy of ``tower`` has the least error on ``batches()``.

    The error is the mean over images of 1 - cosine between the features (B, D) of the two. ``quantized`` returns the
    rewritten tower that it is given, quantized and calibrated; it is called once for each rewrite, and ``say`` is told of
    each. ``tower`` stays as it is.
    """
    exact = _features(tower, batches())
    errors: list[float] = []
    say(f"  trying {len(rewrites)} rewrites, each of which is calibrated by itself")
    for number, rewrite in enumerate(rewrites, 1):
        start = time.monotonic()
        model = quantized(rewrite(copy.deepcopy(tower), batches()))
        # Half the squared distance of unit vectors is 1 - cosine, and stays exact where both are close.
        errors.append(float((_features(model, batches()) - exact).square().sum(1).mean()) / 2)
        say(f"  {number} of {len(rewrites)}: 1 - cosine {errors[-1]:.6f}, {time.monotonic() - start:.0f} s")
    best = errors.index(min(errors))
    say(f"  number {best + 1} is kept")
    return rewrites[best]


def _features(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Return the unit features (n, D), float64, of all images."""
    with evaluating(model):
        found = [F.normalize(model(batch.to(device_of(model))).double(), dim=-1) for batch in batches if len(batch)]
    return torch.cat(found)
