"""The inputs of a layer over the calibration images, in bounded memory: extremes by channel, and some tokens."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256  # tokens of a layer's inputs that are kept


class LayerInputs:
    """The extremes of each channel of a layer's inputs, and ROWS tokens drawn evenly, over every ``turns``-th image.

    ``turn`` is the first image that counts. ``low`` and ``high`` are (channels,), ``sample`` is (ROWS, channels), and empty
    where a single turn is not ``sampled``.
    """

    def __init__(self, turn: int = 0, turns: int = 1, sampled: bool = False) -> None:
        self.low = self.high = self.sample = self._keys = torch.empty(0)
        # ``turns`` above 1 means a search, which divides the images
        # among several LayerInputs, and which alone reads a sample.
        self._turn, self._turns, self._rows = turn, turns, ROWS if turns > 1 or sampled else 0
        self.tokens = 0  # that were seen
        # All layers have one seed, so that their samples are the same tokens of the same images.
        self._generator = torch.Generator().manual_seed(0)

    @property
    def absmax(self) -> Tensor:
        """The largest |x| per channel, (channels,)."""
        return torch.maximum(self.high, -self.low)

    def update(self, x: Tensor) -> None:
        """Take in x, the layer's inputs for a batch of images, (B, ..., channels)."""
        # The turn is counted over all batches, so that their sizes do not change which images count.
        x, self._turn = x[self._turn :: self._turns], (self._turn - len(x)) % self._turns
        if not len(x):
            return
        x = x.reshape(-1, x.shape[-1])
        self.tokens += len(x)
        low, high = x.amin(0), x.amax(0)  # torch.aminmax over a dimension takes 20 times as long on a CPU
        keys, places = torch.rand(len(x), generator=self._generator).sort()
        sample = x[places[: self._rows].to(x.device)]
        if len(self.low):
            low, high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            # Each token has a random key, and the sample is the tokens with the smallest keys of all batches.
            keys, places = torch.cat([self._keys, keys[: self._rows]]).sort()
            sample = torch.cat([self.sample, sample])[places[: self._rows].to(x.device)]
        self.low, self.high, self.sample, self._keys = low, high, sample, keys[: self._rows]

    def extremes(self, scale: Tensor) -> Tensor:
        """Return two tokens (2, channels) that hold the largest and the least value of all inputs divided by ``scale``.

        ``scale`` is (channels,). The inputs are all that were seen, sampled or not.
        """
        # The other channels get the values of a token that was seen.
        tokens, high, low = (self.sample[:1] / scale).repeat(2, 1), self.high / scale, self.low / scale
        tokens[0, high.argmax()], tokens[1, low.argmin()] = high.max(), low.min()
        return tokens
