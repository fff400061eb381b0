"""What a layer reads over the calibration images, in bounded memory: extremes of each channel, and some tokens."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256  # tokens that are kept of a part of the images


class LayerInputs:
    """Of a layer's inputs for every ``turns``-th image: the extremes of each channel and ROWS tokens drawn evenly."""

    def __init__(self, turn: int = 0, turns: int = 1) -> None:
        self.low = self.high = self.sample = self._keys = torch.empty(0)
        self._turn, self._turns, self._rows = turn, turns, ROWS if turns > 1 else 0
        # One seed for all layers: their samples are the same tokens of the same images.
        self._generator = torch.Generator().manual_seed(0)

    @property
    def absmax(self) -> Tensor:
        """The largest |x| per channel."""
        return torch.maximum(self.high, -self.low)

    def update(self, x: Tensor) -> None:
        """Take the inputs of a batch, (B, ..., channels)."""
        x, self._turn = x[self._turn :: self._turns], (self._turn - len(x)) % self._turns
        if not len(x):
            return
        low, high = (x := x.reshape(-1, x.shape[-1])).amin(0), x.amax(0)  # aminmax takes 20 times as long on a CPU
        keys, places = torch.rand(len(x), generator=self._generator).sort()
        sample = x[places[: self._rows].to(x.device)]
        if len(self.low):
            low, high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            # The tokens with the smallest random keys of all so far.
            keys, places = torch.cat([self._keys, keys[: self._rows]]).sort()
            sample = torch.cat([self.sample, sample])[places[: self._rows].to(x.device)]
        self.low, self.high, self.sample, self._keys = low, high, sample, keys[: self._rows]

    def extremes(self, scale: Tensor) -> Tensor:
        """Two tokens, divided by ``scale``, that hold the largest and the least value of all inputs, sampled or not."""
        tokens, high, low = (self.sample[:1] / scale).repeat(2, 1), self.high / scale, self.low / scale
        tokens[0, high.argmax()], tokens[1, low.argmin()] = high.max(), low.min()
        return tokens
