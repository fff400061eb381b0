"""Images of the embedded world as the embedded model takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from qatlab.data.embedded.sets import EmbeddedSet
from qatlab.models.clip import Clip


def embedded_images(clip: Clip, count: int = 8) -> Tensor:
    """The first images of the ID set, normalised, (count, 3, S, S)."""
    return clip.preprocess.normalize(torch.stack([EmbeddedSet("id", count)[i][0] for i in range(count)]))
