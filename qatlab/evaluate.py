"""Score an unquantized model, or finished runs side by side, on any suite.

python -m qatlab.evaluate model=vit_b16_openai suite=paper suite.root=/data
python -m qatlab.evaluate checkpoint=runs/<id> suite=paper suite.root=/data
python -m qatlab.evaluate "checkpoint=[runs/<id>,runs/<id>]" suite=paper suite.root=/data
python -m qatlab.evaluate "checkpoint=[runs/<id>,runs/<id>/export/onnx]" suite=paper suite.root=/data
python -m qatlab.evaluate suite=paper suite.root=/data suite.check=true        # what is there, and what is missing
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from qatlab import cli
from qatlab.config import Config

if TYPE_CHECKING:
    from qatlab.results.run import Run


def evaluate(config: Config, recipe: str) -> list[Run]:
    """Return the runs whose rows were completed: those of ``checkpoint=``, else one of the unquantized model.

    With suite.check there is none: what of the suite is there is printed, and the process ends with 2 where not all is.
    """
    # Torch and all are loaded here: --help, tab completion and a mistake in the options answer at once.
    from qatlab.core.signals import StopSignals
    from qatlab.deploy.tower import DeployedTower
    from qatlab.reports.files import check_shown
    from qatlab.results.completed import Took
    from qatlab.results.stages import FP32
    from qatlab.stages.experiment import Experiment
    from qatlab.stages.opening import open_experiment, together
    from qatlab.stages.reopen import add_exports, reopen
    from qatlab.stages.requested import requested_runs
    from qatlab.stages.score import score
    from qatlab.stages.summary import conclude
    from qatlab.stages.temperature import refit, refitted
    from qatlab.suites.check import check
    from qatlab.suites.source import View

    started = time.monotonic()
    check_shown(config)
    if config.suite.check:
        check(config)
        return []
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        requested = requested_runs(config, recipe)
        # Exports first: one that is damaged, or inexact on this machine, ends the command before a model is loaded.
        towers: list[list[DeployedTower]] = []
        for each in requested:
            towers.append([DeployedTower(folder, trust=config.trust) for folder in each.exports])
        experiments: list[Experiment] = []
        for each in requested:
            stack.enter_context(each.run)
            each.run.describe(each.recipe)
            # A machine starts one group of processes: the runs after the first share it.
            shares = experiments[0].processes if experiments else None
            experiments.append(open_experiment(each.config, each.run, each.recipe, stop, shares))
        with together(experiments):
            is_stored = config.checkpoint is not None
            for experiment in experiments:
                reopen(experiment, finished=is_stored)
            simulated = [one for one, each in zip(experiments, requested, strict=True) if each.simulated]
            refit(simulated)  # all at once: the calibration images are then decoded once for all runs
            work = []
            for experiment, exports in zip(experiments, towers, strict=True):
                views: list[View] = []
                if experiment in simulated:
                    stage = experiment.stages[-1] if is_stored else FP32
                    views.append(experiment.view(stage))
                    if (view := refitted(experiment)) is not None:
                        views.append(view)
                work.append((experiment, [*views, *add_exports(experiment, exports)]))
            score(work)  # all at once here too: each image of the suite is decoded once
            conclude(experiments)
            if not is_stored:  # of a stored run only ``fit`` knows that all of its stages are scored
                experiments[0].run.finish(Took(time.monotonic() - started, experiments[0].work.written))
    return [experiment.run for experiment in experiments]


def main() -> None:
    """Run ``evaluate`` with the options of the command line."""
    cli.main(evaluate)


if __name__ == "__main__":
    main()
