"""The names and number formats of scores, metrics and bits in all tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass

from qatlab.results.rowfile import Row

SCORES = {
    "msp": "MSP",
    "energy": "Energy",
    "max_logit": "MaxLogit",
    "mcm": "MCM",
    "entropy": "Entropy",
    "gl_mcm": "GL-MCM",
    "neglabel": "NegLabel",
    "generic_negative": "generic negatives",
    "mahalanobis": "Mahalanobis",
    "knn": "kNN",
    "vim": "ViM",
}


@dataclass(frozen=True)
class Measure:
    """How a metric is written: its ``title``, the ``factor`` that a stored value is multiplied by, and a format ``form``.

    ``less_is_better`` says whether a decrease of the metric is an improvement.
    """

    title: str
    less_is_better: bool = False
    factor: float = 100
    form: str = ".1f"

    def text(self, value: float, sign: str = "") -> str:
        """Return a stored value as text; ``sign`` "+" also puts a plus in front of positive numbers."""
        return f"{self.factor * value:{sign}{self.form}}"


MEASURES = {
    "top1": Measure("top-1 %"),
    "top5": Measure("top-5 %"),
    "mean_per_class": Measure("mean per class %"),
    "ece": Measure("ECE %", less_is_better=True),
    "ece_equal_mass": Measure("ECE (equal mass) %", less_is_better=True),
    "ece_classwise": Measure("ECE (classwise) %", less_is_better=True),
    "mce": Measure("MCE %", less_is_better=True),
    "smooth_ece": Measure("smooth ECE %", less_is_better=True),
    "nll": Measure("NLL", less_is_better=True, factor=1, form=".3f"),
    "brier": Measure("Brier", less_is_better=True, factor=1, form=".3f"),
    "confidence_gap": Measure("confidence - accuracy %"),
    "aurc": Measure("AURC %", less_is_better=True),
    "at_bound": Measure("at the bound %", less_is_better=True),
    "auroc": Measure("AUROC %"),
    "aupr_in": Measure("AUPR in %"),
    "aupr_out": Measure("AUPR out %"),
    "fpr95_id_pos": Measure("FPR@95 ID+ %", less_is_better=True),
    "fpr95_ood_pos": Measure("FPR@95 OOD+ %", less_is_better=True),
    "common": Measure("common %"),
    "counter": Measure("counter %"),
    "drop": Measure("drop %", less_is_better=True),
    "rsg": Measure("RSG %", less_is_better=True),
    "vulnerability": Measure("added vulnerability %", less_is_better=True),
}


def measure(metric: str) -> Measure:
    """Return how a metric is written; a user's own metric has its name as title and four digits without a factor."""
    return MEASURES.get(metric, Measure(metric, factor=1, form=".4g"))


def bits(row: Row) -> str:
    """Return the bits of a row's layers: "W8A8", or "W4" where only weights are rounded, or "" where nothing is rounded."""
    sides = (("W", row.get("weight_bits")), ("A", row.get("act_bits")))
    # With a plan or rules the layers may have different bits: the row then holds their mean, such as 3.5.
    return "".join(f"{side}{number:.3g}" for side, number in sides if number is not None)
