"""The finished runs and exports that ``checkpoint=`` names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qatlab.config import Config, FitConfig, ObjectiveConfig, OptimConfig, QuantConfig, load
from qatlab.config.blocks import check_blocks
from qatlab.config.trust import require_trusted
from qatlab.core.errors import UserError
from qatlab.core.files import user_path
from qatlab.deploy.contents import ABOUT
from qatlab.results.evaluated import evaluated_run
from qatlab.results.run import Run

WATCHED_BY = "csv"
"""The logger of an evaluation. An evaluation has no curves, so that it must not add to what the run has logged."""


@dataclass
class Requested:
    """A run that ``checkpoint=`` names, with its options.

    ``simulated`` says whether the run itself is scored, ``exports`` are the folders of its exports that are scored.
    """

    config: Config
    run: Run
    recipe: str
    simulated: bool
    exports: list[Path]


def requested_runs(config: Config, recipe: str) -> list[Requested]:
    """Return the runs that ``checkpoint=`` names, each once; without it the run of the unquantized model of ``model=``.

    Raises UserError for an export that was moved away from its run, and for a run that names code which is not trusted.
    """
    if config.checkpoint is None:
        # An unquantized model has no use for options of quantization and training. They are reset, because they would
        # give its run another id.
        config.quant, config.objective, config.optim = QuantConfig(), ObjectiveConfig(), OptimConfig()
        config.fit = FitConfig(workers=config.fit.workers)
        config.logger = WATCHED_BY
        return [Requested(config, evaluated_run(config, recipe), recipe, True, [])]
    folders = [config.checkpoint] if isinstance(config.checkpoint, str) else list(config.checkpoint)
    found: dict[Path, Requested] = {}
    for named in _once(folders):
        # An export is in runs/<id>/export/<format>, two folders below its run.
        exported = (named / ABOUT).exists()
        folder = named.resolve().parents[1] if exported else named
        if (known := found.get(folder.resolve())) is not None:
            # A run that is named by itself and by its exports is scored in one pass over the images.
            known.simulated |= not exported
            known.exports += [named] * exported
            continue
        if exported and not (folder / "config.yaml").exists():
            raise UserError(
                f"checkpoint={named} is an export taken away from its run, whose rows its own would join: name it where it was "
                "made, runs/<id>/export/<format>. qatlab.deploy.load opens it anywhere."
            )
        stored, name, _ = load(folder / "config.yaml")
        run = Run(stored, name, folder)
        # The stored options say how the model was made. The options of this command say on what, how and where to score
        # it.
        stored.suite, stored.trainer, stored.callbacks = config.suite, config.trainer, config.callbacks
        stored.wandb, stored.format, stored.fit.workers = config.wandb, config.format, config.fit.workers
        stored.table, stored.file, stored.threshold = config.table, config.file, config.threshold
        stored.logger = WATCHED_BY
        stored.probabilities, stored.exact = config.probabilities, config.exact
        stored.limits, stored.trust = config.limits, config.trust
        # config.yaml may come from somebody else, so its blocks are checked before any class that they name is built.
        require_trusted(stored, folder / "config.yaml", config.trust)
        check_blocks(stored)
        found[folder.resolve()] = Requested(stored, run, name, not exported, [named] * exported)
    return list(found.values())


def one_run(config: Config, recipe: str, program: str) -> Requested:
    """Return the finished run that ``checkpoint=`` names; raises UserError for none, for several, and for an export."""
    if not isinstance(config.checkpoint, str):
        given = " is missing" if config.checkpoint is None else f"{config.checkpoint} names several"
        raise UserError(f"checkpoint={given}: {program} takes the folder of one finished run, runs/<recipe>-<id>.")
    (asked,) = requested_runs(config, recipe)
    if asked.exports:
        raise UserError(f"checkpoint={config.checkpoint} is an export: {program} takes its run, {asked.run.folder}.")
    return asked


def _once(folders: list[str]) -> list[Path]:
    """Return the folders in their order without repetitions; a folder with several paths keeps the first of them."""
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        found.setdefault(user_path(folder).resolve(), user_path(folder))
    return list(found.values())
