"""Score an unquantized model, or finished runs side by side, on any suite.

python -m qatlab.evaluate model=vit_b16_openai suite=paper suite.root=/data
python -m qatlab.evaluate checkpoint=runs/<id> suite=paper suite.root=/data
python -m qatlab.evaluate "checkpoint=[runs/<id>,runs/<id>]" suite=paper suite.root=/data
python -m qatlab.evaluate "checkpoint=[runs/<id>,runs/<id>/export/onnx]" suite=paper suite.root=/data
python -m qatlab.evaluate suite=paper suite.root=/data suite.check=true        # what is there, and what is missing
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from qatlab import cli
from qatlab.config import Config

if TYPE_CHECKING:
    from qatlab.evaluation import View
    from qatlab.results import Run
    from qatlab.study import Study


def evaluate(config: Config, recipe: str) -> list[Run]:
    """Return the runs whose rows were completed: those of ``checkpoint=``, else one of the unquantized model.

    With suite.check there is none: what of the suite is there is printed, and the process ends with 2 where not all is.
    """
    # Torch and all are loaded here: --help, tab completion and a mistake in the options answer at once.
    from qatlab.data.check import check
    from qatlab.deploy.tower import DeployedTower
    from qatlab.finished import asked_of
    from qatlab.report import conclude
    from qatlab.scoring import Scoring, announce, fill
    from qatlab.stopping import StopSignals
    from qatlab.study import Study
    from qatlab.table_files import check_format

    check_format(config.format)
    if config.suite.check:
        check(config)
        return []
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        studies: list[Study] = []
        asked = asked_of(config, recipe)
        towers = [[DeployedTower(folder) for folder in each.exports] for each in asked]
        for each in asked:
            stack.enter_context(each.run)
            each.run.describe(each.recipe)
            studies.append(Study(each.config, each.run, each.recipe, stop, studies[0] if studies else None))
        with studies[0].together():
            stored = config.checkpoint is not None
            for study in studies:
                read_back(study, stored)
            simulated = [study for study, each in zip(studies, asked, strict=True) if each.simulated]
            if refits := [scoring for study in simulated if (scoring := study.to_refit())]:
                fill(refits)  # the calibration images too are decoded once for all of them
            scorings = []
            for study, own in zip(studies, towers, strict=True):
                views = _views(study, stored) if study in simulated else []
                scorings.append(Scoring(study, [*views, *study.serve(own)]))
            if left := [scoring for scoring in scorings if scoring.suite.sets]:
                announce(left)
                fill(left)
            for scoring in left:
                scoring.store()
            conclude(studies)
    return [study.run for study in studies]


def read_back(study: Study, stored: bool) -> None:
    """Read the stages of a run."""
    from qatlab.quantizing import quantize_towers

    if stored:
        study.require_finished()
    study.say(study.plan())
    if "quantized" in study.stages:
        quantize_towers(study)
    if study.config.fit.steps:
        study.train()


def _views(study: Study, stored: bool) -> list[View]:
    """Return what a model is scored under."""
    from qatlab.evaluation import View

    refitted = study.refit()
    stage = study.stages[-1] if stored else "fp32"
    return [View(stage, study.module.logit_scale), *([refitted] if refitted else [])]


def main() -> None:
    """Run ``evaluate`` with the options of the command line."""
    cli.main(evaluate, needs_recipe=False)


if __name__ == "__main__":
    main()
