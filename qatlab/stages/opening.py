"""The opening of an experiment: everything is loaded, built and checked before anything is computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lightning as L
from torch import nn

from qatlab.config import Config, is_quantized
from qatlab.config.blocks import build
from qatlab.core.limits import use_limits
from qatlab.core.signals import StopSignals
from qatlab.data.captions.calibration import CalibrationSamples
from qatlab.data.embedded.sets import CLASS_NAMES
from qatlab.evaluation.score_inputs import needs
from qatlab.models import clip as clips
from qatlab.models.clip import Clip
from qatlab.models.preprocessing import known
from qatlab.models.prompts import prompts
from qatlab.models.quantized import TRAINED, planner, quantized_copy, quantized_text
from qatlab.quant.layers.trainable import prepare_training
from qatlab.quant.quantizers import kernels
from qatlab.results.run import Run
from qatlab.stages.checks import check_data, check_from_scratch, check_refit, check_towers, check_zeroshot
from qatlab.stages.evaluations import Evaluations, scoring_options
from qatlab.stages.experiment import Experiment
from qatlab.stages.faults import Faults
from qatlab.stages.processes import Processes
from qatlab.stages.quantize import covered
from qatlab.stages.towers import RunTowers
from qatlab.stages.trainer import build_trainer, quiet
from qatlab.suites.suite import Suite, build_suite
from qatlab.training.student import Student


def open_experiment(
    config: Config, run: Run, recipe: str, stop: StopSignals, shares: Processes | None = None
) -> Experiment:
    """Return the experiment of a run; raises UserError for options that cannot be built or do not fit each other.

    ``shares`` are the processes of another experiment that is scored together with this one; None starts new ones.
    """
    quiet()
    use_limits(**vars(config.limits))
    L.seed_everything(config.seed, verbose=False)
    check_from_scratch(config)
    evaluations, data = Evaluations.built(config), build(config.data)
    check_data(config, data, evaluations.temperature, run.folder)
    processes = shares or _processes(config, run, recipe, evaluations)
    # A file beside the checkpoint may give the preprocessing. It is copied into the options here, because the run's own
    # model may be read on a machine that does not have this file.
    model = known(config.model, config.fit.from_scratch)
    clip = clips.load(model, config.fit.from_scratch)
    check_zeroshot(config, clip, evaluations)
    if clip.model is not None:
        clip.model.to(processes.device)  # build_suite then encodes the class prompts on this device
    is_trained = (run.folder / TRAINED).exists()
    captions = CalibrationSamples(data, config.quant.calibration_images, config.quant.calibration_seed, clip.preprocess)
    # Missing training data end the run here and not after hours of scoring. A trained run needs no training data any
    # more.
    if config.fit.steps and not is_trained:
        data.prepare()
        if config.fit.unique_samples is not None:
            data.require(config.fit.unique_samples)
    check_towers(config, clip, run.folder, captions)
    planner(config.quant)  # built only for its checks: a mistake in the options of a plan ends the run here
    suite = build_suite(config.suite, clip, scoring_options(config), cache_text=not config.fit.from_scratch)
    probes = config.fit.steps and config.fit.eval_every and not is_trained
    probe = suite.probe(config.suite.probe_sets, config.suite.probe_images) if probes else None
    # The quantized copies are built before anything is scored, so that a rule, a bit-width or kernels that do not fit
    # end the run here.
    visual, text = _quantized_copies(config, clip)
    student = _student(config, clip, suite, getattr(data, "text_bank", None), visual, processes)
    towers = RunTowers(
        model=model,
        full=clip,
        student=student,
        class_clip=clip,
        asked=config.quant,
        quant=config.quant,
        from_scratch=config.fit.from_scratch,
        precision=str(processes.trainer.precision),
        device=processes.device.type,
    )
    available = needs(evaluations.scores, clip, suite)
    check_refit(evaluations.temperature, suite, captions, clip, student.bank)
    experiment = Experiment(
        config, recipe, run, stop, processes, towers, suite, probe, captions, evaluations, available
    )
    if is_quantized(config.quant):
        towers.shares, experiment.coverage = covered(config.quant, clip, run, visual, text)
    return experiment


@contextmanager
def together(experiments: Sequence[Experiment]) -> Iterator[None]:
    """Make the processes one group inside this context, and check that all of them were given the same suite."""
    # The experiments of one command have the same options for their suites, so that comparing one suite is enough.
    first = experiments[0]
    with first.processes.together():
        definitions = {entry.source.name: entry.source.definition for entry in first.suite.sets}
        first.processes.require_same(definitions, first.config.suite.root)
        yield


def _processes(config: Config, run: Run, recipe: str, evaluations: Evaluations) -> Processes:
    """Return the processes of a run with its trainer; ``together`` starts all processes but this one."""
    faults, progress = Faults(config), dict[str, int]()
    trainer = build_trainer(config, run, recipe, [*evaluations.callbacks, faults], progress)
    return Processes(trainer, config.trainer, faults, progress)


def _quantized_copies(config: Config, clip: Clip) -> tuple[nn.Module | None, nn.Module | None]:
    """Return quantized copies, not calibrated yet, of the image and the text tower; None for a tower that stays as it is."""
    visual = quantized_copy(clip.visual, config.quant) if is_quantized(config.quant, "visual") else None
    text = None
    if clip.model is not None and is_quantized(config.quant, "text"):
        text = quantized_text(clip.model, config.quant)
    return visual, text


def _student(
    config: Config, clip: Clip, suite: Suite, bank: str | None, quantized: nn.Module | None, processes: Processes
) -> Student:
    """Return the student with the heads of the suite; its encoder is still in full precision."""
    visual = clip.visual
    if config.fit.steps:
        # These two calls raise UserError for training options that do not fit this tower, before anything is scored.
        prepare_training(quantized or visual, "eager", config.quant.matmul)
        kernels.choose(config.quant.kernels, processes.device, elements=0)
    # The tower in ``clip`` is the teacher and must not be trained, so the student needs a copy. Quantizing makes a
    # copy.
    if config.fit.steps and not config.fit.from_scratch and quantized is None:
        visual = copy.deepcopy(visual)
    texts = clips.text_table_for(clip.visual, bank).features if bank else None
    student = Student(config, clip, visual, texts)
    student.heads, student.ood_heads = suite.heads, suite.ood_heads
    if student.objective is not None and student.objective.needing("classes") and clip.tokenizer:
        of_classes = prompts(config.suite.templates).of(CLASS_NAMES)
        # Only the first prompt of each class is used, because cross-entropy takes one logit per class.
        student.class_tokens = clip.tokenizer([of_class[0] for of_class in of_classes])
    return student
