"""Checks of options that contradict each other, the model or the data; they run before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from qatlab.callbacks import Refits, Temperature
from qatlab.config import Config, is_quantized
from qatlab.core.errors import UserError
from qatlab.data.captions.calibration import CalibrationSamples, captioned
from qatlab.data.rendered import RenderedShards, RenderedStream
from qatlab.models.clip import Clip
from qatlab.models.quantized import TEXT, TRAINED, tower_files
from qatlab.stages.evaluations import Evaluations
from qatlab.suites.set_options import for_tiny, is_rendered
from qatlab.suites.suite import Suite


def check_from_scratch(config: Config) -> None:
    """Raise UserError for a training from random weights whose options also ask for quantization."""
    if config.fit.from_scratch and is_quantized(config.quant):
        raise UserError(
            "fit.from_scratch=true trains both towers in full precision: set quant.weight=null and quant.act=null, "
            "and quantize what comes out in a run of its own."
        )


def check_data(config: Config, data: Any, temperature: Temperature | None, folder: Path) -> None:
    """Raise UserError for a suite or ``data`` that does not suit the model or the objective.

    ``folder`` is the folder of the run. Where all towers of the run are already calibrated and trained, nothing reads
    ``data`` any more, and any data are accepted.
    """
    trains = config.fit.steps > 0 and not (folder / TRAINED).exists()
    fits = trains or any(not (folder / name).exists() for name in tower_files(config.quant))
    is_read = fits or (temperature is not None and temperature.source == "proxy")
    told = []
    if config.model.name != "tiny":
        if any(is_rendered(entry) for entry in config.suite.sets.values()):
            told.append(for_tiny(config.model.name))
        if is_read and isinstance(data, (RenderedShards, RenderedStream)):
            told.append(
                f"data={data.name} is the world of model=tiny, no data to calibrate model.name={config.model.name} on: give a "
                "folder of images, data=images data.path=FOLDER, or captioned ones, data=cc3m data.shards=FOLDER."
            )
    if fits and not captioned(data) and (said := _without_captions(config, data.name, trains)):
        told.append(said)
    if told:
        raise UserError(" ".join(told))


def _without_captions(config: Config, name: str, trains: bool) -> str:
    """Return a sentence on an option that needs captions or labels, which the data ``name`` lack; "" without such option."""
    objective = config.objective
    need = [option for option in ("contrastive", "class_cross_entropy") if trains and getattr(objective, option)]
    if trains and objective.kl and not config.data.get("text_bank"):
        need.append("kl")
    if need:
        wanted = "labels" if need[0] == "class_cross_entropy" else "captions"
        return (
            f"objective.{need[0]} needs {wanted}, and the images of {name} have "
            "none: give captioned images (data=cc3m data.shards=FOLDER), or train by objective.feature_mse, or by "
            "objective.kl with data.text_bank=FILE.safetensors:TABLE."
        )
    if TEXT in tower_files(config.quant):
        return (
            f"quant.tower={config.quant.tower} calibrates the text tower on captions, and the images of {name} have none: give "
            "captioned images (data=cc3m data.shards=FOLDER), or set quant.tower=visual."
        )
    return ""


def check_towers(config: Config, clip: Clip, folder: Path, captions: CalibrationSamples) -> None:
    """Raise UserError where the text tower to be quantized does not exist, and where calibration data are missing."""
    files = tower_files(config.quant)
    if TEXT in files and (clip.model is None or clip.text_table is not None):
        raise UserError(
            f"quant.tower={config.quant.tower} needs a text tower that the class prompts go through, and here is "
            f"{'a table of class embeddings (model.text_features)' if clip.text_table else 'only an image tower'}: "
            "set quant.tower=visual."
        )
    if files == [TEXT] and config.fit.steps:
        raise UserError("quant.tower=text leaves nothing to train: set fit.steps=0, or quant.tower=both.")
    # The samples are read now if a tower still has to be calibrated: missing data then end the run here, and not after
    # the full-precision model was scored.
    if any(not (folder / name).exists() for name in files):
        captions.read()


def check_refit(
    temperature: Temperature | None, suite: Suite, captions: CalibrationSamples, clip: Clip, bank: Tensor | None
) -> None:
    """Raise UserError for a refit that has no images or no texts; ``bank`` (K, D) are text features from a file."""
    if temperature is None:
        return
    if temperature.source == "calibration" and not suite.calibration.sets:
        raise UserError(
            "callbacks.temperature needs a set with role: calibration in the suite; add one, or set "
            "callbacks.temperature.source=proxy or callbacks.temperature=null."
        )
    # Images without captions need no text tower: they are compared with the suite's class embeddings, which every model
    # has.
    if temperature.source == "proxy" and captions.captioned and clip.model is None and bank is None:
        raise UserError(
            "callbacks.temperature.source=proxy needs texts, and there is no text tower: give "
            "data.text_bank=FILE.safetensors:TABLE, or set callbacks.temperature=null."
        )


def check_zeroshot(config: Config, clip: Clip, evaluations: Evaluations) -> None:
    """Raise UserError for suite.zeroshot=sigmoid with a model that has no logit bias, and with refits that are for a softmax."""
    if config.suite.zeroshot != "sigmoid":
        return
    if clip.logit_bias is None:
        raise UserError(
            f"suite.zeroshot=sigmoid needs the logit bias of a model that was trained with a sigmoid (SigLIP), and "
            f"{config.model.name} has none here: leave suite.zeroshot at softmax."
        )
    wrong = []
    if evaluations.temperature is not None:
        wrong.append("callbacks.temperature=null")
    if any({*of.kinds} - {"isotonic"} for of in evaluations.fed if isinstance(of, Refits)):
        wrong.append("callbacks.refits.kinds=[isotonic]")
    if wrong:
        raise UserError(
            "suite.zeroshot=sigmoid: temperature and vector scaling refit the logits of a softmax, which sigmoids are not. "
            f"Set {' and '.join(wrong)}."
        )


def require_finished(config: Config, folder: Path) -> None:
    """Raise UserError when a run folder lacks a model that its options ask for, because scoring makes no models."""
    for name in [*tower_files(config.quant), *([TRAINED] if config.fit.steps else [])]:
        if not (folder / name).exists():
            raise UserError(
                f"{folder} has no {name}: the run is not finished. Give its own command again, "
                "`python -m qatlab.fit recipe=...`, and it goes on from where it stopped."
            )
