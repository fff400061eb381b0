"""Zero-shot accuracy, and how far the confidence of the predictions can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from qatlab.evaluation.evaluation import Evaluation, Pass, row
from qatlab.evaluation.prediction import Prediction
from qatlab.metrics.accuracy import mean_per_class_accuracy, top_k_accuracy
from qatlab.metrics.bins import equal_mass_calibration_error, maximum_calibration_error
from qatlab.metrics.bootstrap import bootstrap_classification
from qatlab.metrics.calibration import confidence_gap, expected_calibration_error
from qatlab.metrics.classwise import classwise_calibration_error, classwise_gaps
from qatlab.metrics.paired import Difference, mcnemar, paired_bootstrap
from qatlab.metrics.resampling import percentile_interval
from qatlab.metrics.selective import aurc
from qatlab.metrics.smooth import smooth_calibration_error
from qatlab.results.rowfile import Row
from qatlab.suites.source import Source, View

LABELLED = ("id", "shifted", "common", "counter")
"""The roles of the scored sets whose labels are classes of the ID reference."""

STRATIFIED_FROM = 10
"""The least images per class for stratified resamples: with fewer images the intervals would be too narrow."""

Replicates = dict[str, np.ndarray]
Drawn = dict[tuple[View, Source], tuple[dict[str, np.ndarray], Replicates]]


class Calibration(Evaluation):
    """One row per view and labelled set: accuracy, calibration and selective prediction.

    top1, top5, mean_per_class; ece (15 equal-width bins), ece_equal_mass, ece_classwise, mce, smooth_ece, nll (nats),
    brier, the signed confidence_gap and aurc; a probe has no ece_classwise. All but ece_classwise have a bootstrap
    interval. top1 (McNemar), ece and nll (paired bootstrap) have differences from FP32 on the same images. A row under
    a refitted logit scale also has ``refit``: the differences of ece and nll from the scale before the refit.
    """

    roles = LABELLED

    def reset(self) -> None:
        """Forget everything seen."""
        labelled = [source for source in self.of.sources if source.role in LABELLED]
        self.seen = self.tables(labelled, ["confidence", "correct", "nll", "brier", "rank", "label"])
        self.gaps: dict[tuple[View, Source], np.ndarray] = {}

    def update(self, prediction: Prediction) -> None:
        """Score one batch of a labelled set under the views that it is for."""
        if prediction.source.role not in LABELLED:
            return
        for view in prediction.views:
            key = view, prediction.source
            self.seen[key].update(prediction.index, label=prediction.labels, **prediction.zero_shot(view)._asdict())
            # In a probe each process sees only a part of the images,
            # and the gaps by class are not gathered over processes.
            if not self.of.shared:
                gaps = classwise_gaps(*prediction.classified(), view.logit_scale, logit_bias=view.logit_bias)
                self.gaps[key] = self.gaps.get(key, 0) + gaps

    def expected(self, of: Pass, images: Mapping[Source, int]) -> Iterator[tuple[View, Source, str]]:
        """Yield the row of each view and labelled set."""
        for view in of.views:
            yield from ((view, source, "zero_shot") for source in of.sources if source.role in LABELLED)

    def compute(self) -> list[Row]:
        """Return the rows, one per view and labelled set."""
        rows = []
        columns = {key: table.compute() for key, table in self.seen.items()}
        drawn: Drawn = {}
        for (view, source), scored in columns.items():
            metrics = classification(scored)
            if (view, source) in self.gaps:
                gaps = self.gaps[view, source]
                metrics["ece_classwise"] = classwise_calibration_error(gaps, len(scored["index"]))
            if not self.of.resamples:  # intervals and tests need resamples
                rows.append(row(view, source, "zero_shot", len(scored["index"]), metrics))
                continue
            replicates = classification_replicates(scored, self.of.resamples)
            drawn[view, source] = scored, replicates  # FP32's view comes first, and later views are compared with it
            intervals = {name: percentile_interval(values) for name, values in replicates.items()}
            paired = _differences(drawn, self.of.baseline, view, source)
            found = row(view, source, "zero_shot", len(scored["index"]), metrics, intervals, paired)
            if refitted := _differences(drawn, self.of.before(view), view, source):
                found["refit"] = {name: refitted[name]._asdict() for name in ("ece", "nll")}
            rows.append(found)
        return rows


def _differences(drawn: Drawn, of: View | None, view: View, source: Source) -> dict[str, Difference]:
    """Return the differences of ``view`` from the view ``of`` on a set; {} where ``of`` is None or ``view`` itself."""
    return {} if of is None or of == view else paired_with(*drawn[of, source], *drawn[view, source])


def classification(scored: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the metrics of one set from its columns: confidence, correct, nll, brier, rank and label, (N,) each."""
    confidence, correct = scored["confidence"], scored["correct"]
    return {
        "top1": float(correct.mean()),
        "top5": top_k_accuracy(scored["rank"], 5),
        "mean_per_class": mean_per_class_accuracy(correct, scored["label"]),
        "ece": expected_calibration_error(confidence, correct),
        "ece_equal_mass": equal_mass_calibration_error(confidence, correct),
        "mce": maximum_calibration_error(confidence, correct),
        "smooth_ece": smooth_calibration_error(confidence, correct),
        "nll": float(scored["nll"].mean()),
        "brier": float(scored["brier"].mean()),
        "confidence_gap": confidence_gap(confidence, correct),
        "aurc": aurc(confidence, correct),
    }


def classification_replicates(scored: dict[str, np.ndarray], resamples: int) -> Replicates:
    """Return {metric: (resamples,)} of the columns of ``classification``, from the same draws for every model."""
    labels = scored["label"]
    strata = labels if np.unique(labels, return_counts=True)[1].min() >= STRATIFIED_FROM else None
    return bootstrap_classification(scored, labels, resamples=resamples, strata=strata)


def paired_with(
    reference: dict[str, np.ndarray], of_reference: Replicates, other: dict[str, np.ndarray], of_other: Replicates
) -> dict[str, Difference]:
    """Return the differences of top1, ece and nll of ``other`` from ``reference``, two models on the same images.

    Each has its columns, (N,) by name, and its replicates, (resamples,) by metric.
    """
    values = {
        "top1": float(other["correct"].mean() - reference["correct"].mean()),
        "ece": _ece(other) - _ece(reference),
        "nll": float(other["nll"].mean() - reference["nll"].mean()),
    }
    found = {name: paired_bootstrap(value, of_reference[name], of_other[name]) for name, value in values.items()}
    # For top1 the bootstrap gives the interval, and McNemar's exact test of paired answers gives the p-value.
    exact = mcnemar(reference["correct"], other["correct"])
    return found | {"top1": found["top1"]._replace(p_value=exact)}


def _ece(scored: dict[str, np.ndarray]) -> float:
    return expected_calibration_error(scored["confidence"], scored["correct"])
