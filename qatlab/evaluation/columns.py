"""Per-image values of one set, gathered over the processes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric


class Columns(Metric):
    """Per-image values of one set, gathered over ranks and returned in the order of the images.

    ``update(index, **columns)`` takes (B,) tensors, kept as float64; ``compute()`` returns {name: (N,) float64 array}
    with "index" (int64) among them, sorted by index and each image once, so that sums are equal to the last bit on any
    number of processes. Arrays are returned, because torchmetrics squeezes a tensor of one image to a scalar.
    ``shared`` says whether each rank saw only a part of the images; if not, nothing is gathered.
    """

    # A batch's columns do not depend on earlier batches, so torchmetrics need not run update() twice in a forward.
    full_state_update = False

    def __init__(self, names: list[str], shared: bool = True) -> None:
        super().__init__(sync_on_compute=shared)
        self.names = names
        for name in ["index", *names]:
            # "cat" joins the batches of all ranks when compute() is called; until then each rank keeps its own.
            self.add_state(name, default=[], dist_reduce_fx="cat")
        # A rank that sees no image of the set must still take part in the gathering, with the right dtypes.
        self.update(torch.empty(0, dtype=torch.int64), **{name: torch.empty(0) for name in names})

    def update(self, index: Tensor, **columns: Tensor) -> None:
        """Append one batch: ``index`` (B,) int64 and a tensor (B,) for each name; KeyError when a column is missing."""
        # Every column becomes float64, because ranks can gather only tensors of one dtype.
        for name, values in {"index": index, **{name: columns[name].double() for name in self.names}}.items():
            getattr(self, name).append(values)

    def compute(self) -> dict[str, np.ndarray]:
        """Return {name: (N,) float64 array}, "index" (N,) int64 among them, sorted by index.

        An image that two ranks saw, because a share was padded, counts once.
        """
        merged = {name: _concatenated(getattr(self, name)) for name in ["index", *self.names]}
        # np.unique returns the first position of each index, in rising order of the indices, so that one call sorts the
        # images and drops repeated ones.
        _, first = np.unique(merged["index"], return_index=True)
        return {name: values[first] for name, values in merged.items()}


def _concatenated(state: list[Tensor] | Tensor) -> np.ndarray:
    """Return the values of a state as one array; torchmetrics keeps a list of batches until the ranks are joined."""
    return (torch.cat(state) if isinstance(state, list) else state).cpu().numpy()
