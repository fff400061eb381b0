"""Score an unquantized model, or finished runs side by side, on any suite.

python -m qatlab.evaluate model=vit_b16_openai suite=paper suite.root=/data
python -m qatlab.evaluate checkpoint=runs/<id> suite=paper suite.root=/data
python -m qatlab.evaluate "checkpoint=[runs/<id>,runs/<id>]" suite=paper suite.root=/data
python -m qatlab.evaluate suite=paper suite.root=/data suite.check=true        # what is there, and what is missing
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from qatlab import cli
from qatlab.config import Config, FitConfig, ObjectiveConfig, OptimConfig, QuantConfig, load

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
    from qatlab.exports import check_format
    from qatlab.report import conclude
    from qatlab.scoring import Scoring, announce, fill
    from qatlab.stopping import StopSignals
    from qatlab.study import Study

    check_format(config.format)
    if config.suite.check:
        check(config)
        return []
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        studies: list[Study] = []
        for own, run, name in _runs(config, recipe):
            stack.enter_context(run)
            run.describe(name)
            studies.append(Study(own, run, name, stop, studies[0] if studies else None))
        with studies[0].together():
            stored = config.checkpoint is not None
            for study in studies:
                _read_back(study, stored)
            if refits := [scoring for study in studies if (scoring := study.to_refit())]:
                fill(refits)  # the calibration images too are decoded once for all of them
            scorings = [Scoring(study, _views(study, stored)) for study in studies]
            if left := [scoring for scoring in scorings if scoring.suite.sets]:
                announce(left)
                fill(left)
            for scoring in left:
                scoring.store()
            conclude(studies)
    return [study.run for study in studies]


def _runs(config: Config, recipe: str) -> list[tuple[Config, Run, str]]:
    """Return the options, run and recipe of each model to score."""
    from qatlab.results import Run

    if config.checkpoint is None:
        # Nothing of how a model would be quantized or trained reaches the one that is scored as it is.
        config.quant, config.objective, config.optim = QuantConfig(), ObjectiveConfig(), OptimConfig()
        config.fit = FitConfig(workers=config.fit.workers)
        return [(config, Run(config, recipe), recipe)]
    folders = [config.checkpoint] if isinstance(config.checkpoint, str) else list(config.checkpoint)
    found = []
    for folder in _once(folders):
        stored, name = load(folder / "config.yaml")
        run = Run(stored, name, folder)  # before the options change: the id is that of the model as it was trained
        stored.suite, stored.trainer, stored.callbacks = config.suite, config.trainer, config.callbacks
        stored.wandb, stored.format, stored.fit.workers = config.wandb, config.format, config.fit.workers
        found.append((stored, run, name))
    return found


def _once(folders: list[str]) -> list[Path]:
    """Return the folders in their order, one that several paths lead to once, as it is named first."""
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        found.setdefault(folder.expanduser().resolve(), folder.expanduser())
    return list(found.values())


def _read_back(study: Study, stored: bool) -> None:
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
