"""Codes of vectors whose direction is as near as possible to that of the vectors."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the vectors that are computed together, about as many as fit in a core's cache.
PIECE = 2**17
# Cosines are computed to float32, so a search for differences below this number would find noise.
TOLERANCE = 3e-8
# From 6 bits on, scales are searched between this part of (top + 10) / max |o| and
# (top + 10) / max |o|, where the key ``top`` is the largest code. These bounds of
# the authors' code (FFTYYY/RaanA) halve the time of a search over all scales.
WINDOW = {31: 0.71, 63: 0.75, 127: 0.77}

# One end of each range of scales in a search, as three tensors (ranges,): the scale t, <y(t), o> and |y(t)|^2.
Point = tuple[Tensor, ...]


def rabitq_levels(rows: Tensor, bits: int) -> Tensor:
    """Return the levels u, uint8 of the shape of ``rows`` (n, d), whose y = u - (2^bits - 1) / 2 has the best cosine.

    Of all vectors y on the grid of half-integers {-2^(b-1) + 1/2, ..., 2^(b-1) - 1/2} this y has the least angle to
    the row (``best_scales``), to float32 rounding of the cosine: signs, and magnitudes min(floor(t |o|), 2^(b-1) - 1)
    + 1/2 at the best t (Gao et al. 2024, arXiv 2409.09913, "Practical and asymptotically optimal quantization of
    high-dimensional vectors"). ``bits`` is 1 to 8. A row of zeros has all its levels at 2^(b-1).
    """
    top = 2 ** (bits - 1) - 1
    unit = rows.float().abs()
    unit.div_(torch.linalg.vector_norm(unit, dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny))
    scales = best_scales(unit, top).float().unsqueeze(1)
    levels = torch.empty_like(rows, dtype=torch.uint8)
    for piece in pieces(*rows.shape):
        # ``unit`` may be overwritten, because nothing reads it after this.
        magnitudes = unit[piece].mul_(scales[piece]).floor_().clamp_(max=top)
        # Levels count from 0: negative values have the lower half, mirrored, and other values have the upper half.
        torch.where(rows[piece] < 0, top - magnitudes, magnitudes.add(top + 1), out=magnitudes)
        levels[piece] = magnitudes
    return levels


def pieces(n: int, d: int) -> list[slice]:
    """Return slices of n rows of d elements, each with about as many elements as fit in a core's cache."""
    step = max(1, PIECE // d)
    return [slice(start, start + step) for start in range(0, n, step)]


def best_scales(unit: Tensor, top: int) -> Tensor:
    """Return for each row o of ``unit`` (n, d), non-negative, the t > 0, float64 (n,), at which y(t) is nearest to o.

    y(t) = min(floor(t o), top) + 1/2 changes only at the d * top breakpoints t = k / o_i, where <y, o> gains o_i = k /
    t and |y|^2 gains 2 k. So <y, o> as a function of |y|^2 is concave with slope 1 / (2 t), and on a range of t lies
    below its tangents at both ends: a range whose tangents stay below the best cosine so far holds no better t and is
    dropped. The other ranges are halved until none is left. The cost is some 10 * 2^(b/2) evaluations of y(t) instead
    of d * 2^(b-1); the result is that of the sweep over all breakpoints, from 6 bits on over those inside WINDOW.
    """
    largest = unit.amax(1).double()
    smallest = torch.where(unit > 0, unit, torch.inf).amin(1).double()
    cosine = torch.zeros_like(largest)  # the best cosine of each row so far, squared
    best = 0.5 / largest.clamp(min=1e-30)  # the scale of that cosine; it starts where all magnitudes are 1/2
    # A row of zeros has no direction, and at 1 bit all magnitudes are 1/2 at every scale, so neither needs a search.
    row = torch.arange(len(unit), device=unit.device)[(largest > 0) & (top > 0)]

    def look(row: Tensor, t: Tensor) -> Point:
        """Return the ends of ranges at the scales t (ranges,) of the rows ``row``, and keep the best scales."""
        inner, square = _products(unit, row, t, top)
        found = inner * inner / square
        cosine.scatter_reduce_(0, row, found, "amax")
        # A row may have several ranges here, of which only the best one equals the maximum that was just taken.
        improved = found >= cosine[row]
        best[row[improved]] = t[improved]
        return t, inner, square

    # The search runs from just before the first breakpoint to just behind the last one.
    start, end = (1 - 1e-6) / largest[row], (1 + 1e-6) * top / smallest[row]
    if top in WINDOW:
        end = torch.minimum(end, (top + 10) / largest[row])
        start = WINDOW[top] * (top + 10) / largest[row]
    low, high = look(row, start), look(row, end)
    # Most rows have their best scale near this one, and a good cosine at the start rules out more ranges.
    look(row, (top + 0.8) / largest[row])
    while len(row):
        # Ranges that hold no better scale are dropped, and the others are cut in two.
        middle, hopeful = _refine(low, high, cosine[row].sqrt())
        row, middle = row[hopeful], middle[hopeful]
        low, high = _select(low, hopeful), _select(high, hopeful)
        between = look(row, middle)
        low = tuple(torch.cat(pair) for pair in zip(low, between, strict=True))
        high = tuple(torch.cat(pair) for pair in zip(between, high, strict=True))
        row = torch.cat([row, row])
    return best


def _refine(low: Point, high: Point, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Return where to cut each range of scales (ranges,), and whether a better ``cosine`` (ranges,) is possible."""
    (t0, inner0, square0), (t1, inner1, square1) = low, high
    slope0, slope1 = 0.5 / t0, 0.5 / t1
    # |y|^2 where the tangents of both ends meet. The largest cosine under the tangents is at this place or at an end.
    square = (inner1 - inner0 + square0 * slope0 - square1 * slope1) / (slope0 - slope1)
    square = torch.minimum(torch.maximum(square, square0), square1)
    inner = inner0 + (square - square0) * slope0
    # The scale at which the curve of <y, o> over |y|^2 lies furthest above the curve cosine * sqrt(|y|^2). If that
    # scale is not in the range, no scale of the range has a better cosine.
    middle = (square0.sqrt() + square1.sqrt()) / (2 * cosine)
    hopeful = (t0 < middle) & (middle < t1) & (inner > cosine * square.sqrt() * (1 + TOLERANCE))
    return middle, hopeful


def _products(unit: Tensor, row: Tensor, t: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return <y(t), o> and |y(t)|^2, float64, for each pair of a row's number and a scale."""
    inner, square = torch.empty_like(t), torch.empty_like(t)
    for piece in pieces(len(row), unit.shape[1]):
        scale = t[piece].float().unsqueeze(1)
        x = unit.index_select(0, row[piece]).mul_(scale)
        y = x.floor().clamp_(max=top).add_(0.5)
        inner[piece] = torch.linalg.vecdot(x, y) / scale.squeeze(1)
        square[piece] = torch.linalg.vecdot(y, y)
    return inner, square


def _select(point: Point, kept: Tensor) -> Point:
    return tuple(value[kept] for value in point)
