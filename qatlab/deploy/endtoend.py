"""Whether an exported model as a whole does what was measured of its simulation.

Bit by bit no two runtimes agree: rounding carries a difference of 1e-7 to that of a code within a few layers. So the
features are asked to be no further from the simulation's than quantization is wide, and the metrics no further than chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from qatlab.deploy.parity import distance

if TYPE_CHECKING:
    from qatlab.evaluation import Row

LIMIT = 1.3  # times as far from the simulation as that is from full precision
METRICS = {"zero_shot": ("top1", "ece"), "msp": ("auroc",), "mcm": ("auroc",), "energy": ("auroc",)}


class EndToEnd(NamedTuple):
    """Distances of unit features, ‖a - b‖ / ‖b‖ over a set: ``integer`` from the simulation, ``simulated`` from FP32.

    ``agreement`` is the share of images whose top-1 answer is the simulation's.
    """

    integer: float
    simulated: float
    agreement: float

    @property
    def passed(self) -> bool:
        """Whether the integer model is within what quantization itself changes."""
        return self.integer <= LIMIT * self.simulated


def compare_features(fp32: Tensor, simulated: Tensor, integer: Tensor, classes: Tensor) -> EndToEnd:
    """Return how features (N, D) of the same images lie, and how often the last two answer alike among ``classes`` (C, D)."""
    fp32, simulated, integer = fp32.double(), simulated.double(), integer.double()
    answers = [(values @ classes.double().T).argmax(1) for values in (simulated, integer)]
    return EndToEnd(
        distance(integer, simulated),
        distance(simulated, fp32),
        float((answers[0] == answers[1]).double().mean()),
    )


def compare_rows(rows: Sequence[Row], simulated: str, integer: str) -> list[str]:
    """Return in a sentence each what of the ``integer`` stage's rows lies further from the ``simulated`` ones than chance.

    Chance is the simulated metric's 95 % interval, and half its width to either side of the value: resampling raises an
    ECE, whose interval may lie wholly above it. Compared are accuracy, ECE and AUROC of every set.
    """
    of_stage = {
        stage: {
            (row["dataset"], row["score"]): row for row in rows if row["stage"] == stage and row["score"] in METRICS
        }
        for stage in (simulated, integer)
    }
    found = []
    for key, row in of_stage[simulated].items():
        for metric in METRICS[key[1]]:
            if key in of_stage[integer] and metric in row["intervals"]:
                (low, high), known = row["intervals"][metric], row["metrics"][metric]
                value, half = of_stage[integer][key]["metrics"][metric], (high - low) / 2
                if not min(low, known - half) <= value <= max(high, known + half):
                    found.append(f"{key[0]} {metric} ({key[1]}) {value:.4f} and {known:.4f} ({low:.4f} to {high:.4f})")
    return found
