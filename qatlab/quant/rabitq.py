"""Codes of vectors that point as nearly as possible where the vectors do."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the vectors looked at in one go: what fits a core's cache.
PIECE = 2**17
# Cosines are computed to float32; a search below their rounding would look at noise.
TOLERANCE = 3e-8
# From 6 bits on the scales looked at end at (top + 10) / max |o| and start at this part of it, by the largest magnitude
# code top, as in the authors' code (FFTYYY/RaanA): to prove that none outside is better takes twice as long.
WINDOW = {31: 0.71, 63: 0.75, 127: 0.77}

# A range of scales per entry: the row it belongs to, and at each of its two ends the scale t, <y(t), o> and |y(t)|^2.
Point = tuple[Tensor, ...]


def rabitq_levels(rows: Tensor, bits: int) -> Tensor:
    """Return the levels u, uint8 of the shape of ``rows`` (n, d), whose y = u - (2^bits - 1) / 2 has the largest cosine.

    Of all vectors y on the grid of half-integers {-2^(b-1) + 1/2, ..., 2^(b-1) - 1/2} it is the one of least angle to
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
        magnitudes = unit[piece].mul_(scales[piece]).floor_().clamp_(max=top)
        torch.where(rows[piece] < 0, top - magnitudes, magnitudes.add(top + 1), out=magnitudes)
        levels[piece] = magnitudes
    return levels


def pieces(n: int, d: int) -> list[slice]:
    """Return slices of n rows of d elements, each of as many as a core's cache holds."""
    step = max(1, PIECE // d)
    return [slice(start, start + step) for start in range(0, n, step)]


def best_scales(unit: Tensor, top: int) -> Tensor:
    """Return for each row o of ``unit`` (n, d), non-negative, the t > 0, float64 (n,), at which y(t) is nearest to o.

    y(t) = min(floor(t o), top) + 1/2 changes only at the d * top breakpoints t = k / o_i, where <y, o> gains o_i = k / t
    and |y|^2 gains 2 k. So <y, o> as a function of |y|^2 is concave with slope 1 / (2 t), and on a range of t lies below
    its tangents at both ends: a range whose tangents stay below the best cosine so far holds no better t. What is
    left is halved, until nothing is. The cost is some 10 * 2^(b/2) evaluations of y(t) instead of d * 2^(b-1), the
    result that of the sweep over all breakpoints, from 6 bits on over those inside WINDOW.
    """
    largest = unit.amax(1).double()
    smallest = torch.where(unit > 0, unit, torch.inf).amin(1).double()
    cosine = torch.zeros_like(largest)  # the best so far, squared
    best = 0.5 / largest.clamp(min=1e-30)  # all magnitudes 1/2
    row = torch.arange(len(unit), device=unit.device)[(largest > 0) & (top > 0)]

    def look(row: Tensor, t: Tensor) -> Point:
        inner, square = _products(unit, row, t, top)
        found = inner * inner / square
        cosine.scatter_reduce_(0, row, found, "amax")
        improved = found >= cosine[row]
        best[row[improved]] = t[improved]
        return t, inner, square

    # One float before the first breakpoint and one behind the last; the third is where most rows have their best.
    start, end = (1 - 1e-6) / largest[row], (1 + 1e-6) * top / smallest[row]
    if top in WINDOW:
        end = torch.minimum(end, (top + 10) / largest[row])
        start = WINDOW[top] * (top + 10) / largest[row]
    low, high = look(row, start), look(row, end)
    look(row, (top + 0.8) / largest[row])
    while len(row):
        middle, hopeful = _refine(low, high, cosine[row].sqrt())
        row, middle = row[hopeful], middle[hopeful]
        low, high = _select(low, hopeful), _select(high, hopeful)
        between = look(row, middle)
        low = tuple(torch.cat(pair) for pair in zip(low, between, strict=True))
        high = tuple(torch.cat(pair) for pair in zip(between, high, strict=True))
        row = torch.cat([row, row])
    return best


def _refine(low: Point, high: Point, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Return where to halve each range of scales, and which may hold a cosine above ``cosine``."""
    (t0, inner0, square0), (t1, inner1, square1) = low, high
    slope0, slope1 = 0.5 / t0, 0.5 / t1
    # Where the tangents meet: the largest cosine under them is there or at an end.
    square = (inner1 - inner0 + square0 * slope0 - square1 * slope1) / (slope0 - slope1)
    square = torch.minimum(torch.maximum(square, square0), square1)
    inner = inner0 + (square - square0) * slope0
    # Of all points of the range the one furthest above the chord of cosine * sqrt(|y|^2); outside the range, none is.
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
