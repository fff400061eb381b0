"""What was predicted for every single image, so that two runs can be paired on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import polars
from torch import Tensor

from qatlab.cache import atomic
from qatlab.callbacks.calibration import LABELLED
from qatlab.callbacks.ood import checked_scores, checked_temperature
from qatlab.evaluation import Evaluation, Prediction, Row, Source, View
from qatlab.metrics.calibration import score_zero_shot
from qatlab.metrics.ood import SCORES, msp, score_images

_SET = ["dataset", "definition", "role", "reference"]
_TYPES = {"label": polars.Int64, "prediction": polars.Int64, "correct": polars.Boolean}


class Predictions(Evaluation):
    """Writes ``predictions/<stage>.parquet`` into the run's folder, one line per view, set and image; it has no rows.

    Columns: dataset, definition, role, reference, logit_scale, index (position in the set), label (-1 where unknown), prediction,
    confidence, correct and nll (null where the labels are not classes of the reference) and one per OOD score. A module
    whose ``run_folder`` is None, on every rank, turns it off: a probe keeps no files.
    """

    roles = ()

    def __init__(self, scores: Sequence[str] = tuple(SCORES), mcm_temperature: float = 1.0) -> None:
        super().__init__()
        self.scores = checked_scores(scores, "callbacks.predictions.scores")
        self.mcm_temperature = checked_temperature(mcm_temperature, "callbacks.predictions.mcm_temperature")

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Forget the last pass and read where this one's files go."""
        self.folder: Path | None = pl_module.run_folder
        self.writes: bool = trainer.is_global_zero
        super().on_validation_start(trainer, pl_module)

    def reset(self) -> None:
        """Forget everything seen."""
        always = ["label", "prediction", "confidence", *self.scores]
        labelled = [source for source in self.sources if source.role in LABELLED]
        others = [source for source in self.sources if source.role not in LABELLED]
        self.seen = {**self.tables(labelled, [*always, "correct", "nll"]), **self.tables(others, always)}

    def update(self, prediction: Prediction) -> None:
        """Keep one batch under every view."""
        if self.folder is None:
            return
        for view in self.views:
            columns = {
                **_classification(prediction, view.logit_scale),
                **score_images(self.scores, prediction.cosines, view.logit_scale, self.mcm_temperature),
            }
            self.seen[view, prediction.source].update(prediction.index, label=prediction.labels, **columns)

    def compute(self) -> list[Row]:
        """Write one file per stage on rank zero; return no rows."""
        if self.folder is None:
            return []
        # every rank gathers, in the same order, and only then one of them writes
        frames = {(view, source): self._frame(view, source) for view, source in self.seen}
        if self.writes:
            for stage in dict.fromkeys(view.stage for view in self.views):
                mine = [frame for (view, _), frame in frames.items() if view.stage == stage]
                _write(self.folder / "predictions" / f"{stage}.parquet", polars.concat(mine, how="diagonal"))
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


def _classification(prediction: Prediction, logit_scale: float) -> dict[str, Tensor]:
    """Return prediction and confidence, with correct and nll where the labels are classes of the reference."""
    if prediction.source.role in LABELLED:
        return score_zero_shot(prediction.cosines, prediction.labels, logit_scale)._asdict()
    return {"prediction": prediction.cosines.argmax(dim=1), "confidence": msp(prediction.cosines, logit_scale)}


def _write(path: Path, frame: polars.DataFrame) -> None:
    """Replace the file; sets that it holds from an earlier pass over another suite stay in it."""
    if path.exists():
        earlier = polars.read_parquet(path)
        frame = polars.concat([earlier.join(frame, on=_SET, how="anti"), frame], how="diagonal")
    with atomic(path) as temporary:
        frame.write_parquet(temporary)
