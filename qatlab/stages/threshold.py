"""The threshold of an export: the score that an in-distribution image must reach, and how many OOD images reach it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qatlab.config import ThresholdConfig
from qatlab.core.errors import UserError, nearest
from qatlab.core.hashing import file_digest
from qatlab.metrics.ood import ALL_SCORES, inputs_of, score_images
from qatlab.stages.experiment import Experiment
from qatlab.suites.suite import EvaluationSet

SCORES = [name for name in ALL_SCORES if inputs_of([name]) <= {"cosines", "logit_scale"}]
"""The scores that an export can use: those that need only cosines and the logit scale, which a user of the export has."""
FILE = "scores.npz"
OUTSIDE = ("near_ood", "far_ood")

Scores = dict[str, dict[str, np.ndarray]]  # {set: {score: (N,) float64, in rising order}}


def threshold_set(experiment: Experiment) -> EvaluationSet:
    """Return the ID set that ``threshold.set`` names, by default the suite's first; UserError for the name of no ID set."""
    asked = experiment.config.threshold
    inside = {entry.source.name: entry for entry in experiment.suite.sets if entry.source.role == "id"}
    if asked.set is None:
        return next(iter(inside.values()))
    if asked.set not in inside:
        raise UserError(
            f"threshold.set={asked.set} is no ID set of this suite{nearest(asked.set, inside)}; there are {', '.join(inside)}."
        )
    return inside[asked.set]


def write_threshold(
    experiment: Experiment, folder: Path, features: Mapping[str, Tensor], logit_scale: float
) -> dict[str, Any]:
    """Return the entry of export.json on the requested threshold; writes all scores to scores.npz in ``folder``.

    From scores.npz any other threshold can be computed later. ``features`` {set: (N, D)} are unit rows of the exported
    model. The file has an array "<number>.<score>" for every pair of an ID set and a set scored against its classes,
    the ID set itself or one of its OOD sets; "scores" in the returned entry says which number means which pair.
    """
    asked, chosen = experiment.config.threshold, threshold_set(experiment)
    found: dict[str, Scores] = {}
    arrays: dict[str, Any] = {}
    sets: dict[str, Any] = {}
    for entry in experiment.suite.sets:
        if entry.source.role == "id":
            scores = found[entry.source.name] = _scores(experiment, entry, features, logit_scale)
            # Arrays are called by number and not by the names of the sets: a name may contain any sign, so that two
            # names joined by a sign could also be read as two other names.
            numbers = {name: number for number, name in enumerate(scores, start=len(arrays))}
            sets[entry.source.name] = {"classes": entry.source.reference, "arrays": numbers}
            for name, of in scores.items():
                arrays |= {f"{numbers[name]}.{score}": values for score, values in of.items()}
    np.savez_compressed(folder / FILE, allow_pickle=False, **arrays)
    return {
        "score": asked.score,
        "temperature": experiment.evaluations.mcm_temperature,
        **accepting(found[chosen.source.name], chosen.source.name, asked.score, asked.tpr),
        "classes": chosen.source.reference,
        "asked": _command(asked),
        # This checksum is apart from those of the model's files, which identify the model: another threshold does not
        # change the model.
        "scores": {"file": FILE, "sha256": file_digest(folder / FILE), "sets": sets},
    }


def accepting(scores: Scores, inside: str, score: str, tpr: float) -> dict[str, Any]:
    """Return the threshold that at least a share ``tpr`` of the images of ``inside`` reaches, and each set's share above it.

    ``scores`` {set: {score: (N,)}} are those of the ID set ``inside`` and of its OOD sets.
    """
    # method="lower" takes the score of an image instead of a value between two images, so that at least the share
    # ``tpr`` reaches it. The rounding is needed because in floating point 1 - 0.9 is less than 0.1.
    threshold = float(np.quantile(scores[inside][score], round(1 - tpr, 12), method="lower"))
    shares = {name: float((of[score] >= threshold).mean()) for name, of in scores.items()}
    images = {name: len(of[score]) for name, of in scores.items()}
    outside = {name: {"share": shares[name], "images": images[name]} for name in scores if name != inside}
    return {
        "tpr": tpr,
        "threshold": threshold,
        "of": inside,
        "images": images[inside],
        "reached": shares[inside],
        "accepted": outside,
    }


def _scores(
    experiment: Experiment, inside: EvaluationSet, features: Mapping[str, Tensor], logit_scale: float
) -> Scores:
    """Return {set: scores} of the ID set ``inside`` and of its OOD sets, all against the classes of the ID set."""
    classes = experiment.towers.student.heads[inside.source.reference].classes.features
    found: Scores = {}
    for entry in experiment.suite.sets:
        of = entry.source
        if of.name == inside.source.name or (of.role in OUTSIDE and of.reference == inside.source.name):
            scored = score_images(
                SCORES, features[of.name] @ classes.T, logit_scale, experiment.evaluations.mcm_temperature
            )
            found[of.name] = {name: np.sort(values.numpy()) for name, values in scored.items()}
    return found


def _command(asked: ThresholdConfig) -> str:
    """Return the options of the command line that ask for this threshold, "" for the defaults."""
    values = {field.name: (getattr(asked, field.name), field.default) for field in fields(asked)}
    return " ".join(
        shlex.quote(f"threshold.{name}={value}") for name, (value, default) in values.items() if value != default
    )
