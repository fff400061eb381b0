"""The samples for calibrating quantizers, which the layer report and a refit without labels use as well."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from qatlab.data.captions.samples import Captioned, SkipCounter
from qatlab.data.preprocess import Preprocess


def captioned(data: Any) -> bool:
    """Return whether the images of a source have captions; a user's own class without the attribute counts as captioned."""
    return bool(getattr(data, "captioned", True))


class CalibrationSamples:
    """The first ``images`` samples of ``data``, or with a seed as many drawn from all shards; they are read at first use.

    ``data`` is a source of images with or without captions, ``preprocess`` is the preprocessing of the model.
    """

    def __init__(self, data: Any, images: int, seed: int | None, preprocess: Preprocess) -> None:
        self.data, self.images, self.seed, self.preprocess = data, images, seed, preprocess

    @cached_property
    def samples(self) -> Captioned:
        """Return the samples: ``images`` (n, 3, S, S) uint8 and their ``captions``."""
        if self.seed is None:
            # The first samples need only the first shards: a remote data set is not fetched whole.
            first: Captioned = self.data.first(self.images, self.preprocess)
            return first
        # The samples are batch 0 of a training on one process with this seed: shards and samples are shuffled there.
        drawn: Captioned = self.data.batch(0, self.images, 0, 1, self.preprocess, self.seed)
        return drawn

    @property
    def captioned(self) -> bool:
        """Return whether the samples have captions."""
        return captioned(self.data)

    def read(self) -> None:
        """Read the samples now, so that missing data end the run here."""
        _ = self.samples

    def normalized(self, count: int) -> Tensor:
        """Return the first ``count`` images as an encoder takes them, (n, 3, S, S) float32."""
        return self.preprocess.normalize(self.samples.images[:count])

    @property
    def skipped(self) -> SkipCounter:
        """Return how many samples could not be read, by reason; empty before the samples are read."""
        # Looked up in vars, because ``self.samples`` would read the samples now.
        return SkipCounter(self.samples.skipped if "samples" in vars(self) else {})
