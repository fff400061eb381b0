"""An exported model with the interface of an image tower, so that it is scored like any other encoder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from qatlab.core.hashing import digest
from qatlab.deploy.contents import read_about
from qatlab.deploy.runtimes import Runtime, load


class DeployedTower(nn.Module):
    """Returns features (B, D) float32 of normalised images (B, 3, S, S) by the integer model in an exported folder.

    ``model`` is the model of the folder if it is already open; else ``deploy.load`` opens it, with ``trust``, and may
    raise UserError. ``logit_scale`` is the logit scale for the export's probabilities, and
    ``logit_bias`` the bias where these are sigmoids, None where they are a softmax over the classes.
    """

    def __init__(self, folder: Path, model: Runtime | None = None, trust: bool = False) -> None:
        super().__init__()
        self.about = read_about(folder)
        self.model = model or load(folder, trust=trust)
        self.stage, self.logit_scale = f"integer_{self.about['format']}", float(self.about["logit_scale"])
        # A softmax leaves the bias of a model that has one unused.
        is_sigmoid = self.about.get("zeroshot") == "sigmoid"
        self.logit_bias = float(self.about["logit_bias"]) if is_sigmoid else None
        # Rows of an export have this digest, so that an export with other files or another logit scale gets rows of its
        # own.
        self.digest = digest(json.dumps([self.about["sha256"], self.logit_scale]))[:8]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, D) float32 of ``images`` (B, 3, S, S), on their device; the model itself runs on the CPU."""
        return torch.from_numpy(self.model(images.float().cpu().numpy())).to(images.device)

    def extra_repr(self) -> str:
        """Return the hashes of the model's files and the name of its runtime, which tell it from other models."""
        # The feature stores hash this text, because this module has no parameters that would tell two exports apart.
        return f"{self.about['runtime']}, {self.about['sha256']}"
