"""Score an unquantized model, or a finished run, on any suite.

python -m qatlab.evaluate model=vit_b16_openai suite=folders suite.root=/data
python -m qatlab.evaluate checkpoint=runs/<id> suite=folders suite.root=/data
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qatlab import cli
from qatlab.config import Config, FitConfig, ObjectiveConfig, OptimConfig, QuantConfig, load

if TYPE_CHECKING:
    from qatlab.results import Run


def evaluate(config: Config, recipe: str) -> Run:
    """Return the run whose rows were completed: that of ``checkpoint=``, else one of the unquantized model."""
    # Torch and all are loaded here: --help, tab completion and a mistake in the options answer at once.
    from qatlab.evaluation import View
    from qatlab.quantizing import quantize_towers
    from qatlab.report import conclude
    from qatlab.results import Run
    from qatlab.stopping import StopSignals
    from qatlab.study import Study

    if config.checkpoint is not None:
        folder = Path(config.checkpoint)
        stored, recipe = load(folder / "config.yaml")
        run = Run(stored, recipe, folder)  # before the options change: the id is that of the model as it was trained
        stored.suite, stored.trainer, stored.callbacks = config.suite, config.trainer, config.callbacks
        stored.wandb = config.wandb
        config = stored
    else:
        folder = None
        # Nothing of how a model would be quantized or trained reaches the one that is scored as it is.
        config.quant, config.objective, config.optim = QuantConfig(), ObjectiveConfig(), OptimConfig()
        config.fit = FitConfig(workers=config.fit.workers)
        run = Run(config, recipe)
    with run, StopSignals() as stop:
        run.describe(recipe)
        study = Study(config, run, recipe, stop)
        with study.together():
            if folder:
                study.require_finished()
            if study.trainer.is_global_zero:
                print(study.plan(), flush=True)
            if "quantized" in study.stages:
                quantize_towers(study)
            if config.fit.steps:
                study.train()
            refitted = study.refit()
            stage = study.stages[-1] if folder else "fp32"
            study.score([View(stage, study.module.logit_scale), *([refitted] if refitted else [])], config.fit.steps)
            conclude(study)
    return run


def main() -> None:
    """Run ``evaluate`` with the options of the command line."""
    cli.main(evaluate, needs_recipe=False)


if __name__ == "__main__":
    main()
