"""The end of experiments: their summary is printed, and loggers get their results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from qatlab.reports.summary import RunSummary, Summary
from qatlab.reports.terminal import show, show_next, show_path
from qatlab.results.latest import basis_of, definition_of, latest, used
from qatlab.results.rowfile import FIT, Row
from qatlab.stages.experiment import Experiment
from qatlab.stages.logged import tell_results
from qatlab.stages.loggers import Wandb
from qatlab.stages.temperature import definition


def conclude(experiments: Sequence[Experiment]) -> None:
    """Print the table of experiments on one suite and the paths of their files; give the results to loggers; wait for W&B."""
    first = experiments[0]
    if not first.processes.first:
        return
    told = summary(experiments)
    show(told)
    # Loggers also get the pictures, which show has just drawn. A run that was finished before gives them nothing again.
    if first.computed:
        tell_results(first, told.runs[0].rows)
    loggers = [logger for logger in first.processes.trainer.loggers if isinstance(logger, Wandb)]
    unsent: list[Path] = []
    for logger in loggers:
        folder = logger.finish()
        if folder is not None:
            unsent.append(folder)
    if (drawn := first.run.folder / "tensorboard").is_dir():
        show_path("TensorBoard", drawn, f"   (look at it: tensorboard --logdir {first.run.folder.parent})")
    for folder in sorted((first.run.folder / "wandb").glob("offline-run-*")):
        if folder not in unsent:
            show_path("W&B (offline)", folder, f"   (upload: wandb sync {quote(str(folder))})")
    for folder in unsent:
        show_path("W&B (not uploaded)", folder, f"   (upload: wandb sync {quote(str(folder))})")


def suggest(experiment: Experiment) -> None:
    """Print the command to try after a run, if its rows suggest one."""
    if experiment.processes.first:
        show_next(asked_rows(experiment))


def summary(experiments: Sequence[Experiment]) -> Summary:
    """Return the summary of experiments that were scored on one suite."""
    first = experiments[0]
    # All experiments have the same suite, so the sets and images that it left out are taken from the first.
    notes = [f"left out: {name}: {why}" for name, why in first.suite.skipped.items()]
    notes += [f"not counted in {name}: {what}" for name, what in first.suite.left_out.items()]
    notes += first.needs.lacking
    runs = [_of_run(experiment) for experiment in experiments]
    shown = first.config
    return Summary(runs, shown.table == "full", shown.format, shown.file, notes, _work(experiments))


def _of_run(experiment: Experiment) -> RunSummary:
    """Return the summary of one experiment."""
    id_sets = [entry.source.name for entry in experiment.suite.sets if entry.source.role == "id"]
    skipped = str(experiment.skipped or experiment.captions.skipped or "")
    return RunSummary(experiment.run, experiment.recipe, asked_rows(experiment), id_sets, experiment.computed, skipped)


def asked_rows(experiment: Experiment) -> list[Row]:
    """Return the stored rows of this experiment's suite, of its refit and of the requested exports.

    Other rows are left out: a run may also have rows of other images under the same names, and of other refits.
    """
    sets = {(entry.source.name, entry.source.definition) for entry in experiment.suite.sets}
    # The basis of a row tells an export from an earlier export of the same stage, and a refit from one on other images.
    bases = {stage: tower.digest for stage, tower in experiment.towers.exports.items()}
    if (temperature := experiment.evaluations.temperature) is not None:
        bases[temperature.stage] = definition(experiment)
    rows = []
    for row in used(experiment.run.rows()):
        is_asked = (row["dataset"], definition_of(row)) in sets
        if is_asked and (row["score"] == FIT or bases.get(row["stage"], basis_of(row)) == basis_of(row)):
            rows.append(row)
    return latest(rows)


def _work(experiments: Sequence[Experiment]) -> str | None:
    """Return "images decoded 96, embedded 192 (96, 96 by encoder); text tower calls 1"; None where nothing was embedded."""
    encoded: Counter[str] = Counter()
    texts = decoded = 0
    for experiment in experiments:
        encoded.update(experiment.work.encoded)
        decoded += experiment.work.decoded
        # full and class_clip are the same object unless the text tower is quantized; by id its calls count only once.
        clips = {id(clip): clip for clip in (experiment.towers.full, experiment.towers.class_clip)}
        texts += sum(clip.text_calls for clip in clips.values())
    if not encoded:
        return None
    each = ", ".join(map(str, encoded.values()))
    return f"images decoded {decoded}, embedded {encoded.total()} ({each} by encoder); text tower calls {texts}"
