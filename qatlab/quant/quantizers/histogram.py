"""A histogram of activations that grows with their range, and the percentiles and best grids computed from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

# A step of an 8-bit grid has some hundred bins, so that the
# width of a bin is far below the rounding errors of the grid.
BINS = 2**16
# A batch is counted in pieces whose temporaries stay in a core's cache, because fresh memory costs more than counting.
PIECE = 2**18


class Histogram:
    """Counts in BINS equal bins over [-edge, edge], float64, taken batch by batch.

    A value beyond the edge doubles the edge; bins are then merged two by two, so that no count is lost. Every result
    takes a value as the centre of its bin, which is off by at most edge / BINS.
    """

    def __init__(self, edge: float, device: torch.device) -> None:
        self.edge = edge
        self.counts = torch.zeros(BINS, dtype=torch.float64, device=device)

    def update(self, x: Tensor, absmax: float) -> None:
        """Count the values of x (of any shape); ``absmax`` is the largest |x| that was seen so far."""
        while self.edge < absmax:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            # The old range is the middle half of the doubled range.
            self.counts[BINS // 4 : 3 * BINS // 4] = merged
            self.edge *= 2
        for piece in x.flatten().split(PIECE):
            # torch.histc cannot be used: its float32 counts stop growing at 2^24, and in deterministic mode GPUs refuse
            # it. A value at the edge itself is counted in the last bin.
            places = torch.add(piece.float(), self.edge).mul_(BINS / 2 / self.edge).clamp_(0, BINS - 1)
            self.counts += torch.bincount(places.int(), minlength=BINS)

    def percentile(self, percent: float) -> Tensor:
        """Return the least value that at least ``percent`` % of all |x| do not exceed, float64, a scalar."""
        # Bins at the same distance on both sides of 0 hold the same |x|.
        folded = self.counts[BINS // 2 :] + self.counts[: BINS // 2].flip(0)
        return (_reached(folded, percent) + 0.5) * (2 * self.edge / BINS)

    def tails(self, percent: float) -> tuple[Tensor, Tensor]:
        """Return (low, high), float64 scalars: ``percent`` % of all x are at least low, as many at most high."""
        high = _reached(self.counts, percent) + 0.5
        low = _reached(self.counts.flip(0), percent) + 0.5
        return self.edge - low * (2 * self.edge / BINS), high * (2 * self.edge / BINS) - self.edge

    def mse_optimal_scale(self, largest: Tensor, qmin: int, qmax: int) -> Tensor:
        """Return the scale, at most ``largest``, of least squared error on a grid without zero point, float64."""
        # Empty bins add nothing to the error, and leaving them out makes each of the 80 scales cheaper to try.
        seen = self.counts > 0
        counts = self.counts[seen]
        values = ((seen.nonzero().squeeze(1).double() + 0.5) * (2 / BINS) - 1) * self.edge

        def squared_error(scale: Tensor) -> Tensor:
            """Return the squared error summed over all values, a scalar, for a scalar ``scale``."""
            error = torch.div(values, scale).round_().clamp_(qmin, qmax).mul_(scale).sub_(values)
            return error.square_() @ counts

        return search(squared_error, largest)

    def mse_optimal_grid(self, low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        """Return the (scale, zero point) of least squared error, each a float64 scalar.

        First the grids from a * ``low`` <= 0 to b * ``high`` >= 0 are searched, for pairs of fractions a and b, then
        steps and zero points around the best of them.
        """
        # With fewer codes the error has more local minima and a grid is cheaper to try, so the search is finer.
        factor = 1.06 if qmax - qmin < 32 else 1.28
        powers = torch.arange(math.log(1000, factor), dtype=torch.float64, device=self.counts.device)
        fractions = factor**-powers
        lows, highs = (end.flatten() for end in torch.meshgrid(low * fractions, high * fractions, indexing="ij"))
        scale = ((highs - lows) / (qmax - qmin)).clamp_(min=1e-30)  # positive even where both ends are 0
        zero = (qmin - lows / scale).round_().clamp_(qmin, qmax)
        squared_error = self._grid_error(qmin, qmax)
        shifts = torch.arange(-2.0, 3.0, dtype=torch.float64, device=scale.device)
        steps = torch.arange(-4.0, 5.0, dtype=torch.float64, device=scale.device)
        # Each of three rounds has steps whose ratio is the fifth root of the last round's. Several grids enter the
        # first two rounds, because the best grid of a coarse round may lie beside a deeper valley.
        for kept in (16, 4, 1):
            factor **= 0.2
            best = squared_error(scale, zero).topk(kept, largest=False).indices
            scale = (scale[best, None, None] * factor ** steps[:, None]).expand(-1, -1, len(shifts)).flatten()
            zero = (zero[best, None, None] + shifts).clamp_(qmin, qmax).expand(-1, len(steps), -1).flatten()
        best = squared_error(scale, zero).argmin()
        return scale[best], zero[best]

    def _grid_error(self, qmin: int, qmax: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function of scales (K,) and zero points (K,) to squared errors (K,), minus the sum of x^2.

        The error of the values that share a code follows from their number and their sum. Two running sums over the
        bins give both, as differences at the borders between codes, so that no grid needs a pass over the bins.
        """
        width = 2 * self.edge / BINS
        centres = (torch.arange(BINS, dtype=torch.float64, device=self.counts.device) + 0.5) * width - self.edge
        zero = self.counts.new_zeros(1)
        number = torch.cat([zero, self.counts.cumsum(0)])
        total = torch.cat([zero, (self.counts * centres).cumsum(0)])
        codes = torch.arange(qmin, qmax + 1, dtype=torch.float64, device=self.counts.device)

        def error(scale: Tensor, zero_point: Tensor) -> Tensor:
            """Return the errors (K,) of the grids with ``scale`` (K,) and ``zero_point`` (K,)."""
            values = (codes - zero_point[:, None]) * scale[:, None]
            borders = values[:, 1:] - scale[:, None] / 2
            # The number of bins whose centre lies below each border, where a border is halfway between two codes.
            below = ((borders + self.edge) / width - 0.5).ceil_().clamp_(0, BINS).long()
            ends = (len(scale), 1)
            below = torch.cat([below.new_zeros(ends), below, below.new_full(ends, BINS)], 1)
            # The sum of (x - v)^2 over a code's values is n v^2 - 2 v sum(x) + sum(x^2). The last term is left out,
            # because it is the same for every grid.
            return (values * (values * number[below].diff(dim=1) - 2 * total[below].diff(dim=1))).sum(1)

        return error


def rank(percent: float, elements: float) -> int:
    """Return the place, counted from 1, of the percentile among ``elements`` ascending values (the inverted CDF).

    ``percent`` counts as the decimal that is written: 99.9 % of 1000 values is the 999th, which floats would miss.
    """
    return max(1, math.ceil(Fraction(str(percent)) * int(elements) / 100))


def search(squared_error: Callable[[Tensor], Tensor], largest: Tensor, elements: int = 0) -> Tensor:
    """Return the scales, ``largest`` / 1000 to ``largest``, of least ``squared_error`` (elementwise, () or (n, 1)).

    The error has many small local minima. So a geometric series of scales finds the valley first, and three finer
    series go to its bottom. With ``elements``, the number of values behind each error, the first series stops where no
    smaller scale can be the best: rounding loses at most scale^2 / 4 for each value, and the loss beyond that, from
    clipping, grows as the scale shrinks.
    """
    factor = 1.13  # 1.13^56 is about 1000
    # A row of zeros would otherwise give a scale of 0, by which values cannot be divided.
    largest = largest.clamp(min=1e-30)
    best, least = largest, squared_error(largest)
    for k in range(1, 57):
        candidate = largest * factor**-k
        error = squared_error(candidate)
        best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
        if elements and bool((0.999 * error - elements / 4 * candidate.square() > least).all()):
            break
    for _ in range(3):
        factor **= 0.2
        for candidate in [best * factor**k for k in (-4, -3, -2, -1, 1, 2, 3, 4)]:
            error = squared_error(candidate)
            best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
    return best


def _reached(counts: Tensor, percent: float) -> Tensor:
    """Return the first bin, as a float64 scalar, at which the running count has reached ``percent`` % of all."""
    running = counts.cumsum(0)
    return torch.searchsorted(running, running.new_tensor(rank(percent, float(running[-1])))).double()
