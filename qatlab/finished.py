"""What ``checkpoint=`` names: finished runs and what they were exported to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qatlab.config import Config, FitConfig, ObjectiveConfig, OptimConfig, QuantConfig, load
from qatlab.deploy.runtimes import ABOUT
from qatlab.errors import UserError
from qatlab.results import Run


@dataclass
class Asked:
    """A run of ``checkpoint=`` with its options: whether it is scored itself, and the exports of it that are."""

    config: Config
    run: Run
    recipe: str
    simulated: bool
    exports: list[Path]


def asked_of(config: Config, recipe: str) -> list[Asked]:
    """Return what is asked to be scored, a run once however many of its exports are named."""
    if config.checkpoint is None:
        # Nothing of how a model would be quantized or trained reaches the one that is scored as it is.
        config.quant, config.objective, config.optim = QuantConfig(), ObjectiveConfig(), OptimConfig()
        config.fit = FitConfig(workers=config.fit.workers)
        return [Asked(config, Run(config, recipe), recipe, True, [])]
    folders = [config.checkpoint] if isinstance(config.checkpoint, str) else list(config.checkpoint)
    found: dict[Path, Asked] = {}
    for named in _once(folders):
        exported = (named / ABOUT).exists()
        folder = named.resolve().parents[1] if exported else named
        if (known := found.get(folder.resolve())) is not None:
            known.simulated |= not exported
            known.exports += [named] * exported
            continue
        if exported and not (folder / "config.yaml").exists():
            raise UserError(
                f"checkpoint={named} is an export taken away from its run, whose rows its own would join: name it where it was "
                "made, runs/<id>/export/<format>. qatlab.deploy.load opens it anywhere."
            )
        stored, name = load(folder / "config.yaml")
        run = Run(stored, name, folder)  # before the options change: the id is that of the model as it was trained
        stored.suite, stored.trainer, stored.callbacks = config.suite, config.trainer, config.callbacks
        stored.wandb, stored.format, stored.fit.workers = config.wandb, config.format, config.fit.workers
        stored.probabilities = config.probabilities
        found[folder.resolve()] = Asked(stored, run, name, not exported, [named] * exported)
    return list(found.values())


def one_run(config: Config, recipe: str, program: str) -> Asked:
    """Return the finished run that ``checkpoint=`` names; raises UserError for another number, and for an export."""
    if not isinstance(config.checkpoint, str):
        given = " is missing" if config.checkpoint is None else f"{config.checkpoint} names several"
        raise UserError(f"checkpoint={given}: {program} takes the folder of one finished run, runs/<recipe>-<id>.")
    (asked,) = asked_of(config, recipe)
    if asked.exports:
        raise UserError(f"checkpoint={config.checkpoint} is an export: {program} takes its run, {asked.run.folder}.")
    return asked


def _once(folders: list[str]) -> list[Path]:
    """Return the folders in their order, one that several paths lead to once, as it is named first."""
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        found.setdefault(folder.expanduser().resolve(), folder.expanduser())
    return list(found.values())
