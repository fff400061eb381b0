"""The outline of a run: a few lines on what is left to compute."""

from __future__ import annotations

from qatlab.models.quantized import TRAINED
from qatlab.results.rowfile import DEFINITION_VERSION
from qatlab.results.rows import definition_version
from qatlab.results.run import unfinished_beside
from qatlab.stages.experiment import Experiment
from qatlab.suites.pools import distinct
from qatlab.suites.source import View
from qatlab.suites.suite import Suite


def outline(experiment: Experiment) -> str:
    """Return a text of a few lines: what is left to compute, and how much of the products is rounded.

    Raises UserError where something is left to compute and the run folder cannot be written to.
    """
    run, model = experiment.run, experiment.towers.full.facts
    named = f"{model['model']} ({model['pretrained'] or model['weights']}, {model['activation']})"
    title = f"{experiment.recipe} {run.id}: {' -> '.join(experiment.stages)}, {named}"
    missing = {stage: _missing(experiment, stage) for stage in experiment.stages}
    left = [*_scoring(missing), *_training(experiment), *_known_anew(experiment, missing)]
    if left:
        run.require_writable(f"there is something left to compute ({left[0].strip()})")
    notes = [f"  positional embeddings of the weights interpolated: {model['resized']}"] if model["resized"] else []
    notes += [f"  {line}" for line in experiment.coverage]
    notes += [f"  {line}" for line in unfinished_beside(run, experiment.recipe)]
    return "\n".join([title, *(left or ["  nothing left to compute"]), *notes])


def _missing(experiment: Experiment, stage: str) -> Suite:
    """Return the suite reduced to the sets that lack rows of a stage."""
    # Any logit scale serves here, because it does not decide which rows exist: the scale before training is known.
    views = [View(stage, experiment.towers.student.logit_scale)]
    return experiment.evaluations.missing(experiment.suite, views, experiment.needs.available, experiment.run)


def _scoring(missing: dict[str, Suite]) -> list[str]:
    """Return a line on the number of images to score under each stage, [] where nothing is left to score."""
    counts = {stage: distinct(suite.sets) for stage, suite in missing.items()}
    images = [f"{count} images {stage}" for stage, count in counts.items() if count]
    return [f"  scoring: {' + '.join(images)}"] if images else []


def _training(experiment: Experiment) -> list[str]:
    """Return a line on the training, [] where no training is asked for or left."""
    fit = experiment.config.fit
    if not fit.steps or (experiment.run.folder / TRAINED).exists():
        return []
    unique = f"{fit.unique_samples} looped samples" if fit.unique_samples else "streamed samples"
    data, objective = experiment.captions.data.name, experiment.towers.student.objective
    return [f"  training: {fit.steps} steps x {fit.batch_size} images of {data}, {unique}, {objective}"]


def _known_anew(experiment: Experiment, missing: dict[str, Suite]) -> list[str]:
    """Return a line on sets that are scored again only because the release now identifies them by content, [] without any."""
    names: set[str] = set()
    for suite in missing.values():
        names |= {entry.source.name for entry in suite.sets}
    # {set: newest version of a definition in its rows}; where this is an old version, an earlier release scored the
    # set.
    versions: dict[str, int] = {}
    for row in experiment.run.rows():
        versions[row["dataset"]] = max(versions.get(row["dataset"], 0), definition_version(row))
    # Rendered sets are left out: they are identified by how they are drawn, in every version.
    again = [entry.source.name for entry in experiment.suite.sets if not entry.rendered and entry.source.name in names]
    again = [name for name in again if versions.get(name, DEFINITION_VERSION) < DEFINITION_VERSION]
    if not again:
        return []
    return [f"  sets are known by the content of their images now: rows are added once of {', '.join(again)}"]
