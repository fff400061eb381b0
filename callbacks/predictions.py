"""What was predicted for every single image, so that two runs can be paired on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars
import torch
from torch import Tensor

from qatlab.cache import atomic
from qatlab.callbacks.calibration import LABELLED
from qatlab.callbacks.ood import checked_scores, checked_temperature, usable
from qatlab.evaluation import Evaluation, Prediction, Row, Source, View
from qatlab.metrics.calibration import softmax_peak
from qatlab.metrics.ood import SCORES

_SET = ["dataset", "definition", "role", "reference"]
_TYPES = {"label": polars.Int64, "prediction": polars.Int64, "correct": polars.Boolean}


class Predictions(Evaluation):
    """Writes ``predictions/<stage>.parquet`` into the run's folder, one line per view, set and image; it has no rows.

    Columns: dataset, definition, role, reference, logit_scale, index (position in the set), label (-1 where unknown), prediction,
    confidence, correct and nll (null where the labels are not classes of the reference) and one per OOD score. It keeps
    nothing of a pass without a folder, such as a probe.
    """

    roles = ()

    def __init__(self, scores: Sequence[str] | str = tuple(SCORES), mcm_temperature: float = 1.0) -> None:
        super().__init__()
        self.scores = checked_scores(scores, "callbacks.predictions.scores")
        self.mcm_temperature = checked_temperature(mcm_temperature, "callbacks.predictions.mcm_temperature")

    def reset(self) -> None:
        """Forget everything seen."""
        self.seen = {
            (view, source): self.table(
                [
                    *("label", "prediction", "confidence"),
                    *usable(self.scores, self.of.available[source.reference]),
                    *(("correct", "nll") if source.role in LABELLED else ()),
                ]
            )
            for view in self.of.views
            for source in self.of.sources
            if self.of.folder is not None
        }

    def update(self, prediction: Prediction) -> None:
        """Keep one batch under the views that it is for."""
        scores = usable(self.scores, self.of.available[prediction.source.reference])
        for view in prediction.views if self.of.folder is not None else ():
            columns = {**_classification(prediction, view), **prediction.ood_scores(scores, view, self.mcm_temperature)}
            self.seen[view, prediction.source].update(prediction.index, label=prediction.labels, **columns)

    def compute(self) -> list[Row]:
        """Write one file per stage; return no rows."""
        for stage in dict.fromkeys(view.stage for view, _ in self.seen):
            mine = [self._frame(view, source) for view, source in self.seen if view.stage == stage]
            assert self.of.folder is not None
            _write(self.of.folder / "predictions" / f"{stage}.parquet", polars.concat(mine, how="diagonal"))
        return []

    def _frame(self, view: View, source: Source) -> polars.DataFrame:
        columns = polars.DataFrame(self.seen[view, source].compute())
        columns = columns.with_columns(
            polars.col(name).cast(kind) for name, kind in _TYPES.items() if name in columns.columns
        )
        keys = dict(zip(_SET, (source.name, view.definition(source), source.role, source.reference), strict=True))
        named = [polars.lit(value).alias(key) for key, value in keys.items()]
        scale = polars.lit(view.logit_scale, dtype=polars.Float64).alias("logit_scale")
        return columns.select(*named, scale, polars.all())


def _classification(prediction: Prediction, view: View) -> dict[str, Tensor]:
    """Return prediction and confidence, with correct and nll where the labels are classes of the reference."""
    if prediction.source.role not in LABELLED:
        peak = softmax_peak(prediction.cosines, view.logit_scale)
        return {"prediction": peak.prediction, "confidence": 1 / peak.mass}
    scored = prediction.zero_shot(view)._asdict()
    if prediction.rows is not None:  # as a class of the reference
        scored["prediction"] = torch.tensor(prediction.rows, device=prediction.labels.device)[scored["prediction"]]
    return scored


def _write(path: Path, frame: polars.DataFrame) -> None:
    """Replace the file; sets that it holds from an earlier pass over another suite stay in it."""
    if path.exists():
        earlier = polars.read_parquet(path)
        frame = polars.concat([earlier.join(frame, on=_SET, how="anti"), frame], how="diagonal")
    with atomic(path) as temporary:
        frame.write_parquet(temporary)
