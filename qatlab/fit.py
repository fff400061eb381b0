"""Quantize a CLIP image encoder, adapt it, and store what became of its accuracy, calibration and OOD detection.

python -m qatlab.fit recipe=light_qat
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from qatlab import cli
from qatlab.config import Config
from qatlab.core.errors import UserError

if TYPE_CHECKING:
    from qatlab.results.run import Run


def fit(config: Config, recipe: str) -> Run:
    """Return the finished run: every stage computed or read back, its rows, curves and pictures in ``run.folder``."""
    # Torch and all are loaded here: --help, tab completion and a mistake in the options answer at once.
    from qatlab.core.signals import StopSignals
    from qatlab.reports.files import check_shown
    from qatlab.results.completed import Took
    from qatlab.results.run import Run
    from qatlab.results.stages import FP32, QUANTIZED
    from qatlab.stages.loggers import check_loggers
    from qatlab.stages.opening import open_experiment, together
    from qatlab.stages.outline import outline
    from qatlab.stages.quantize import quantize_towers
    from qatlab.stages.score import score
    from qatlab.stages.summary import conclude, suggest
    from qatlab.stages.temperature import refit, refitted
    from qatlab.stages.train import train

    started = time.monotonic()
    check_shown(config)
    check_loggers(config)
    if config.checkpoint is not None:
        raise UserError(
            f"checkpoint={config.checkpoint} names a run to score, with qatlab.evaluate; weights to start from are "
            "model.checkpoint=."
        )
    with Run(config, recipe) as run, StopSignals() as stop:
        run.describe(recipe)
        experiment = open_experiment(config, run, recipe, stop)
        stages = experiment.stages
        with together([experiment]):
            experiment.processes.say(outline(experiment))
            # Each stage but the last is scored before the next one changes the towers; the last waits for the refit, so that
            # both of its scales are scored in one pass.
            if FP32 in stages[:-1]:
                score([(experiment, [experiment.view(FP32)])])
            if QUANTIZED in stages:
                quantize_towers(experiment)
                if stages[-1] != QUANTIZED:
                    score([(experiment, [experiment.view(QUANTIZED)])])
            if config.fit.steps:
                train(experiment)
            refit([experiment])
            views = [experiment.view(stages[-1])]
            if (view := refitted(experiment)) is not None:
                views.append(view)
            score([(experiment, views)])
            conclude([experiment])
            suggest(experiment)
            # Behind everything else: a sweep counts a run as finished by what this writes.
            run.finish(Took(time.monotonic() - started, experiment.work.written))
    return run


def main() -> None:
    """Run ``fit`` with the options of the command line."""
    cli.main(fit)


if __name__ == "__main__":
    main()
