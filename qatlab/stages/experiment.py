"""The experiment: all objects that the stages of a run work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qatlab.config import Config, is_quantized
from qatlab.core.files import FEATURES, cache_dir
from qatlab.core.signals import StopSignals
from qatlab.data import SkipCounter
from qatlab.data.captions.calibration import CalibrationSamples
from qatlab.evaluation.embedding import Embedder, Encoder, Work
from qatlab.evaluation.score_inputs import Needs
from qatlab.results.rowfile import Row
from qatlab.results.run import Run
from qatlab.results.stages import ADAPTED, FP32, QUANTIZED, TRAINED
from qatlab.stages.evaluations import Evaluations
from qatlab.stages.processes import Processes
from qatlab.stages.towers import RunTowers
from qatlab.suites.source import View
from qatlab.suites.suite import Suite


@dataclass
class Experiment:
    """A run with its model, data and suite, opened by ``qatlab.stages.opening``; the stages are functions of it.

    ``probe`` is the suite of the probes during training. ``captions`` are the samples that calibration sees. ``needs``
    are the inputs that OOD scores can have. ``coverage`` are sentences on how much of the towers is rounded. ``work``
    counts the images that this process decoded and embedded, ``skipped`` counts the training samples that could not be
    read. ``computed`` says whether this process scored anything, ``options_told`` whether the loggers were given the
    options.
    """

    config: Config
    recipe: str
    run: Run
    stop: StopSignals
    processes: Processes
    towers: RunTowers
    suite: Suite
    probe: Suite | None
    captions: CalibrationSamples
    evaluations: Evaluations
    needs: Needs
    coverage: list[str] = field(default_factory=list)
    work: Work = field(default_factory=Work)
    skipped: SkipCounter = field(default_factory=SkipCounter)
    computed: bool = False
    options_told: bool = False

    @property
    def stages(self) -> list[str]:
        """Return the stages of this run in order, without the refit of the temperature."""
        # A training from random weights has no full-precision model to compare with.
        found = [] if self.config.fit.from_scratch else [FP32]
        if is_quantized(self.config.quant):
            found.append(QUANTIZED)
        if self.config.fit.steps:
            found.append(TRAINED if self.config.fit.from_scratch else ADAPTED)
        return found

    def view(self, stage: str) -> View:
        """Return the view of a stage at its model's own logit scale, and its logit bias where suite.zeroshot=sigmoid."""
        model = self.towers.full if stage == FP32 else self.towers.student
        return View(stage, model.logit_scale, logit_bias=model.logit_bias if self.is_sigmoid else None)

    @property
    def is_sigmoid(self) -> bool:
        """Return whether the probability of a class is a sigmoid of its own, and no softmax over the classes."""
        return self.config.suite.zeroshot == "sigmoid"

    def facts(self, stage: str) -> Row:
        """Return the entries on recipe, model, data and machine that every row of ``stage`` has besides its metrics."""
        return {
            "recipe": self.recipe,
            **self.towers.facts(stage),
            "data": self.captions.data.name,
            "precision": self.towers.precision,
            "device": self.towers.device,
        }

    def embedder(self, encoders: Sequence[Encoder]) -> Embedder:
        """Return the pass that adds the missing features of ``encoders`` to the feature stores; every process must call this."""
        return Embedder(
            encoders, cache_dir(FEATURES), self.processes.trainer.strategy.broadcast, self.config.suite.cache
        )

    def loaders(self, suite: Suite) -> list[Any]:
        """Return a loader for each set of ``suite``, which gives this process's share of the images."""
        trainer = self.processes.trainer
        return list(
            suite.loaders(
                self.config.suite.batch_size, self.config.fit.workers, trainer.global_rank, trainer.world_size
            )
        )
