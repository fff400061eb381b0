"""The check of a whole exported model against its simulation, by features and by metrics.

No two runtimes agree bit by bit: within a few layers rounding turns a difference of 1e-7 into a difference of one code.
So features may differ from those of the simulation about as much as quantization changes them, and metrics as much as
chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from qatlab.deploy.parity import distance

if TYPE_CHECKING:
    from qatlab.results.rowfile import Row

# An integer model may lie this many times as far from the simulation as the simulation lies from full precision.
LIMIT = 1.3
METRICS = {"zero_shot": ("top1", "ece"), "msp": ("auroc",), "mcm": ("auroc",), "energy": ("auroc",)}


class EndToEnd(NamedTuple):
    """Distances of unit features, ‖a - b‖ / ‖b‖ over a set: ``integer`` from the simulation, ``simulated`` from FP32.

    ``agreement`` is the share of the ``n`` images whose top-1 answer is the simulation's.
    """

    integer: float
    simulated: float
    agreement: float
    n: int

    @property
    def passed(self) -> bool:
        """Whether the integer model is within what quantization itself changes."""
        return self.integer <= LIMIT * self.simulated


def compare_features(fp32: Tensor, simulated: Tensor, integer: Tensor, classes: Tensor) -> EndToEnd:
    """Return the EndToEnd of the features (N, D) of the same images; answers are those among ``classes`` (C, D)."""
    fp32, simulated, integer = fp32.double(), simulated.double(), integer.double()
    answers = [(values @ classes.double().T).argmax(1) for values in (simulated, integer)]
    return EndToEnd(
        distance(integer, simulated),
        distance(simulated, fp32),
        float((answers[0] == answers[1]).double().mean()),
        len(integer),
    )


def agreement(measured: Mapping[str, EndToEnd]) -> str:
    """Return in words how often an integer model answers as the simulation does, set by set."""
    return ", ".join(
        f"{name} {round(of.agreement * of.n)} of {of.n} ({100 * of.agreement:.1f} %)" for name, of in measured.items()
    )


def compare_rows(rows: Sequence[Row], simulated: str, integer: str) -> list[str]:
    """Return a sentence for each metric of the stage ``integer`` that differs from the stage ``simulated`` by more than chance.

    Accuracy, ECE and AUROC of every set are compared. A difference is within chance if the metric is in the 95 %
    interval of the simulation, or within half the width of this interval of the simulation's value: because resampling
    raises an ECE, its interval may be entirely above the value.
    """
    before, after = _by_set_and_score(rows, simulated), _by_set_and_score(rows, integer)
    found = []
    for key, row in before.items():
        for metric in METRICS[key[1]]:
            # Without resamples there is no interval, and nothing to say what chance explains.
            if key in after and metric in row["intervals"]:
                (low, high), known = row["intervals"][metric], row["metrics"][metric]
                value, half = after[key]["metrics"][metric], (high - low) / 2
                if not min(low, known - half) <= value <= max(high, known + half):
                    found.append(f"{key[0]} {metric} ({key[1]}) {value:.4f} and {known:.4f} ({low:.4f} to {high:.4f})")
    return found


def _by_set_and_score(rows: Sequence[Row], stage: str) -> dict[tuple[str, str], Row]:
    """Return {(set, score): row} of the rows of a stage that are compared."""
    return {(row["dataset"], row["score"]): row for row in rows if row["stage"] == stage and row["score"] in METRICS}
