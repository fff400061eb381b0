"""Score an unquantized model, or a finished run, on any suite.

python -m qatlab.evaluate model=vit_b16_openai suite=folders suite.root=/data
python -m qatlab.evaluate checkpoint=runs/<id> suite=folders suite.root=/data
"""

from __future__ import annotations

from pathlib import Path

from qatlab import cli
from qatlab.config import Config, ObjectiveConfig, QuantConfig, load
from qatlab.evaluation import View
from qatlab.report import conclude
from qatlab.results import Run
from qatlab.study import Study


def evaluate(config: Config, recipe: str) -> Run:
    """Return the run whose rows were completed: that of ``checkpoint=``, else one of the unquantized model."""
    if config.checkpoint is not None:
        return _evaluate_run(config, Path(config.checkpoint))
    config.quant, config.objective, config.fit.steps = QuantConfig(), ObjectiveConfig(), 0
    with Run(config, recipe) as run:
        run.describe(recipe)
        study = Study(config, run, recipe)
        print(study.plan(), flush=True)
        refitted = study.refit()
        study.score([View("fp32", study.module.logit_scale), *([refitted] if refitted else [])], step=0)
        conclude(study)
    return run


def _evaluate_run(config: Config, folder: Path) -> Run:
    """Add the suite's rows to the run in ``folder``, under its last stage and its refitted logit scale."""
    stored, recipe = load(folder / "config.yaml")
    stored.suite, stored.trainer, stored.callbacks, stored.wandb = (
        config.suite,
        config.trainer,
        config.callbacks,
        config.wandb,
    )
    with Run(stored, recipe, folder) as run:
        study = Study(stored, run, recipe)
        print(study.plan(), flush=True)
        if "quantized" in study.stages:
            study.quantize()
        if stored.fit.steps:
            study.train()
        refitted = study.refit()
        study.score(
            [View(study.stages[-1], study.module.logit_scale), *([refitted] if refitted else [])], stored.fit.steps
        )
        conclude(study)
    return run


def main() -> None:
    """Run ``evaluate`` with the options of the command line."""
    cli.main(evaluate, needs_recipe=False)


if __name__ == "__main__":
    main()
