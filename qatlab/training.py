"""The training stage of a run: from its last whole checkpoint to the last step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

from qatlab.callbacks import Checkpoints, Curves, Profile
from qatlab.checkpoints import last_whole, require_same
from qatlab.data import CaptionModule, SkipCounter
from qatlab.results import identity

if TYPE_CHECKING:
    from qatlab.study import Study


def train(study: Study) -> SkipCounter:
    """Return what was skipped of the training data; the student is trained, from its last checkpoint on where there is one."""
    module, trainer = study.module, study.trainer
    trainer.callbacks += _callbacks(study)  # type: ignore[attr-defined]
    path, step = _last_checkpoint(study)
    study.say(f"training{f' on from {path.name}' if path else ''}")
    batches = _batches(study, step)
    module.facts = study.facts(study.stages[-1])
    trainer.fit(module, datamodule=batches, ckpt_path=path and str(path), weights_only=True)
    # Looped samples are the same on every rank, streamed ones are divided.
    return batches.skipped if study.config.fit.unique_samples else batches.skipped.gathered()


def _callbacks(study: Study) -> list[L.Callback]:
    fit, folder = study.config.fit, study.run.folder
    saving = Checkpoints(folder / "checkpoints", fit.checkpoint_every, fit.eval_every, study.stop, _made_with(study))
    return [Curves(study.few_images), saving, *([Profile(folder)] if fit.profile else [])]


def _batches(study: Study, start: int) -> CaptionModule:
    fit, probes = study.config.fit, []
    if study.probe is not None:
        study.module.probed = study.probe.sets
        probes = study.loaders(study.probe)
    return CaptionModule(
        study.data, study.clip.preprocess, study.clip.tokenizer, fit.batch_size, fit.unique_samples, fit.workers,
        study.config.seed, fit.steps, start, probes,
    )  # fmt: skip


def _made_with(study: Study) -> dict[str, Any]:
    """Return what a checkpoint must have been made with for training to go on from it."""
    return {**identity(study.config), "the training data": study.data.fingerprint()}


def _last_checkpoint(study: Study) -> tuple[Path | None, int]:
    """Return the last whole checkpoint, None without one, and its step; a probe that was cut short behind it is made up for."""
    path, content, damaged = last_whole(study.run.folder / "checkpoints")
    for i, (broken, reason) in enumerate(damaged.items(), start=1):
        onward = f": going on from {path.name if path else 'the start'}" if i == len(damaged) else ""
        study.say(f"{broken} is damaged ({reason}){onward}")
        if study.trainer.is_global_zero:  # out of the way, else it would count as one of the two that are kept
            broken.rename(broken.with_suffix(".damaged"))
    if path is None:
        return None, 0
    require_same(path, content, _made_with(study))
    step, every = content["global_step"], study.config.fit.eval_every
    probed = {row["step"] for row in study.run.rows() if row["stage"] == "probe"}
    if study.probe is not None and every and step % every == 0 and step not in probed:
        study.say(f"step {step}: the probe that was cut short")
        module = study.module
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}, module.logit_scale
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"])
        study.probe_again(step)
        # Training restores the checkpoint itself, and measures how far the scales have moved from here.
        module.load_state_dict(before[0])
        module.logit_scale = before[1]
    return path, step
