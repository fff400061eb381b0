"""Conversion of numbers to arrays, whatever they were computed by."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def as_array(values: Any, dtype: Any = None) -> np.ndarray:
    """Return ``values``, an array, a sequence or a tensor of any shape on any device, as an array of the same shape."""
    # numpy can read only tensors that lie on the CPU.
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=dtype)
