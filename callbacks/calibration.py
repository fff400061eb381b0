"""Zero-shot accuracy and how much its confidence can be trusted."""

from __future__ import annotations

from qatlab.evaluation import Evaluation, Prediction, Row, row
from qatlab.metrics.calibration import confidence_gap, expected_calibration_error, score_zero_shot

LABELLED = ("id", "shifted")
"""The roles of the sets whose labels are classes of the ID reference."""


class Calibration(Evaluation):
    """One row per view and labelled set: top1, ece (15 bins), nll (nats) and the signed confidence_gap."""

    roles = LABELLED

    def reset(self) -> None:
        """Forget everything seen."""
        labelled = [source for source in self.sources if source.role in LABELLED]
        self.seen = self.tables(labelled, ["confidence", "correct", "nll"])

    def update(self, prediction: Prediction) -> None:
        """Score one batch of a labelled set under every view."""
        if prediction.source.role not in LABELLED:
            return
        for view in self.views:
            scored = score_zero_shot(prediction.cosines, prediction.labels, view.logit_scale)
            self.seen[view, prediction.source].update(prediction.index, **scored._asdict())

    def compute(self) -> list[Row]:
        """Return the rows, one per view and labelled set."""
        rows = []
        for (view, source), table in self.seen.items():
            columns = table.compute()
            confidence, correct = columns["confidence"], columns["correct"]
            metrics = {
                "top1": float(correct.mean()),
                "ece": expected_calibration_error(confidence, correct),
                "nll": float(columns["nll"].mean()),
                "confidence_gap": confidence_gap(confidence, correct),
            }
            rows.append(row(view, source, "zero_shot", len(correct), metrics))
        return rows
