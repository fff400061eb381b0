"""The small floating-point numbers that accelerators multiply, and rounding to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# For each dtype that is rounded, the integers of its width, the bits of them that hold the exponent, and all but the sign.
_BITS = {
    torch.float32: (torch.int32, 0x7F800000, 0x7FFFFFFF),
    torch.float64: (torch.int64, 0x7FF0000000000000, 0x7FFFFFFFFFFFFFFF),
}


@dataclass(frozen=True)
class NumberFormat:
    """Numbers of a sign, ``exponent`` bits and ``mantissa`` bits, of which ``largest`` is the greatest that is finite.

    The bias of the exponent is 2^(exponent - 1) - 1, and below the least normal number there are subnormal ones: OCP 8-bit
    Floating Point 1.0 for E4M3 (the variant "fn", without infinities) and E5M2, OCP Microscaling Formats 1.0 for the others.
    """

    exponent: int
    mantissa: int
    largest: float

    @property
    def bits(self) -> int:
        """The bits of one number."""
        return 1 + self.exponent + self.mantissa

    @property
    def largest_exponent(self) -> int:
        """The exponent of the greatest power of two that is a number of this format."""
        return int(torch.tensor(self.largest).frexp().exponent) - 1

    @property
    def limit(self) -> float:
        """The middle between ``largest`` and what would come next: beyond it a value is clipped and not only rounded."""
        return self.largest + 2.0 ** (self.largest_exponent - self.mantissa - 1)

    def rounded(self, x: Tensor) -> Tensor:
        """Return the nearest number of this format to each of x, float32 or float64 of any shape, in the dtype of x.

        Ties go to the even mantissa, what is beyond ``largest`` becomes ``largest`` with its sign, and NaN stays NaN.
        """
        return self.round_(x.clone())

    def round_(self, x: Tensor) -> Tensor:
        """Round x in place as ``rounded`` does, and return it."""
        x.clamp_(-self.largest, self.largest)
        integers, mask, _ = _BITS[x.dtype]
        # The bits of the exponent alone are the greatest power of two that |x| reaches.
        power = (x.view(integers) & mask).view(x.dtype)
        step = power.clamp_(min=2.0 ** (2 - 2 ** (self.exponent - 1))).mul_(2.0**-self.mantissa)
        # Powers of two divide without an error, so that the only rounding is that to whole steps.
        return x.div_(step).round_().mul_(step)


FORMATS = {
    "e4m3": NumberFormat(4, 3, 448.0),
    "e5m2": NumberFormat(5, 2, 57344.0),
    "e2m3": NumberFormat(2, 3, 7.5),
    "e3m2": NumberFormat(3, 2, 28.0),
    "e2m1": NumberFormat(2, 1, 6.0),
}


def power_of_two(x: Tensor, up: bool = False, lower: int = 0) -> Tensor:
    """Return 2^(k - ``lower``) with k the floor of log2 of x, not negative and of any shape, in the dtype of x.

    ``up`` takes the ceiling. The powers are those of E8M0, 2^-127 to 2^127; 0 gives 2^-127, and NaN and infinity give NaN.
    """
    fraction, exponent = torch.frexp(x)  # x = fraction * 2^exponent, fraction from a half to below 1
    exponent = exponent - (fraction == 0.5).to(exponent.dtype) if up else exponent - 1
    exponent = torch.where(x > 0, exponent - lower, -127).clamp_(-127, 127)
    return torch.where(x.isfinite(), torch.ldexp(torch.ones_like(x), exponent), torch.nan)


def absmax_of(blocks: Tensor) -> Tensor:
    """Return the largest absolute value of each of ``blocks`` (..., n), (..., 1), NaN where one holds NaN."""
    # Without their signs numbers are ordered like their bits, and integers are compared in half the time on a CPU.
    integers, _, unsigned = _BITS[blocks.dtype]
    return (blocks.view(integers) & unsigned).amax(-1, keepdim=True).view(blocks.dtype)
