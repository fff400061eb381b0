"""Numbers from wherever they were computed."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def as_array(values: Any, dtype: Any = None) -> np.ndarray:
    """Return an array of ``values``, an array, a sequence or a tensor on any device."""
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=dtype)
