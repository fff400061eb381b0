"""Fast Walsh-Hadamard transforms: rotations that spread an outlier over many features, at O(d log d)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from qatlab.core.errors import UserError

# A transform of d = 16 * 16 * ... * r features is one small product per factor. Products are about four times as fast
# as additions and subtractions in pairs, which read and write the whole tensor log2(d) times. The work,
# 2 d (16 + 16 + ... + r), stays O(d log d).
RADIX = 16


def walsh_hadamard(x: Tensor) -> Tensor:
    """Return H x over the last dimension of x (..., d), d a power of two: H orthonormal in Sylvester's order, H = H^T.

    The transform is its own inverse. Shape and dtype are those of x, float16 to float64, and it is computed in that
    dtype, under autocast too; the gradient is the transform of the gradient, and nothing is kept for it. Raises
    UserError when d is not a power of two. (Fino and Algazi 1976; for quantization: Ashkboos et al. 2024.)
    """
    width = x.shape[-1]
    if width < 1 or width & (width - 1):
        raise UserError(
            f"walsh_hadamard got {width} features, and takes a power of two: RandomHadamard({width}, seed) takes any width."
        )
    return _WalshHadamard.apply(x)


class RandomHadamard(nn.Module):
    """A seeded orthogonal map R of the last dimension of ``width`` features, any width: returns R x for x (..., width).

    With p the largest power of two <= width, R is: random signs and a Walsh-Hadamard transform of the first p features,
    then random signs and a transform of the last p. The two windows overlap, so every feature passes at least one, and
    where width = p every feature passes both (Yang et al. 2025, arXiv 2504.03717, "RaanA": PiecewiseHadamard in the
    authors' code, there without a seed). R depends on ``width`` and ``seed`` alone, in every dtype and on every device;
    nothing is learned. A linear layer W R^T on R x equals W on x: ``R(W)``, on the rows of W, is that weight.

    Raises UserError for a ``width`` that is not a whole number of at least 1.
    """

    first_signs: Tensor
    last_signs: Tensor

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise UserError(f"the width of a random Hadamard rotation is {width!r}: give a whole number of at least 1.")
        self.width, self.seed = width, seed
        self.window = 1 << (width.bit_length() - 1)
        # The signs are drawn on the CPU, because a GPU draws other numbers from the same seed.
        signs = torch.randint(2, (2, self.window), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0
        self.register_buffer("first_signs", signs[0].clone())
        self.register_buffer("last_signs", signs[1].clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return R x, in the shape and dtype of x (..., width)."""
        self._require_width(x)
        first, rest = x.split([self.window, self.width - self.window], dim=-1)
        x = torch.cat([walsh_hadamard(first * self.first_signs.to(x.dtype)), rest], dim=-1)
        rest, last = x.split([self.width - self.window, self.window], dim=-1)
        return torch.cat([rest, walsh_hadamard(last * self.last_signs.to(x.dtype))], dim=-1)

    def inverse(self, x: Tensor) -> Tensor:
        """Return R^T x, which undoes the forward, in the shape and dtype of x (..., width)."""
        self._require_width(x)
        # The steps of the forward are undone in the opposite order; the transform and the signs are their own inverses.
        rest, last = x.split([self.width - self.window, self.window], dim=-1)
        x = torch.cat([rest, walsh_hadamard(last) * self.last_signs.to(x.dtype)], dim=-1)
        first, rest = x.split([self.window, self.width - self.window], dim=-1)
        return torch.cat([walsh_hadamard(first) * self.first_signs.to(x.dtype), rest], dim=-1)

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        return f"width={self.width}, seed={self.seed}"

    def _require_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.width:
            raise ValueError(f"a rotation of {self.width} features got an input of shape {tuple(x.shape)}")


class _WalshHadamard(torch.autograd.Function):
    """The transform is linear and symmetric, so it is its own backward and saves nothing."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _transform(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _WalshHadamard.apply(grad)


def _transform(x: Tensor) -> Tensor:
    """Return H x, H a Kronecker product of Hadamard matrices of at most RADIX rows, the innermost features first."""
    width, inner = x.shape[-1], 1
    # A width of one skips the loop below, so the copy is what keeps the result from sharing the memory of x.
    y = x.clone() if width == 1 else x
    # autocast would round the products to bfloat16, so it is switched off.
    with torch.autocast(x.device.type, enabled=False):
        while inner < width:
            factor = min(RADIX, width // inner)
            h = _hadamard_matrix(factor, x.dtype, x.device)
            # The first factor mixes neighbours in one plain product;
            # later factors mix features that lie ``inner`` apart.
            y = y.reshape(-1, factor) @ h if inner == 1 else h @ y.reshape(-1, factor, inner)
            inner *= factor
    return y.view(x.shape)


def _hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the orthonormal Hadamard matrix (size, size), size a power of two, in Sylvester's order."""
    # While torch traces a graph, new tensors have no values and must not be kept for later calls.
    return (_built if torch.compiler.is_compiling() else _kept)(size, dtype, device)


def _built(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Training may reuse a matrix that was made during inference, but refuses tensors of inference mode.
    with torch.inference_mode(False), torch.no_grad():
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < size:
            h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
        # The division is made in float64, so that every dtype gets the same matrix up to one rounding.
        return (h / size**0.5).to(device, dtype)


_kept = cache(_built)
