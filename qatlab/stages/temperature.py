"""The refit of the logit scale: on labelled calibration images, or without labels on the full-precision model's answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatlab.callbacks import Temperature
from qatlab.core.checksums import read_json, write_json
from qatlab.core.damage import whole
from qatlab.core.hashing import digest
from qatlab.models.zeroshot import encode_text
from qatlab.results.latest import at_bound, refit_name
from qatlab.results.rowfile import FIT, Row
from qatlab.results.run import Run
from qatlab.stages.experiment import Experiment
from qatlab.stages.score import Scoring, embed_missing
from qatlab.suites.heads import Head
from qatlab.suites.source import View
from qatlab.training.objectives import teacher_probabilities


def refit(experiments: Sequence[Experiment]) -> None:
    """Fit the logit scales that are not fitted yet, and store a row of each fit.

    Each calibration image is decoded once for all experiments. Collective.
    """
    left = [each for each in experiments if each.evaluations.temperature is not None and _fit_row(each) is None]
    # {run id: scoring of the calibration images}; one pass embeds the images for all runs.
    calibrating = {each.run.id: _calibrating(each) for each in left if _source(each) == "calibration"}
    if calibrating:
        embed_missing(list(calibrating.values()))
    for each in left:
        _fit(each, calibrating.get(each.run.id))


def refitted(experiment: Experiment) -> View | None:
    """Return the view of the refitted logit scale; None without a refit, and for a refit that cannot be used.

    A fit that ended at its bound cannot be used, because its images do not determine the scale.
    """
    row = _fit_row(experiment)
    if row is None:
        return None
    scale, run = row["logit_scale"], experiment.run
    if at_bound(row):
        experiment.processes.say(
            f"the refit of the temperature ended at its bound, s = {scale:g}, and is not used: {row['n']} images do not "
            f"tell the scale, which stays s = {experiment.towers.student.logit_scale:.4g}"
        )
        return None
    # scales.json may have been damaged or deleted. Then it is written again from the row, which holds the same scale.
    if stored_scales(run).get(refit_name(row)) != scale:
        store_scale(run, refit_name(row), scale)
    return _view(experiment, row)


def scale_to_export(experiment: Experiment) -> View:
    """Return the view whose logit scale an export serves: the refit on this suite, or without a usable refit the student's."""
    row = _fit_row(experiment)
    if row is not None and not at_bound(row):
        return _view(experiment, row)
    return experiment.view(experiment.stages[-1])


def definition(experiment: Experiment) -> str:
    """Return the definition of the data that the scale is fitted on.

    It is the definition of the calibration set or a hash of the class prompts; "" for a refit on captions.
    """
    if _source(experiment) == "proxy" and (head := _class_head(experiment)) is not None:
        return digest(json.dumps(head.described()))[:8]
    calibration = experiment.suite.only(roles={"calibration"}).sets
    if not calibration or _source(experiment) != "calibration":
        return ""
    return calibration[0].source.definition


def stored_scales(run: Run) -> dict[str, float]:
    """Return {name: logit scale} of scales.json, without scales at a bound, which earlier releases have stored."""
    unused = {refit_name(row) for row in run.rows() if at_bound(row)}
    return {name: scale for name, scale in _scales(run).items() if name not in unused}


def store_scale(run: Run, name: str, scale: float) -> None:
    """Add a logit scale to scales.json of the run."""
    scales = _scales(run) | {name: scale}
    run.write("scales.json", lambda path: write_json(path, scales))


def _scales(run: Run) -> dict[str, float]:
    """Return {name: logit scale} of scales.json, {} where the file is missing or damaged."""
    return whole(run.folder / "scales.json", _read_scales) or {}


def _read_scales(path: Path) -> dict[str, float]:
    """Return {name: logit scale} of a file; raises ValueError for a value that is no positive number."""
    found = read_json(path)
    for name, value in found.items():
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}")
    return found


def _source(experiment: Experiment) -> str | None:
    """Return the data that the refit uses, "calibration" or "proxy"; None without a refit."""
    temperature = experiment.evaluations.temperature
    return temperature.source if temperature else None


def _fit_row(experiment: Experiment) -> Row | None:
    """Return the stored row of the refit on this suite, None where it is not stored yet or not asked for."""
    temperature = experiment.evaluations.temperature
    if temperature is None:
        return None
    name = "/".join(filter(None, [temperature.stage, definition(experiment)]))
    return next((row for row in experiment.run.rows() if row["score"] == FIT and refit_name(row) == name), None)


def _view(experiment: Experiment, row: Row) -> View:
    """Return the view of the refitted scale in a row of the fit."""
    return View(row["stage"], row["logit_scale"], definition(experiment), experiment.stages[-1])


def _calibrating(experiment: Experiment) -> Scoring:
    """Return a scoring that embeds the calibration images with the student."""
    view = View(experiment.stages[-1], experiment.towers.student.logit_scale)
    scoring = Scoring(experiment, [view], experiment.suite.calibration)
    experiment.processes.say(f"refitting the temperature on {scoring.suite.images} calibration images")
    return scoring


def _fit(experiment: Experiment, calibrating: Scoring | None) -> None:
    """Fit the logit scale of one run and store its row."""
    temperature, current = experiment.evaluations.temperature, experiment.towers.student.logit_scale
    assert temperature is not None
    if calibrating is not None:
        # Only the first process fits, because all processes must go on with the same scale, to the last bit.
        fit = experiment.processes.agree(lambda: temperature.fit(*calibrating.labelled(), current))
    else:
        fit = _fit_by_teacher(experiment, temperature, current)
    row = temperature.row(fit, definition(experiment)) | experiment.facts(experiment.stages[-1])
    experiment.run.append([row | {"step": experiment.config.fit.steps, "prompts": None}])


def _fit_by_teacher(experiment: Experiment, temperature: Temperature, current: float) -> Any:
    """Return a fit without labels: its targets are the probabilities that the full-precision model gives the texts."""
    towers, samples, head = experiment.towers, experiment.captions.samples, _class_head(experiment)
    against = "" if head is None else f" and {len(head.classes.names)} class prompts"
    experiment.processes.say(
        f"refitting the temperature on {len(samples.images)} images of {experiment.captions.data.name}{against}, no labels"
    )
    texts = _texts(experiment, samples.captions)
    student = _features(experiment, samples.images, towers.student.visual)
    teacher = _features(experiment, samples.images, towers.full.visual)
    return temperature.fit(student @ texts.T, teacher_probabilities(teacher, texts, current), current)


def _class_head(experiment: Experiment) -> Head | None:
    """Return the head whose class prompts replace captions: that of the first ID set; None with captions or a text bank."""
    if experiment.captions.captioned or experiment.towers.student.bank is not None:
        return None
    return next(iter(experiment.towers.student.heads.values()))


def _texts(experiment: Experiment, captions: list[str]) -> Tensor:
    """Return the unit features (T, D) of the texts that the refit compares images with."""
    bank, head = experiment.towers.student.bank, _class_head(experiment)
    # The embeddings of a text bank replace captions, so that no text tower is needed.
    if bank is not None:
        return bank
    return encode_text(experiment.towers.class_clip, captions) if head is None else head.classes.features.cpu()


@torch.no_grad()
def _features(experiment: Experiment, images: Tensor, visual: nn.Module) -> Tensor:
    """Return the unit features (n, D) of uint8 ``images`` (n, 3, S, S), on the CPU."""
    device, student = experiment.processes.device, experiment.towers.student
    student.to(device).eval()
    visual.to(device)
    parts = images.split(experiment.config.suite.batch_size)
    return torch.cat([student.embed(part.to(device), visual).cpu() for part in parts])
