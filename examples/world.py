"""Draw docs/world.jpg: a row of images of every set of the embedded world.

python examples/world.py docs/world.jpg
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from qatlab.data.embedded.sets import EmbeddedSet

ROWS = {
    "id": "known shapes",
    "usual": "in their usual scene",
    "unusual": "in another",
    "noise": "noise",
    "fog": "fog",
    "gray": "faded",
    "outline": "outline",
    "blur": "blur",
    "near_ood": "shapes never named",
    "far_ood": "no object at all",
}
COLUMNS = 11

figure, axes = plt.subplots(len(ROWS), 1, figsize=(10, 8.4))
for axis, (kind, label) in zip(axes, ROWS.items(), strict=True):
    images = EmbeddedSet(kind, COLUMNS).__getitems__(list(range(COLUMNS)))
    strip = torch.cat([torch.nn.functional.pad(image, (2, 2, 2, 2), value=255) for image, _ in images], dim=2)
    axis.imshow(strip.permute(1, 2, 0).numpy(), interpolation="lanczos")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_ylabel(label, rotation=0, ha="right", va="center")
figure.tight_layout(h_pad=0.1)
figure.savefig(sys.argv[1], dpi=100, bbox_inches="tight", pil_kwargs={"quality": 88})
