"""Quantize a CLIP image encoder, adapt it, and store what became of its accuracy, calibration and OOD detection.

python -m qatlab.fit recipe=light_qat
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from qatlab import cli
from qatlab.config import Config
from qatlab.errors import UserError

if TYPE_CHECKING:
    from qatlab.results import Run


def fit(config: Config, recipe: str) -> Run:
    """Return the finished run: every stage computed or read back, its rows, curves and pictures in ``run.folder``."""
    # Torch and all are loaded here: --help, tab completion and a mistake in the options answer at once.
    from qatlab.evaluation import View
    from qatlab.quantizing import quantize_towers
    from qatlab.report import conclude
    from qatlab.results import Run, Took
    from qatlab.stopping import StopSignals
    from qatlab.study import Study
    from qatlab.table_files import check_format

    started = time.monotonic()
    check_format(config.format)
    if config.checkpoint is not None:
        raise UserError(
            f"checkpoint={config.checkpoint} names a run to score, with qatlab.evaluate; weights to start from are "
            "model.checkpoint=."
        )
    with Run(config, recipe) as run, StopSignals() as stop:
        run.describe(recipe)
        study = Study(config, run, recipe, stop)
        with study.together():
            study.say(study.plan())
            last = study.stages[-1]

            if "fp32" in study.stages and last != "fp32":
                study.score([View("fp32", study.module.logit_scale)])
            if "quantized" in study.stages:
                quantize_towers(study)
                if last != "quantized":
                    study.score([View("quantized", study.module.logit_scale)])
            if config.fit.steps:
                study.train()
            refitted = study.refit()
            views = [View(last, study.module.logit_scale), *([refitted] if refitted else [])]
            study.score(views)
            conclude([study])
            run.finish(Took(time.monotonic() - started, study.took.written))
    return run


def main() -> None:
    """Run ``fit`` with the options of the command line."""
    cli.main(fit)


if __name__ == "__main__":
    main()
