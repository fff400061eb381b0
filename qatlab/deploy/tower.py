"""An exported model in the place of an image tower, so that whatever scores an encoder scores it too."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from qatlab.deploy.runtimes import opened, read_about


class DeployedTower(nn.Module):
    """Returns features (B, D) float32 of normalised images (B, 3, S, S) by the integer model in an exported folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.about = read_about(folder)
        self.model = opened(folder, self.about)
        self.stage = f"integer_{self.about['format']}"
        self.digest = hashlib.sha256(json.dumps(self.about["sha256"]).encode()).hexdigest()[:8]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features, on the device of the images."""
        return torch.from_numpy(self.model(images.float().cpu().numpy())).to(images.device)

    def extra_repr(self) -> str:
        """Return what tells one model from another: the hash of its files and what runs them."""
        return f"{self.about['runtime']}, {self.about['sha256']}"
