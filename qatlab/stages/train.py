"""The training stage of a run: it starts at the last whole checkpoint and ends after the last step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from qatlab.callbacks import Checkpoints, Curves, Profile
from qatlab.core.checksums import read_tensors
from qatlab.core.damage import DAMAGES, reason
from qatlab.core.errors import UserError
from qatlab.data import CaptionModule, SkipCounter
from qatlab.models.clip import require_finite
from qatlab.models.quantized import TRAINED, fill, save_quantized
from qatlab.results.stages import PROBE
from qatlab.stages.experiment import Experiment
from qatlab.stages.logged import tell_options
from qatlab.stages.quantize import REPORT_SAMPLES
from qatlab.stages.temperature import store_scale, stored_scales
from qatlab.training.checkpoints import MADE_WITH, last_whole, require_same, require_tensors

# Two keys of the options in a checkpoint. Under HELD the training data are identified by content; under NAMED earlier
# releases identified them by name.
HELD, NAMED = "the content of the training data", "the training data"


def train(experiment: Experiment) -> None:
    """Train the student, from its last checkpoint on if there is one, or read the weights that an earlier process trained."""
    towers, run, student = experiment.towers, experiment.run, experiment.towers.student
    from_scratch = experiment.config.fit.from_scratch
    trained = towers.full.model if from_scratch else student.visual
    assert trained is not None
    if (run.folder / TRAINED).exists():
        fill(trained, _trained(experiment), run.folder / TRAINED)
        known = stored_scales(run).get("logit_scale")
        if known is None and from_scratch:  # scales.json was damaged; the weights include the scale
            student.take_scale(trained.get_parameter("logit_scale"))
        student.logit_scale = known or student.logit_scale
        if from_scratch:
            student.take_bias(trained)
        if known is None:
            store_scale(run, "logit_scale", student.logit_scale)
    else:
        experiment.skipped = _train(experiment)
        # The weights are written last, because the stage counts as finished once their file exists.
        store_scale(run, "logit_scale", student.logit_scale)
        run.write(TRAINED, lambda path: save_quantized(trained, path, towers.model, towers.quant))
    if from_scratch:
        student.encode_classes(towers.full)
    if experiment.processes.first:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # the file of the model now holds the weights


def _trained(experiment: Experiment) -> dict[str, Tensor]:
    """Return the trained weights; raises UserError for a damaged file, because training again may take hours."""
    path = experiment.run.folder / TRAINED
    try:
        tensors = read_tensors(path)[0]
    except DAMAGES as error:
        raise UserError(
            f"{path} is damaged ({reason(error)}): put a copy of it back, or delete it, and the run's own command trains "
            f"it again ({experiment.config.fit.steps} steps) and keeps the rows."
        ) from error
    require_finite(tensors, path)
    return tensors


def _train(experiment: Experiment) -> SkipCounter:
    """Train the student; return the counter of training samples that were skipped because they could not be read."""
    student, trainer = experiment.towers.student, experiment.processes.trainer
    trainer.callbacks += _callbacks(experiment)  # type: ignore[attr-defined]
    # The checkpoint is found before the loaders are made, because they begin behind the samples of its last step.
    path, step = _last_checkpoint(experiment)
    experiment.processes.say(f"training{f' on from {path.name}' if path else ''}")
    tell_options(experiment)
    if path is None and experiment.probe is not None:
        _probe(experiment, 0)
    batches = _batches(experiment, step)
    student.facts = experiment.facts(experiment.stages[-1])
    trainer.fit(student, datamodule=batches, ckpt_path=path and str(path), weights_only=True)
    # Looped samples are the same on every process. Streamed samples differ, so their counts are added over all
    # processes.
    return batches.skipped if experiment.config.fit.unique_samples else batches.skipped.gathered()


def _callbacks(experiment: Experiment) -> list[L.Callback]:
    """Return the callbacks that only training has; Curves is first, because a checkpoint must follow its step's curves."""
    fit, folder = experiment.config.fit, experiment.run.folder
    saving = Checkpoints(
        folder / "checkpoints", fit.checkpoint_every, fit.eval_every, experiment.stop, _made_with(experiment)
    )
    # Curves gets a function, so that images are read only when the first report is made, by the process that makes it.
    curves = Curves(lambda: experiment.captions.normalized(REPORT_SAMPLES))
    return [curves, saving, *([Profile(folder)] if fit.profile else [])]


def _batches(experiment: Experiment, start: int) -> CaptionModule:
    """Return the batches of training from step ``start`` on, with the loaders of its probes."""
    config, clip, probes = experiment.config, experiment.towers.full, []
    if experiment.probe is not None:
        experiment.towers.student.probed = experiment.probe.sets
        probes = experiment.loaders(experiment.probe)
    fit, features = config.fit, experiment.towers.student.batch_features
    assert features is not None
    tokenizer = clip.tokenizer if features.reads_captions else None
    return CaptionModule(
        experiment.captions.data, clip.preprocess, tokenizer, fit.batch_size, fit.unique_samples, fit.workers,
        config.seed, fit.steps, start, probes,
    )  # fmt: skip


def _made_with(experiment: Experiment) -> dict[str, Any]:
    """Return the options and the hash of the data that a checkpoint must have for training to go on from it."""
    return {**experiment.run.identity, HELD: experiment.captions.data.fingerprint()}


def _last_checkpoint(experiment: Experiment) -> tuple[Path | None, int]:
    """Return (path of the last whole checkpoint, its step), or (None, 0) without one.

    Damaged checkpoints are renamed. If the process ended within the probe after the checkpoint, the probe is repeated
    here.
    """
    processes = experiment.processes
    path, content, damaged = last_whole(experiment.run.folder / "checkpoints")
    for i, (broken, why) in enumerate(damaged.items(), start=1):
        # Only the line on the last damaged checkpoint says where training goes on.
        onward = f": going on from {path.name if path else 'the start'}" if i == len(damaged) else ""
        processes.say(f"{broken} is damaged ({why}){onward}")
        if processes.first:  # renamed, because it would count as one of the two checkpoints that are kept
            broken.rename(broken.with_suffix(".damaged"))
    if path is None:
        return None, 0
    then, now = json.loads(content.get(MADE_WITH, "{}")), _made_with(experiment)
    # A checkpoint of an earlier release has the name of its data and no hash. It is accepted by this name, because
    # refusing it would throw away hours of training.
    if (named := then.get(NAMED)) is not None and HELD not in then:
        now = {NAMED: named, **{key: value for key, value in now.items() if key != HELD}}
        processes.say(
            f"{path.name} is of an earlier release, which knew training data by name: it is taken to be the same"
        )
    require_same(path, content, now)
    require_tensors(path, content, experiment.towers.student.kept())
    step, every = content["global_step"], experiment.config.fit.eval_every
    probed = {row["step"] for row in experiment.run.rows() if row["stage"] == PROBE}
    if experiment.probe is not None and every and step % every == 0 and step not in probed:
        processes.say(f"step {step}: the probe that was cut short")
        repeat_probe(experiment, content)
    return path, step


def repeat_probe(experiment: Experiment, checkpoint: dict[str, Any]) -> None:
    """Score the probe's sets with the weights of a checkpoint; afterwards the student has its earlier weights again."""
    student = experiment.towers.student
    # The tensors are cloned, because load_state_dict overwrites the tensors that state_dict returns.
    tensors, scale = {name: tensor.clone() for name, tensor in student.state_dict().items()}, student.logit_scale
    student.on_load_checkpoint(checkpoint)
    student.load_state_dict(checkpoint["state_dict"])
    _probe(experiment, checkpoint["global_step"])
    # Training loads the checkpoint later by itself. Before that the student needs its calibrated scales again, because
    # Curves measures how far scales move from them.
    student.load_state_dict(tensors)
    student.logit_scale = scale


def _probe(experiment: Experiment, step: int) -> None:
    """Score the probe's sets with the present weights of the student; ``step`` is the step of the rows."""
    student, probe = experiment.towers.student, experiment.probe
    assert probe is not None
    student.probed, student.probed_step = probe.sets, step
    student.facts = experiment.facts(experiment.stages[-1])
    experiment.computed = True
    experiment.processes.trainer.validate(student, dataloaders=experiment.loaders(probe), verbose=False)
    student.probed_step = None
