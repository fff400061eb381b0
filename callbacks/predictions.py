"""The prediction for every image, stored so that two runs can be compared image by image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars
import torch
from torch import Tensor

from qatlab.callbacks.calibration import LABELLED
from qatlab.callbacks.ood import Scores, named_scores, usable
from qatlab.core.checksums import read_table, write_table
from qatlab.core.damage import whole
from qatlab.core.domains import Positive, checked
from qatlab.core.files import atomic
from qatlab.evaluation.columns import Columns
from qatlab.evaluation.evaluation import Evaluation, Pass, Stored
from qatlab.evaluation.prediction import Prediction
from qatlab.metrics.calibration import softmax_peak
from qatlab.metrics.ood import SCORES
from qatlab.metrics.sigmoid import top_sigmoid
from qatlab.results.rowfile import Row
from qatlab.suites.source import Source, View

_SET = ["dataset", "definition", "role", "reference"]
_TYPES = {"label": polars.Int64, "prediction": polars.Int64, "correct": polars.Boolean}


class Predictions(Evaluation):
    """Writes ``predictions/<stage>.parquet`` into the run's folder, one line per view, set and image; it has no rows.

    Columns: dataset, definition, role, reference, logit_scale, index (position in the set), label (-1 where unknown),
    prediction, confidence, correct and nll (null where the labels are not classes of the reference) and one per OOD
    score. A pass without a folder, such as a probe, writes nothing.
    """

    roles = ()

    @checked
    def __init__(self, scores: Scores = tuple(SCORES), mcm_temperature: Positive = 1.0) -> None:
        super().__init__()
        self.scores = named_scores(scores, "callbacks.predictions.scores")
        self.mcm_temperature = mcm_temperature

    def reset(self) -> None:
        """Forget everything seen."""
        self.seen: dict[tuple[View, Source], Columns] = {}
        if self.of.folder is None:  # a probe, whose predictions are not kept
            return
        for view in self.of.views:
            for source in self.of.sources:
                names = ["label", "prediction", "confidence", *usable(self.scores, self.of.available[source.reference])]
                if source.role in LABELLED:
                    names += ["correct", "nll"]
                self.seen[view, source] = self.table(names)

    def update(self, prediction: Prediction) -> None:
        """Keep one batch under the views that it is for."""
        scores = usable(self.scores, self.of.available[prediction.source.reference])
        for view in prediction.views if self.of.folder is not None else ():
            columns = {**_classification(prediction, view), **prediction.ood_scores(scores, view, self.mcm_temperature)}
            self.seen[view, prediction.source].update(prediction.index, label=prediction.labels, **columns)

    def lacking(self, of: Pass, images: Mapping[Source, int], stored: Stored) -> set[tuple[View, Source]]:
        """Return the views and sets of which the files in the run's folder have no lines."""
        if of.folder is None:
            return set()
        stages = {view.stage for view in of.views}
        kept = {stage: _kept(_file(of.folder, stage)) for stage in stages}
        every = {(view, source) for view in of.views for source in of.sources}
        return {
            (view, source) for view, source in every if (source.name, view.definition(source)) not in kept[view.stage]
        }

    def compute(self) -> list[Row]:
        """Write one file per stage; return no rows."""
        for stage in dict.fromkeys(view.stage for view, _ in self.seen):
            mine = [self._frame(view, source) for view, source in self.seen if view.stage == stage]
            assert self.of.folder is not None
            # "diagonal" fills with null the columns that sets without labels lack.
            _write(_file(self.of.folder, stage), polars.concat(mine, how="diagonal"))
        return []

    def _frame(self, view: View, source: Source) -> polars.DataFrame:
        """Return the lines of a set under a view, in the order of its images."""
        # Columns keeps every value as float64, so counts and truth values get their own types back here.
        columns = polars.DataFrame(self.seen[view, source].compute())
        columns = columns.with_columns(
            polars.col(name).cast(kind) for name, kind in _TYPES.items() if name in columns.columns
        )
        keys = dict(zip(_SET, (source.name, view.definition(source), source.role, source.reference), strict=True))
        named = [polars.lit(value).alias(key) for key, value in keys.items()]
        read_with = {"logit_scale": view.logit_scale}
        if view.logit_bias is not None:  # without it the file is that of earlier releases
            read_with["logit_bias"] = view.logit_bias
        named += [polars.lit(value, dtype=polars.Float64).alias(key) for key, value in read_with.items()]
        return columns.select(*named, polars.all())


def _classification(prediction: Prediction, view: View) -> dict[str, Tensor]:
    """Return prediction and confidence, and where the labels are classes of the reference correct and nll too."""
    if prediction.source.role not in LABELLED:
        # The images of other sets belong to no class of the reference, so there is no correct answer to compare with.
        peak = softmax_peak(prediction.cosines, view.logit_scale)
        if view.logit_bias is None:
            return {"prediction": peak.prediction, "confidence": 1 / peak.mass}
        confidence = top_sigmoid(peak.cosine, view.logit_scale, view.logit_bias)
        return {"prediction": peak.prediction, "confidence": confidence}
    scored = prediction.zero_shot(view)._asdict()
    # Where a set has only some classes, a prediction is a position
    # among these classes; the file needs a class of the reference.
    if prediction.rows is not None:
        scored["prediction"] = torch.tensor(prediction.rows, device=prediction.labels.device)[scored["prediction"]]
    return scored


def _file(folder: Path, stage: str) -> Path:
    return folder / "predictions" / f"{stage}.parquet"


def _kept(path: Path) -> set[tuple[str, str]]:
    """Return the (dataset, definition) pairs of a file, none where the file is missing or damaged."""
    table = whole(path, read_table)
    return set() if table is None else set(table.select("dataset", "definition").unique().iter_rows())


def _write(path: Path, frame: polars.DataFrame) -> None:
    """Write ``frame`` into the file; sets that the file holds from a pass over another suite stay in it."""
    # A set counts as the same where dataset, definition, role and reference agree; its earlier lines are replaced.
    if (earlier := whole(path, read_table)) is not None:
        frame = polars.concat([earlier.join(frame, on=_SET, how="anti"), frame], how="diagonal")
    with atomic(path) as temporary:
        write_table(temporary, frame)
