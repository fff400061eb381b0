"""Draw docs/corruptions.jpg: the 19 corruptions at 5 severities, after the resize (left) and before it (right).

python examples/corruptions.py docs/corruptions.jpg
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from qatlab.data.corruptions import ORDERS, TABLES, Corrupt
from qatlab.data.embedded.sets import EmbeddedSet
from qatlab.data.preprocess import Preprocess

NAMES = list(TABLES["imagenet_c"])
SIZE, GAP = 224, 10
image, _ = EmbeddedSet("id", 6).__getitems__([5])[0]
preprocess = Preprocess(SIZE, (0.5,) * 3, (0.5,) * 3)


def strip(name: str, order: str) -> np.ndarray:
    """Return the image at severities 1 to 5 beside each other, (H, W, 3)."""
    shown = [Corrupt(name, severity, 0, order).fit(preprocess, image, "sheet") for severity in range(1, 6)]
    framed = [np.pad(x.numpy(), ((0, 0), (GAP, 0), (GAP, 0)), constant_values=255) for x in shown]
    return np.concatenate(framed, axis=2).transpose(1, 2, 0)


gap = np.full((SIZE + GAP, 60, 3), 255, dtype=np.uint8)
sheet = np.concatenate(
    [np.concatenate([strip(n, "resize_then_corrupt"), gap, strip(n, "corrupt_then_resize")], 1) for n in NAMES]
)
figure = plt.figure(figsize=(9.4, 13.6))
axis = figure.add_axes((0.15, 0, 0.85, 0.97))
axis.imshow(sheet)
axis.set_yticks([(SIZE + GAP) * (row + 0.5) for row in range(len(NAMES))], [n.replace("_", " ") for n in NAMES])
axis.set_xticks([sheet.shape[1] * side for side in (0.25, 0.75)], list(ORDERS))
axis.tick_params(length=0, labeltop=True, labelbottom=False)
axis.spines[:].set_visible(False)
figure.savefig(sys.argv[1], dpi=85, bbox_inches="tight", pil_kwargs={"quality": 80})
