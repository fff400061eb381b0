"""Scoring: missing features are embedded by all processes, then one process feeds every evaluation from the stores."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from qatlab.core.files import cache_lock, lock
from qatlab.evaluation.embedding import Embedder, Encoder, embed
from qatlab.evaluation.evaluation import Pass
from qatlab.evaluation.prediction import Prediction, predicted
from qatlab.evaluation.reading import Reading
from qatlab.evaluation.score_inputs import ScoreInputs
from qatlab.evaluation.store import tell_superseded
from qatlab.metrics.ood import ALL_SCORES
from qatlab.models.clip import Clip
from qatlab.results.rowfile import Row
from qatlab.results.stages import FP32, QUANTIZED
from qatlab.stages.experiment import Experiment
from qatlab.stages.processes import Processes
from qatlab.suites.heads import Head
from qatlab.suites.pools import distinct
from qatlab.suites.source import View
from qatlab.suites.suite import EvaluationSet, Suite

# The number of images whose cosines are in memory together: 16 MB with 1000 classes.
IMAGES = 4096

Heads = Mapping[str, Head]


def score(work: Sequence[tuple[Experiment, Sequence[View]]]) -> None:
    """Store the rows that the experiments lack under their views; each image is decoded once for all experiments."""
    scorings = [Scoring(experiment, views) for experiment, views in work]
    left = [scoring for scoring in scorings if scoring.suite.sets]
    if not left:
        return
    announce(left)
    embed_missing(left)
    for scoring in left:
        scoring.store()


class Scoring:
    """The scoring of an experiment under some ``views`` and FP32: call ``embed_missing`` first, then ``store``.

    By default the suite is reduced to the sets that lack rows. A given ``suite`` is read only by the student, for
    ``labelled``.
    """

    def __init__(self, experiment: Experiment, views: Sequence[View], suite: Suite | None = None) -> None:
        self.experiment = experiment
        views = self._with_fp32(views)
        self.suite = self._missing(views) if suite is None else suite
        readings = self._readings(views)
        self.readings = readings if suite is None else readings[-1:]
        self.embedder: Embedder | None = None  # set by embed_missing; it reads the feature stores that it has filled

    def _with_fp32(self, views: Sequence[View]) -> list[View]:
        """Return ``views`` with the view of FP32 in front, because the other views are compared with it."""
        experiment = self.experiment
        if experiment.config.fit.from_scratch or any(view.stage == FP32 for view in views):
            return list(views)
        return [experiment.view(FP32), *views]

    def _missing(self, views: Sequence[View]) -> Suite:
        """Return the suite reduced to the sets that lack rows under any of the views."""
        experiment = self.experiment
        return experiment.evaluations.missing(experiment.suite, views, experiment.needs.available, experiment.run)

    def _readings(self, views: Sequence[View]) -> list[Reading]:
        """Return a reading for each encoder: the full-precision model, the student, and the student's integer models."""
        experiment, towers, found = self.experiment, self.experiment.towers, []
        suite, student = experiment.suite, towers.student
        # In a run that only scores the full-precision model, all views, refitted ones too, are of this encoder.
        fp32 = [view for view in views if view.stage == FP32 or experiment.stages == [FP32]]
        if not experiment.config.fit.from_scratch:
            found.append(self._reading(towers.full.visual, towers.full, (suite.heads, suite.ood_heads), fp32))
        heads = student.heads, student.ood_heads
        if others := [view for view in views if view not in fp32 and view.stage not in towers.exports]:
            found.append(self._reading(student.visual, towers.class_clip, heads, others))
        # Each export is an encoder of its own. It is scored with the student's class embeddings.
        for view in views:
            if (tower := towers.exports.get(view.stage)) is not None:
                found.append(self._reading(tower, towers.class_clip, heads, [view]))
        return found

    def _reading(self, visual: nn.Module, clip: Clip, heads: tuple[Heads, Heads], views: list[View]) -> Reading:
        experiment = self.experiment
        encoder = Encoder(experiment.towers.key(visual), visual, clip.preprocess, self.suite.sets)
        reading = Reading(encoder, clip, *heads, views)
        for reference, inputs in experiment.needs.available.items():
            if "local" in inputs:
                reading.ask_for_patches(reference, experiment.evaluations.mcm_temperature)
        return reading

    def store(self) -> None:
        """Append the rows of every evaluation to the run; only the first process computes them. Collective."""
        experiment = self.experiment
        if experiment.processes.first:
            # One process computes on all images, so that sums are the same for any number of processes, to the last
            # bit.
            rows = self._rows()
            ood_scores = {*ALL_SCORES, *experiment.evaluations.scores}
            for row in rows:
                # All readings have the same prompts, so the first one tells the prompts of every row.
                heads = self.readings[0].score_heads if row["score"] in ood_scores else self.readings[0].heads
                steps = 0 if row["stage"] in (FP32, QUANTIZED) else experiment.config.fit.steps
                prompts = heads[row["reference"]].classes.prompts
                row.update(experiment.facts(row["stage"]), step=steps, prompts=prompts)
                # OOD scores are defined without the sigmoids, and do not change by them.
                if experiment.is_sigmoid and row["score"] not in ood_scores:
                    row.update(zeroshot="sigmoid", logit_bias=experiment.view(row["stage"]).logit_bias)
            experiment.run.append(rows)
        # The other processes wait for the rows, because their next steps may read them.
        experiment.processes.trainer.strategy.barrier()

    def labelled(self) -> tuple[Tensor, Tensor]:
        """Return cosines (N, C) and labels (N,) of all images of the suite, from the student's features."""
        reading, found = self.readings[-1], list[Prediction]()
        for entry in self.suite.sets:
            found += self._of_set(reading, entry, torch.device("cpu"), frozenset(), None)
        return torch.cat([p.cosines for p in found]), torch.cat([p.labels for p in found])

    def _rows(self) -> list[Row]:
        """Return the rows of every evaluation, computed in a pass over the stored features."""
        experiment, evaluations = self.experiment, self.experiment.evaluations.fed
        scored = [entry for entry in self.suite.sets if entry.source.role != "calibration"]
        views: list[View] = []
        for reading in self.readings:
            views += reading.views
        scoring_pass = Pass(
            views,
            [entry.source for entry in scored],
            experiment.processes.device,
            folder=experiment.run.folder,
            resamples=experiment.config.suite.resamples,
            available=experiment.needs.available,
        )
        for evaluation in evaluations:
            evaluation.start(scoring_pass)
        # The reading of FP32 comes first, as evaluations expect it: they compare the other readings with it.
        for reading in self.readings:
            inputs = self._inputs(reading)
            for entry in scored:
                available = scoring_pass.available[entry.source.reference]
                for prediction in self._of_set(reading, entry, scoring_pass.device, available, inputs):
                    for evaluation in evaluations:
                        evaluation.update(prediction)
        rows: list[Row] = []
        for evaluation in evaluations:
            rows += evaluation.compute()
        return rows

    def _inputs(self, reading: Reading) -> ScoreInputs:
        """Return the inputs that OOD scores need besides the features of the encoder."""
        experiment = self.experiment
        # Text features are stored for other runs, but not those of a text tower that only this run has.
        kept = reading.clip is experiment.towers.full and not experiment.config.fit.from_scratch
        words = experiment.config.suite.negatives

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
        """Yield the predictions of a set in batches of IMAGES, from the stored features of an encoder.

        ``available`` are the names of the inputs of OOD scores to add; without ``inputs`` no such input is added.
        """
        reference = entry.source.reference
        given = inputs.of(available, reference, device) if inputs else {}
        features, labels = self._stored(reading.encoder.key, entry), entry.labels
        local = self._stored(reading.local_key(reference), entry).squeeze(1) if "local" in available else None
        for places in torch.arange(len(features)).split(IMAGES):
            if local is not None:
                given = {**given, "local": local[places].to(device)}
            x, y, index = (values.to(device) for values in (features[places], labels[places], places))
            yield predicted(entry, x, y, index, reading.views, reading.heads, reading.ood_heads, **given)

    def _stored(self, key: str, entry: EvaluationSet) -> Tensor:
        """Return the features (n, D) of a set's images that are stored under a key."""
        assert self.embedder is not None
        return self.embedder.features(key, entry)


def embed_missing(scorings: Sequence[Scoring]) -> None:
    """Embed the images whose features are missing, each image decoded once for all ``scorings``. Collective.

    Afterwards every scoring has an embedder that reads the features.
    """
    experiment = scorings[0].experiment
    processes, suite = experiment.processes, experiment.config.suite
    tell_superseded()
    encoders: list[Encoder] = []
    for scoring in scorings:
        encoders += [reading.encoder for reading in scoring.readings]
    embedder = experiment.embedder(encoders)
    for file in embedder.damaged:
        processes.say(f"{file} is damaged: its images are embedded again")
    with ExitStack() as stack:
        # Other runs of a sweep lack the same features and decoded images. One run makes them, while the others wait for
        # its lock and then find them made. All runs take the locks in the same order, so that no two wait for each
        # other.
        for made in embedder.to_make_for_others(experiment.towers.full_key):
            stack.enter_context(exclusively(processes, made))
            embedder = experiment.embedder(encoders)  # made anew, because the features may exist by now
        batches = sum(-(-len(places) // suite.batch_size) for places in embedder.work.values())
        processes.progress["batches"] = -(-batches // processes.trainer.world_size)
        experiment.work += embed(processes.trainer, embedder, suite.batch_size, experiment.config.fit.workers)
    for scoring in scorings:
        scoring.embedder = embedder
        scoring.experiment.computed = True


@contextmanager
def exclusively(processes: Processes, name: str) -> Iterator[None]:
    """Hold the lock ``name`` inside this context, so that no other run makes the same features or images. Collective."""
    with cache_lock(name, "turns") as file:
        # The first process tries the lock again and again, and broadcasts each answer. If it blocked until the lock is
        # free, the other processes would wait in one collective call, which has a timeout.
        is_said = False
        while processes.trainer.strategy.broadcast(processes.first and lock(file, wait=False)) is False:
            if not is_said:
                processes.say("waiting for another run, which decodes images or embeds them with the same model")
            is_said = True
            time.sleep(1)
        yield


def announce(scorings: Sequence[Scoring]) -> None:
    """Print the stages and the number of images to score."""
    sets: list[EvaluationSet] = []
    stages: dict[str, None] = {}
    for scoring in scorings:
        sets += scoring.suite.sets
        # The first reading is FP32's, which is added to every scoring for comparison: it is named only if it is alone.
        for reading in scoring.readings[1:] or scoring.readings:
            stages |= dict.fromkeys(view.stage for view in reading.views)
    scorings[0].experiment.processes.say(f"{', '.join(stages)}: scoring {distinct(sets)} images")
