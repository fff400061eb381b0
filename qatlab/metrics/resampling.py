"""Bootstrap resamples as counts: how often each image was drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# A block of resamples has this many draws (1 MB as int64), which stay in a core's cache.
BLOCK = 131_072


class Interval(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


def resampled_counts(strata: np.ndarray, resamples: int, rows: int, seed: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield counts of ``resamples`` resamples, (r, N) int32 with r at most ``rows``, each row summing to N.

    ``strata`` (N,): images are drawn with replacement within each value, so that every resample has as many images of
    each value as the set; a constant draws from all images. Row i depends on ``seed``, the strata and i alone. Efron &
    Tibshirani 1993. Raises ValueError on fewer than one resample.
    """
    if resamples < 1:
        raise ValueError(f"{resamples} resamples give no interval")
    images = len(strata)
    _, stratum, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    # The images are sorted by stratum, and position p of a resample draws from the stratum of member p.
    members = np.argsort(stratum, kind="stable")
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    # The sizes are float64, because the draws below are fractions of the stratum's size.
    within = np.repeat(sizes, sizes).astype(np.float64)
    generator = np.random.default_rng(seed)
    for first in range(0, resamples, rows):
        block = min(rows, resamples - first)
        # A uniform number times the size is cut to an integer, so that one call draws for strata of any size.
        drawn = (generator.random((block, images)) * within).astype(np.int64)
        # Row r of the block gets a range of numbers of its own, so that one bincount counts all resamples.
        drawn += starts + np.arange(block)[:, None] * images
        counts = np.bincount(drawn.ravel(), minlength=block * images).reshape(block, images).astype(np.int32)
        if len(sizes) > 1:
            # Counts change from the order of the strata to that of the
            # images. A copy is read, because the source is overwritten.
            counts[:, members] = counts.copy()
        yield counts


def percentile_interval(replicates: np.ndarray, level: float = 0.95) -> Interval:
    """Return the central ``level`` of the replicates, (R,): the percentile bootstrap interval, Efron 1979.

    Biased measures stay biased: resampling adds noise to every bin, so the interval of a calibration error lies above
    that of the population and, for a well calibrated model, may lie above the measured value too.
    """
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
