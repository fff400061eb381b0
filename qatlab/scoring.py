"""Scoring: what no store has yet is embedded, then every evaluation is fed from the stores, one process with all of it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qatlab.cache import cache_dir, lock
from qatlab.clip import Clip
from qatlab.data.heads import Head
from qatlab.data.pools import distinct
from qatlab.data.suites import EvaluationSet, Suite, predicted
from qatlab.embedding import Embedder, Encoder, Local, embed
from qatlab.evaluation import Evaluation, Pass, Prediction, Row, View
from qatlab.metrics.ood import ALL_SCORES
from qatlab.scores import ScoreInputs

if TYPE_CHECKING:
    from qatlab.module import Student
    from qatlab.study import Study

ROWS = 4096  # images whose cosines are in memory together


@dataclass
class Reading:
    """One encoder as a pass reads it: its zero-shot heads, the text tower they are from, and the views it is read under."""

    encoder: Encoder
    clip: Clip
    heads: Mapping[str, Head]
    ood_heads: Mapping[str, Head]
    views: list[View]

    @property
    def score_heads(self) -> Mapping[str, Head]:
        """Return the heads of the OOD scores."""
        return {**self.heads, **self.ood_heads}

    def local_key(self, reference: str) -> str:
        """Return what the store calls the patch scores against an ID reference."""
        return next(key for key, local in self.encoder.local.items() if local.reference == reference)


class Scoring:
    """What a study still has to score under some ``views``, beside FP32, and how: ``fill``, then ``store``.

    A given ``suite`` is read by the student alone, for ``labelled``.
    """

    def __init__(self, study: Study, views: list[View], suite: Suite | None = None) -> None:
        self.study = study
        self.suite = study.missing(views) if suite is None else suite
        self.readings = self._readings(views) if suite is None else self._readings(views)[-1:]
        self.embedder: Embedder | None = None  # what filled the stores

    def _readings(self, views: Sequence[View]) -> list[Reading]:
        """FP32, which the others are paired with, the student, and its integer models."""
        study, found = self.study, []
        fp32 = [view for view in views if view.stage == "fp32" or study.stages == ["fp32"]]
        if not study.config.fit.from_scratch:
            if not any(view.stage == "fp32" for view in fp32):
                fp32 = [View("fp32", study.clip.logit_scale), *fp32]
            found.append(self._reading(study.clip.visual, study.clip, study.suite, fp32))
        if others := [view for view in views if view not in fp32 and view.stage not in study.integers]:
            found.append(self._reading(study.module.visual, study.scored_clip, study.module, others))
        for view in views:
            if (tower := study.integers.get(view.stage)) is not None:
                found.append(self._reading(tower, study.scored_clip, study.module, [view]))
        return found

    def _reading(self, visual: nn.Module, clip: Clip, of: Suite | Student, views: list[View]) -> Reading:
        study = self.study
        key = study.encoder_key(visual)
        reading = Reading(Encoder(key, visual, clip.preprocess, self.suite.sets), clip, of.heads, of.ood_heads, views)
        for reference, inputs in study.needs.available.items():
            if "local" in inputs:
                classes, temperature = reading.score_heads[reference].classes.features, study.mcm_temperature
                told = hashlib.sha256(classes.numpy().tobytes() + str(temperature).encode()).hexdigest()[:8]
                reading.encoder.local[f"{key}-local-{told}-{reference}"] = Local(reference, classes, temperature)
        return reading

    def store(self) -> None:
        """Append the rows of every evaluation to the run; the first process reads the stores and computes them."""
        study = self.study
        if study.trainer.is_global_zero:
            rows = self._rows()
            for row in rows:
                heads = self.readings[0].score_heads if row["score"] in ALL_SCORES else self.readings[0].heads
                steps = 0 if row["stage"] in ("fp32", "quantized") else study.config.fit.steps
                prompts = heads[row["reference"]].classes.prompts
                row.update(study.facts(row["stage"]), step=steps, prompts=prompts)
            study.run.append(rows)
        study.trainer.strategy.barrier()

    def labelled(self) -> tuple[Tensor, Tensor]:
        """Return cosines (N, C) and labels (N,) of all images of the suite, read by the student."""
        reading = self.readings[-1]
        predictions = [
            prediction
            for entry in self.suite.sets
            for prediction in self._of_set(reading, entry, torch.device("cpu"), frozenset(), None)
        ]
        return torch.cat([p.cosines for p in predictions]), torch.cat([p.labels for p in predictions])

    def _rows(self) -> list[Row]:
        study = self.study
        evaluations = [callback for callback in study.callbacks.values() if isinstance(callback, Evaluation)]
        scored = [entry for entry in self.suite.sets if entry.source.role != "calibration"]
        of = Pass(
            [view for reading in self.readings for view in reading.views],
            [entry.source for entry in scored],
            study.trainer.strategy.root_device,
            folder=study.run.folder,
            resamples=study.config.suite.resamples,
            available=study.needs.available,
        )
        for evaluation in evaluations:
            evaluation.start(of)
        for reading in self.readings:
            inputs = self._inputs(reading)
            for entry in scored:
                available = of.available[entry.source.reference]
                for prediction in self._of_set(reading, entry, of.device, available, inputs):
                    for evaluation in evaluations:
                        evaluation.update(prediction)
        return [row for evaluation in evaluations for row in evaluation.compute()]

    def _inputs(self, reading: Reading) -> ScoreInputs:
        study = self.study
        kept = reading.clip is study.clip and not study.config.fit.from_scratch
        words = study.config.suite.negatives

        def features(entry: EvaluationSet) -> Tensor:
            return self._stored(reading.encoder.key, entry)

        return ScoreInputs(reading.clip, reading.score_heads, self.suite, words, features, kept)

    def _of_set(
        self,
        reading: Reading,
        entry: EvaluationSet,
        device: torch.device,
        available: frozenset[str],
        inputs: ScoreInputs | None,
    ) -> Iterator[Prediction]:
        reference = entry.source.reference
        given = inputs.of(available, reference, device) if inputs else {}
        features, labels = self._stored(reading.encoder.key, entry), entry.labels
        local = self._stored(reading.local_key(reference), entry).squeeze(1) if "local" in available else None
        for rows in torch.arange(len(features)).split(ROWS):
            if local is not None:
                given = {**given, "local": local[rows].to(device)}
            x, y, index = (values.to(device) for values in (features[rows], labels[rows], rows))
            yield predicted(entry, x, y, index, reading.views, reading.heads, reading.ood_heads, **given)

    def _stored(self, key: str, entry: EvaluationSet) -> Tensor:
        assert self.embedder is not None
        return self.embedder.features(key, entry)


def fill(scorings: Sequence[Scoring]) -> None:
    """Embed what the stores lack of several scorings, each image decoded once for all of them; collective."""
    study = scorings[0].study
    trainer, suite = study.trainer, study.config.suite
    encoders = [reading.encoder for scoring in scorings for reading in scoring.readings]
    embedder = study.embedder(encoders)
    for file in embedder.damaged:
        study.say(f"{file} is damaged: its images are embedded again")
    with ExitStack() as stack:
        # The other runs of a sweep would too: one does, the others find it done. Always in this order.
        for made in embedder.makes(study.fp32_key):
            stack.enter_context(_turn(study, made))
            embedder = study.embedder(encoders)
        batches = sum(-(-len(places) // suite.batch_size) for places in embedder.work.values())
        study.progress["batches"] = -(-batches // trainer.world_size)
        study.took += embed(trainer, embedder, suite.batch_size, study.config.fit.workers)
    for scoring in scorings:
        scoring.embedder = embedder
        scoring.study.computed = True


@contextmanager
def _turn(study: Study, name: str) -> Iterator[None]:
    """Inside this context no other run has the turn called ``name``; collective."""
    with (cache_dir("locks", "turns") / name).open("a") as file:
        # No process waits in a collective for longer than a moment: those have a timeout.
        told = False
        while study.trainer.strategy.broadcast(study.trainer.is_global_zero and lock(file, wait=False)) is False:
            if not told:
                study.say("waiting for another run, which decodes images or embeds them with the same model")
            told = True
            time.sleep(1)
        yield


def announce(scorings: Sequence[Scoring]) -> None:
    """Say how many images are to be scored."""
    images = distinct([entry for scoring in scorings for entry in scoring.suite.sets])
    # The first reading is FP32's, which comes along with every other.
    readings = [reading for scoring in scorings for reading in scoring.readings[1:] or scoring.readings]
    stages = dict.fromkeys(view.stage for reading in readings for view in reading.views)
    scorings[0].study.say(f"{', '.join(stages)}: scoring {images} images")
