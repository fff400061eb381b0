"""From a run to its exported folder: written, compared with the simulation, scored, and only then put in place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from torch import Tensor, nn

from qatlab.data.pools import places_of, pool_of
from qatlab.data.suites import EvaluationSet
from qatlab.deploy import onnx, openvino
from qatlab.deploy.bundle import describe, served_scale, update
from qatlab.deploy.card import write_card
from qatlab.deploy.endtoend import LIMIT as FARTHEST
from qatlab.deploy.endtoend import EndToEnd, compare_features, compare_rows
from qatlab.deploy.integer import Classifier, integer_copy, integer_layers
from qatlab.deploy.parity import LIMIT, LayerParity, Part, compare_layers
from qatlab.deploy.tower import DeployedTower
from qatlab.errors import UserError
from qatlab.evaluation import View
from qatlab.metrics.ood import score_images

if TYPE_CHECKING:
    from qatlab.study import Study

IMAGES = 16  # that every layer is compared on


def package(study: Study, form: str) -> Path:
    """Return the folder of the integer model of a run in a format: checked, scored on the suite, with its card.

    Raises UserError for a run without exact integer form, and for a model that fails a check, which is left in
    ``<format>.failed`` to be looked at.
    """
    folder = study.run.folder / "export" / form
    draft = folder.with_name(f"{form}.failed")
    integer = integer_copy(study.module.visual.cpu())
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    inside = next(entry for entry in study.suite.sets if entry.source.role == "id")
    classes = study.module.heads[inside.source.reference].classes
    if study.config.probabilities:
        integer = Classifier(integer, classes.features, served_scale(study)).eval()
    layers = len(integer_layers(integer))
    study.say(f"exporting {layers} layers to {form}")
    part, count = _write(study, integer, draft, form)
    images = _images(study, inside)
    found = compare_layers(study.module.visual, images, part)
    pl.DataFrame(found, schema=list(LayerParity._fields), orient="row").write_csv(draft / "parity.csv")
    integers = count(images)
    update(draft, integer_layers=integers)
    _require_layers(found, integers, draft)
    study.say(
        f"  {integers} of {layers} layers in integers; on the same input at most {max(of.mismatch for of in found):.1e} of the "
        f"codes differ, and where none does the output is {max(of.product_error for of in found):.1e} off"
    )
    tower = DeployedTower(draft)
    simulated = study.stages[-1]
    views = [View("fp32", study.clip.logit_scale), View(simulated, study.module.logit_scale), *study.serve([tower])]
    study.score(views)
    features = study.features(inside)
    measured = compare_features(features["fp32"], features["simulated"], features[tower.stage], classes.features)
    asked = {(view.stage, of.source.name, view.definition(of.source)) for view in views for of in study.suite.sets}
    rows = [row for row in study.run.rows() if (row["stage"], row["dataset"], row["definition"]) in asked]
    outside = compare_rows(rows, simulated, tower.stage)
    about = update(draft, end_to_end=measured._asdict(), **_threshold(study, inside, features[tower.stage]))
    _require_whole(study, measured, outside, draft)
    write_card(draft, about, rows, study.run.folder, simulated, tower.stage)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return folder


def _write(
    study: Study, integer: nn.Module, folder: Path, form: str
) -> tuple[Callable[[str], Part], Callable[[Tensor], int]]:
    """Write the model; return what gives each of its layers as the runtime runs it, and what counts those in integers."""
    size = study.clip.preprocess.size
    if form == "torch":
        from qatlab.deploy import torch as program

        file = program.write(integer, folder, size)
        describe(study, integer, folder, file, form)
        parts = program.LayerPrograms(integer)
        return parts.part, lambda images: program.integer_products(program.TorchModel(file), images.numpy())
    file = onnx.write(integer, folder, size)
    models = onnx.LayerModels(file, integer)
    if form == "onnx":
        describe(study, integer, folder, file, form)
        return models.part, lambda _: onnx.integer_products(file)
    representation = openvino.write(file, folder)
    file.unlink()
    describe(study, integer, folder, representation, form)
    return partial(openvino.part, models), lambda _: openvino.OpenVinoModel(representation).integer_products()[1]


def _images(study: Study, entry: EvaluationSet) -> Tensor:
    return study.clip.preprocess.normalize(pool_of(entry).batch(places_of(entry)[:IMAGES]))


def _threshold(study: Study, entry: EvaluationSet, features: Tensor) -> dict[str, Any]:
    """MCM's value that 95 % of an ID set's images reach: what an image has to reach to count as in-distribution."""
    cosines = features @ study.module.heads[entry.source.reference].classes.features.T
    scores = score_images(["mcm"], cosines, served_scale(study), study.mcm_temperature)["mcm"].numpy()
    threshold = float(np.quantile(scores, 0.05, method="lower"))
    return {
        "in_distribution": {
            "score": "mcm",
            "temperature": study.mcm_temperature,
            "threshold": threshold,
            "of": entry.source.name,
            "images": len(scores),
        }
    }


def _require_layers(found: list[LayerParity], integers: int, draft: Path) -> None:
    if failed := [layer for layer in found if not layer.passed]:
        worst = max(failed, key=lambda layer: max(layer.product_error, layer.mismatch))
        raise UserError(
            f"{len(failed)} of {len(found)} layers do not compute what the simulation does: '{worst.layer}' is "
            f"{worst.product_error:.1e} off with {worst.mismatch:.1e} of its input's codes changed (at most {LIMIT:g} each), "
            f"{'in integers' if worst.integer else 'and not in integers'}. {draft / 'parity.csv'} has every layer."
        )
    if integers != len(found):
        raise UserError(
            f"the runtime computes {integers} of {len(found)} layers in integers, the rest in floats: {draft} keeps the "
            "model. Another release of the runtime, or format=, may take them all."
        )


def _require_whole(study: Study, measured: EndToEnd, outside: list[str], draft: Path) -> None:
    if not measured.passed:
        raise UserError(
            f"the integer model's features are {measured.integer:.1e} from the simulation's, which are "
            f"{measured.simulated:.1e} from full precision: more than {FARTHEST:g} times as far. {draft} keeps it."
        )
    if outside:
        raise UserError(
            f"the integer model differs from the simulation by more than sampling explains: {'; '.join(outside[:3])}. "
            f"{draft} keeps it."
        )
    study.say(
        f"  features {measured.integer:.1e} from the simulation's, those {measured.simulated:.1e} from full precision; "
        f"{100 * measured.agreement:.1f} % of the answers are the simulation's"
    )
