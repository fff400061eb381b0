"""A run that an earlier process left: its stored towers are read back, and its exports are added."""

from __future__ import annotations

from collections.abc import Sequence

from qatlab.core.errors import UserError
from qatlab.deploy.tower import DeployedTower
from qatlab.evaluation.score_inputs import needs
from qatlab.results.stages import QUANTIZED
from qatlab.stages.checks import require_finished
from qatlab.stages.experiment import Experiment
from qatlab.stages.outline import outline
from qatlab.stages.quantize import quantize_towers
from qatlab.stages.train import train
from qatlab.suites.source import View


def reopen(experiment: Experiment, finished: bool) -> None:
    """Put the stored towers of a run in place, stage by stage, and calibrate and train what is not stored yet.

    With ``finished`` a missing model raises UserError instead, because scoring makes no models.
    """
    if finished:
        require_finished(experiment.config, experiment.run.folder)
    experiment.processes.say(outline(experiment))
    if QUANTIZED in experiment.stages:
        quantize_towers(experiment, finished=finished)
    if experiment.config.fit.steps:
        train(experiment)


def add_exports(experiment: Experiment, towers: Sequence[DeployedTower]) -> list[View]:
    """Add the integer models that the student was exported to, and return the views that they are scored under.

    Exports give no patch features: from then on the run computes only OOD scores that need none. Each export is scored
    at its own logit scale. Raises UserError for suite.zeroshot=sigmoid and an export that was made for a softmax.
    """
    if not towers:
        return []
    for tower in towers:
        if experiment.is_sigmoid and tower.logit_bias is None:  # its scale may have been refitted for the softmax
            raise UserError(
                f"suite.zeroshot=sigmoid, and the export {tower.stage} of run {experiment.run.id} was made for a softmax: export "
                "the run again with suite.zeroshot=sigmoid, or score it with suite.zeroshot=softmax."
            )
    experiment.towers.exports = {tower.stage: tower for tower in towers}
    scores = experiment.evaluations.scores
    experiment.needs = needs(scores, experiment.towers.full, experiment.suite, towers[0])
    biases = {tower.stage: tower.logit_bias if experiment.is_sigmoid else None for tower in towers}
    return [View(tower.stage, tower.logit_scale, tower.digest, logit_bias=biases[tower.stage]) for tower in towers]
