"""The stages of a run: what is there already is read back, what is missing is computed, every row is stored at once."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from safetensors.torch import load_file
from torch import Tensor, nn

from qatlab import clip as clips
from qatlab.cache import atomic, cache_dir
from qatlab.callbacks import OOD, Temperature
from qatlab.config import Config, QuantConfig
from qatlab.data import Captioned, SkipCounter
from qatlab.data.embedded import CLASS_NAMES
from qatlab.data.pools import distinct
from qatlab.data.prompts import prompts
from qatlab.data.suites import EvaluationSet, Suite, build_suite
from qatlab.deploy.tower import DeployedTower
from qatlab.embedding import Counts, Embedder, Encoder, embed
from qatlab.errors import UserError
from qatlab.evaluation import View
from qatlab.faults import Faults
from qatlab.module import Student
from qatlab.objectives import teacher_probabilities
from qatlab.quant import kernels
from qatlab.quant.trainable import prepare_training
from qatlab.quantized import (
    TEXT,
    TRAINED,
    is_quantized,
    method,
    planner,
    quantized_copy,
    quantized_text,
    save_quantized,
    tower_files,
)
from qatlab.quantizing import REPORT_SAMPLES, average_bits
from qatlab.results import Run, unfinished_beside
from qatlab.scores import FITTED, needs
from qatlab.scoring import Scoring, announce, fill
from qatlab.stopping import StopSignals
from qatlab.store import fingerprint
from qatlab.trainer import build_trainer, quiet
from qatlab.training import train
from qatlab.zeroshot import encode_text


class Study:
    """One run's model, data, suite and trainer; each method is a stage, and skips what the run folder already has."""

    def __init__(self, config: Config, run: Run, recipe: str, stop: StopSignals, beside: Study | None = None) -> None:
        quiet()
        L.seed_everything(config.seed, verbose=False)
        if config.fit.from_scratch and is_quantized(config.quant):
            raise UserError(
                "fit.from_scratch=true trains both towers in full precision: set quant.weight=null and quant.act=null, "
                "and quantize what comes out in a run of its own."
            )
        self.config, self.run, self.recipe, self.stop = config, run, recipe, stop
        self.callbacks = {name: instantiate(block) for name, block in config.callbacks.items() if block}
        evaluations = [callback for callback in self.callbacks.values() if isinstance(callback, L.Callback)]
        self.faults = Faults(config)
        # Runs that are scored beside each other share one trainer: a machine can start only one group of processes.
        self.progress: dict[str, int] = beside.progress if beside else {}
        self.trainer: L.Trainer = (
            beside.trainer if beside else build_trainer(config, run, recipe, [*evaluations, self.faults], self.progress)
        )
        self.clip = clips.load(config.model, config.fit.from_scratch)
        if self.clip.model is not None:
            self.clip.model.to(self.trainer.strategy.root_device)  # class prompts are encoded there
        self.data = instantiate(config.data)
        self._captioned: Captioned | None = None
        # What is missing from the data ends the run here, not after the scoring; a finished run needs none of it.
        if config.fit.steps and not (run.folder / TRAINED).exists():
            self.data.prepare()
        self.fitted = config.quant  # with the bits that a plan chose, once it has
        self.drift: dict[str, Any] = {}
        self._check_towers()
        planner(config.quant)  # a mistake in its options ends the run here
        scoring = {name: block for name, block in config.callbacks.items() if name != "temperature"}
        scoring |= {name: getattr(config.suite, name) for name in ("resamples", "negatives")}
        scoring["precision"] = config.trainer.precision
        self.suite = build_suite(config.suite, self.clip, scoring, cache_text=not config.fit.from_scratch)
        probing = config.fit.steps and config.fit.eval_every and not (run.folder / TRAINED).exists()
        self.probe = self.suite.probe(config.suite.probe_sets, config.suite.probe_images) if probing else None
        bank = getattr(self.data, "text_bank", None)
        self.scored_clip = self.clip  # with the quantized text tower, once there is one
        self.integers: dict[str, DeployedTower] = {}  # the student as it was exported, by stage, where that is scored
        visual = self.clip.visual
        # Built before anything is scored: a rule, a bit-width or kernels that do not fit end the run here.
        built = quantized_copy(visual, config.quant) if is_quantized(config.quant, "visual") else None
        if self.clip.model is not None and is_quantized(config.quant, "text"):
            quantized_text(self.clip.model, config.quant)
        if config.fit.steps:
            prepare_training(built or visual, "eager", config.quant.matmul)
            kernels.choose(config.quant.kernels, self.trainer.strategy.root_device, elements=0)
        if config.fit.steps and not config.fit.from_scratch and built is None:
            visual = copy.deepcopy(visual)  # the one in self.clip stays as it is: the teacher
        self.module = Student(
            config, self.clip, visual, clips.text_table_for(self.clip.visual, bank).features if bank else None
        )
        self.module.heads, self.module.ood_heads = self.suite.heads, self.suite.ood_heads
        self.needs = needs(self._scores(), self.clip, self.suite)
        if config.objective.class_cross_entropy and self.clip.tokenizer:
            text = prompts(config.suite.templates).of(CLASS_NAMES)
            self.module.class_tokens = self.clip.tokenizer([of_class[0] for of_class in text])
        self._check_refit()
        self.training_skipped = SkipCounter()
        self.took = Counts()  # what the passes of this process took
        self.computed = False
        self._calibrating: Scoring | None = None

    # -- what a run consists of --------------------------------------------------------------------------------------

    @property
    def stages(self) -> list[str]:
        """Return the stages of this run in order, the refit apart."""
        config = self.config
        return [
            *([] if config.fit.from_scratch else ["fp32"]),
            *(["quantized"] if is_quantized(config.quant) else []),
            *(["trained" if config.fit.from_scratch else "adapted"] if config.fit.steps else []),
        ]

    def key_of(self, visual: nn.Module, *options: str) -> str:
        """Return what the feature stores call an encoder as this run computes with it."""
        device, precision = self.trainer.strategy.root_device.type, self.config.trainer.precision
        return fingerprint(
            visual, self.clip.facts["activation"], repr(self.clip.preprocess), precision, device, *options
        )

    @cached_property
    def fp32_key(self) -> str:
        """Return that of the unquantized encoder, which no stage changes."""
        return self.key_of(self.clip.visual)

    def encoder_key(self, visual: nn.Module) -> str:
        """Return that of one of the run's encoders."""
        if visual is self.clip.visual:
            return self.fp32_key
        return self.key_of(visual, json.dumps(asdict(self.fitted)))

    @property
    def mcm_temperature(self) -> float:
        """Return MCM's temperature."""
        return next((c.mcm_temperature for c in self.callbacks.values() if isinstance(c, OOD)), 1.0)

    @property
    def temperature(self) -> Temperature | None:
        """Return the callback that refits the logit scale, if the run has one."""
        return next((c for c in self.callbacks.values() if isinstance(c, Temperature)), None)

    def _scores(self) -> list[str]:
        asked = (name for callback in self.callbacks.values() for name in getattr(callback, "scores", ()))
        return list(dict.fromkeys(asked))

    def _check_refit(self) -> None:
        """Raise UserError for a refit whose images or texts are not there, before anything is trained."""
        if self.temperature is None:
            return
        if self.temperature.source == "calibration" and not self.suite.only(roles={"calibration"}).sets:
            raise UserError(
                "callbacks.temperature needs a set with role: calibration in the suite; add one, or set "
                "callbacks.temperature.source=proxy or callbacks.temperature=null."
            )
        if self.temperature.source == "proxy" and self.clip.model is None and self.module.bank is None:
            raise UserError(
                "callbacks.temperature.source=proxy needs texts, and there is no text tower: give "
                "data.text_bank=FILE.safetensors:TABLE, or set callbacks.temperature=null."
            )

    def _check_towers(self) -> None:
        """Raise UserError for a text tower to quantize that is not there, and for calibration data that is missing."""
        config = self.config
        files = tower_files(config.quant)
        if TEXT in files and (self.clip.model is None or self.clip.text_table is not None):
            raise UserError(
                f"quant.tower={config.quant.tower} needs a text tower that the class prompts go through, and here is "
                f"{'a table of class embeddings (model.text_features)' if self.clip.text_table else 'only an image tower'}: "
                "set quant.tower=visual."
            )
        if files == [TEXT] and config.fit.steps:
            raise UserError("quant.tower=text leaves nothing to train: set fit.steps=0, or quant.tower=both.")
        if any(not (self.run.folder / name).exists() for name in files):
            self.captioned()

    def facts(self, stage: str) -> dict[str, Any]:
        """Return what every row of ``stage`` says besides its numbers."""
        quant = self.fitted if stage != "fp32" else QuantConfig()
        planned = quant.plan is not None and average_bits(self.module.visual)
        return {
            "recipe": self.recipe,
            **self.clip.facts,
            "method": method(quant) or "fp32",
            "tower": quant.tower if method(quant) else None,
            "weight_bits": planned or (quant.weight and quant.weight.get("bits")),
            "act_bits": quant.act and quant.act.get("bits"),
            **(self.drift if stage != "fp32" else {}),
            "objective": str(self.module.objective)
            if self.module.objective and stage not in ("fp32", "quantized")
            else None,
            "data": self.data.name,
        }

    def plan(self) -> str:
        """Return what is left to do, in two or three lines."""
        fit, model = self.config.fit, self.clip.facts
        named = f"{model['model']} ({model['pretrained'] or model['weights']}, {model['activation']})"
        lines = [f"{self.recipe} {self.run.id}: {' -> '.join(self.stages)}, {named}"]
        scale = self.module.logit_scale
        left = {stage: distinct(self.missing([View(stage, scale)]).sets) for stage in self.stages}
        if any(left.values()):
            lines.append(f"  scoring: {' + '.join(f'{n} images {stage}' for stage, n in left.items() if n)}")
        if fit.steps and not (self.run.folder / TRAINED).exists():
            unique = f"{fit.unique_samples} looped samples" if fit.unique_samples else "streamed samples"
            lines.append(
                f"  training: {fit.steps} steps x {fit.batch_size} images of {self.data.name}, {unique}, {self.module.objective}"
            )
        lines = lines if len(lines) > 1 else [*lines, "  nothing left to compute"]
        return "\n".join([*lines, *(f"  {line}" for line in unfinished_beside(self.run, self.recipe))])

    def require_finished(self) -> None:
        """Raise UserError when the run folder lacks a model that its options promise: scoring is not where one is made."""
        for name in [*tower_files(self.config.quant), *([TRAINED] if self.config.fit.steps else [])]:
            if not (self.run.folder / name).exists():
                raise UserError(
                    f"{self.run.folder} has no {name}: the run is not finished. Give its own command again, "
                    "`python -m qatlab.fit recipe=...`, and it goes on from where it stopped."
                )

    # -- stages ------------------------------------------------------------------------------------------------------

    def serve(self, towers: Sequence[DeployedTower]) -> list[View]:
        """Take integer models that the student was exported to, and return the views that they are scored under.

        All that the run scores is then what they too have: no patch features.
        """
        self.integers = {tower.stage: tower for tower in towers}
        if towers:
            self.needs = needs(self._scores(), self.clip, self.suite, towers[0])
        return [View(tower.stage, self.module.logit_scale, tower.digest) for tower in towers]

    def score(self, views: list[View]) -> None:
        """Embed the sets whose rows some view still lacks, once, and store a row per evaluation and view."""
        if (scoring := Scoring(self, views)).suite.sets:
            announce([scoring])
            fill([scoring])
            scoring.store()

    def embedder(self, encoders: Sequence[Encoder]) -> Embedder:
        """Return the pass that fills the stores with what they lack of ``encoders``; collective."""
        return Embedder(encoders, cache_dir("features"), self.trainer.strategy.broadcast, self.config.suite.cache)

    def features(self, entry: EvaluationSet) -> dict[str, Tensor]:
        """Return the features (n, D) of a set's images from the stores or computed, "fp32", "simulated" and by integer stage."""
        towers = {"fp32": self.clip.visual, "simulated": self.module.visual, **self.integers}
        keys = {name: self.encoder_key(tower) for name, tower in towers.items()}
        encoders = [Encoder(keys[name], tower, self.clip.preprocess, [entry]) for name, tower in towers.items()]
        embedder = self.embedder(encoders)
        embed(self.trainer, embedder, self.config.suite.batch_size, self.config.fit.workers)
        return {name: embedder.features(key, entry) for name, key in keys.items()}

    def missing(self, views: list[View]) -> Suite:
        """Return the sets that some evaluation gives rows of and that lack them under one of ``views``."""
        done = {view: self.run.done(view.stage) for view in views}
        roles = {role for callback in self.callbacks.values() for role in getattr(callback, "roles", ())}
        fitted = any(FITTED & inputs for inputs in self.needs.available.values())
        return self.suite.missing(
            lambda source: all((source.name, view.definition(source)) in done[view] for view in views), roles, fitted
        )

    def probe_again(self, step: int) -> None:
        """Score the probe's sets as training does after ``step`` steps."""
        module = self.module
        assert self.probe is not None
        module.probed, module.probed_step, module.facts = self.probe.sets, step, self.facts(self.stages[-1])
        self.computed = True
        self.trainer.validate(module, dataloaders=self.loaders(self.probe), verbose=False)
        module.probed_step = None

    def train(self) -> None:
        """Train the student, or read back what an earlier process trained; resumes from its last checkpoint."""
        stored = self.run.folder / TRAINED
        trained = self.clip.model if self.config.fit.from_scratch else self.module.visual
        assert trained is not None
        if stored.exists():
            trained.load_state_dict(load_file(stored))
            self.module.logit_scale = self.state()["logit_scale"]
        else:
            self.training_skipped = train(self)
            # The weights come last: once they are there the stage counts as finished.
            self.state(logit_scale=self.module.logit_scale)
            self.write(TRAINED, lambda path: save_quantized(trained, path, self.config.model, self.fitted))
        if self.config.fit.from_scratch:
            self.module.encode_classes(self.clip)
        if self.trainer.is_global_zero:
            shutil.rmtree(self.run.folder / "checkpoints", ignore_errors=True)  # they held what is now the model

    def to_refit(self) -> Scoring | None:
        """Return the scoring of the calibration images that the refit needs, None where it needs none or was fitted."""
        temperature = self.temperature
        if temperature is None or temperature.source != "calibration" or self._refit_name() in self.state():
            return None
        if self._calibrating is None:
            self._calibrating = Scoring(self, [View(self.stages[-1], self.module.logit_scale)], self.suite.calibration)
            self.say(f"refitting the temperature on {self._calibrating.suite.images} calibration images")
        return self._calibrating

    def _refit_name(self) -> str:
        assert self.temperature is not None
        return "/".join(filter(None, [self.temperature.stage, self._refit_definition()]))

    def _refit_definition(self) -> str:
        split = self.suite.only(roles={"calibration"}).sets
        calibrated = self.temperature is not None and self.temperature.source == "calibration"
        return split[0].source.definition if calibrated and split else ""

    def refit(self) -> View | None:
        """Return the view of the refitted logit scale, fitted or read back; None when the run has no refit."""
        temperature = self.temperature
        if temperature is None:
            return None
        definition, name = self._refit_definition(), self._refit_name()
        known = self.state().get(name)
        if known is None:
            fit = self._refit(temperature)
            row = temperature.row(fit, definition) | self.facts(self.stages[-1])
            self.run.append([row | {"step": self.config.fit.steps, "prompts": None}])
            known = fit.logit_scale
            if fit.at_bound:
                self.say(f"  the fit ended at its bound, s = {known:g}: {fit.images} images do not tell the scale")
            self.state(**{name: known})
        return View(temperature.stage, known, definition)

    def _refit(self, temperature: Temperature) -> Any:
        current = self.module.logit_scale
        if (scoring := self.to_refit()) is not None:
            if scoring.embedder is None:
                fill([scoring])
            return self.broadcast(lambda: temperature.fit(*scoring.labelled(), current))
        captioned = self.captioned()
        self.say(f"refitting the temperature on {len(captioned.images)} images of {self.data.name}, no labels")
        texts = encode_text(self.scored_clip, captioned.captions) if self.module.bank is None else self.module.bank
        student, teacher = (
            self._features(captioned.images, visual) for visual in (self.module.visual, self.clip.visual)
        )
        return temperature.fit(student @ texts.T, teacher_probabilities(teacher, texts, current), current)

    @property
    def skipped(self) -> SkipCounter:
        """Return how many caption samples this process could not read, by reason."""
        return self.training_skipped or SkipCounter(self._captioned.skipped if self._captioned else {})

    # -- pieces ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _features(self, images: Tensor, visual: nn.Module) -> Tensor:
        device = self.trainer.strategy.root_device
        self.module.to(device).eval()
        visual.to(device)
        return torch.cat(
            [self.module.embed(chunk.to(device), visual).cpu() for chunk in images.split(self.config.suite.batch_size)]
        )

    def captioned(self) -> Captioned:
        """Return the caption samples that calibration sees."""
        if self._captioned is None:
            images = self.config.quant.calibration_images
            if images < 1:
                raise UserError(
                    f"quant.calibration_images={images}: activation scales need at least one image (64 is usual)."
                )
            drawn, preprocess = self.config.quant.calibration_seed, self.clip.preprocess
            self._captioned = (
                self.data.first(images, preprocess)
                if drawn is None
                else self.data.batch(0, images, 0, 1, preprocess, drawn)
            )
        return self._captioned

    def few_images(self) -> Tensor:
        """Return the normalised images (n, 3, S, S) that layers are reported on."""
        return self.clip.preprocess.normalize(self.captioned().images[:REPORT_SAMPLES])

    def loaders(self, suite: Suite) -> list[Any]:
        """Return this rank's loaders of the sets of ``suite``."""
        world = self.trainer.world_size
        return list(
            suite.loaders(self.config.suite.batch_size, self.config.fit.workers, self.trainer.global_rank, world)
        )

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """Return what the first process makes, on all of them."""
        if not torch.distributed.is_initialized():  # one process
            return make()
        return self.trainer.strategy.broadcast(make() if self.trainer.is_global_zero else None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside this context the run's processes are one group and end together; what a machine does wrong is a UserError."""
        try:
            with self.faults.named(self.trainer):
                self._meet()
                yield
        except BaseException:
            # Left alone, they would wait in a collective and then complain about it.
            if isinstance(launcher := self.trainer.strategy.launcher, _SubprocessScriptLauncher):
                launcher.kill(signal.SIGKILL)
            raise

    def _meet(self) -> None:
        """Start the other processes and form the group before anything is looked up that another run may be changing.

        What is looked up first and shared later, ranks may see differently.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, DDPStrategy):
            return
        assert strategy.launcher is not None
        try:
            strategy.launcher.launch(strategy.setup_environment)
        except ValueError as error:
            where = self.config.trainer
            raise UserError(
                f"trainer.devices={where.devices} with trainer.num_nodes={where.num_nodes} is not what this job has: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def state(self, **news: float) -> dict[str, float]:
        """Return the scales learned so far, ``news`` added and stored."""
        path = self.run.folder / "scales.json"
        state = json.loads(path.read_text()) if path.exists() else {}
        if news:
            state |= news
            self.write("scales.json", lambda temporary: temporary.write_text(json.dumps(state, indent=1)))
        return state

    def write(self, name: str, write: Any) -> None:
        """Have ``write(path)`` make the file ``name`` of the run folder, whole or not at all, on rank zero."""
        if self.trainer.is_global_zero:
            with atomic(self.run.folder / name) as temporary:
                write(temporary)

    def say(self, line: str) -> None:
        """Print ``line`` on rank zero."""
        if self.trainer.is_global_zero:
            print(line, flush=True)
