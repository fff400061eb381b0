"""The LightningModule that trains the student and embeds images; it has no metric."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from qatlab.config import Config
from qatlab.core.errors import UserError
from qatlab.evaluation.prediction import predicted
from qatlab.models.clip import Clip, logit_bias
from qatlab.quant import Quantizer
from qatlab.quant.inspect.hooks import on_outputs
from qatlab.quant.inspect.layer_report import rounded_elements
from qatlab.quant.layers.trainable import prepare_training
from qatlab.results.rowfile import Row
from qatlab.results.stages import PROBE
from qatlab.suites.heads import Head
from qatlab.suites.source import Source, View
from qatlab.suites.suite import EvaluationSet
from qatlab.training.batch_features import BatchFeatures
from qatlab.training.global_batch import Batch, gathered, in_batch_step, parts_of, summed_step
from qatlab.training.machine import MachineChoice, StepNeeds, choose
from qatlab.training.objectives import Features, Objective
from qatlab.training.stopwatch import phase

# The largest logit scale of a model that learns from scratch, so that its softmax cannot become sharper without bound.
# Radford et al. 2021 take 100; the embedded world needs less.
MAX_LEARNED_SCALE = 50.0


class Student(L.LightningModule):
    """The encoder under study.

    ``visual`` is the module that is trained and scored; the unquantized ``clip`` is teacher and text tower, kept out of
    the state dict because the model preset reproduces it.
    """

    def __init__(self, config: Config, clip: Clip, visual: nn.Module, bank: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.visual = visual
        self.preprocess = clip.preprocess
        self.objective = Objective(config.objective) if config.fit.steps else None
        self.both_towers: Any = clip.model if config.fit.from_scratch else None
        # A dict hides the model from torch, which would train and save a submodule.
        self._frozen = {"clip": clip}
        self.bank = bank
        self.logit_scale = clip.logit_scale
        self.logit_bias = clip.logit_bias
        self.batch_features: BatchFeatures | None = None
        if self.objective is not None:
            self.batch_features = BatchFeatures(self, self.objective, config.seed, config.fit.teacher_bf16)
        self.choice: MachineChoice | None = None  # set at the start of training, and kept when the run is resumed
        self.micro_batch: int | None = None  # images per forward and backward, None for all of this process
        self.class_tokens: Tensor | None = None  # prompts of the labels, where the data has labels
        self.facts: Row = {}  # columns of every row of a probe besides its numbers
        # The step of a checkpoint whose probe was interrupted, while that probe is repeated; None in training.
        self.probed_step: int | None = None
        self.probed: list[EvaluationSet] = []  # the sets of a probe
        self.heads: dict[str, Head] = {}  # zero-shot heads, by the ID reference whose classes they have
        self.ood_heads: dict[str, Head] = {}  # heads of the OOD scores that have prompts of their own
        self._check_options()

    @property
    def clip(self) -> Clip:
        """Return the unquantized model, which is the teacher and the text tower of the student."""
        return self._frozen["clip"]

    @property
    def step(self) -> int:
        """Return the training step that a probe belongs to."""
        return self.global_step if self.probed_step is None else self.probed_step

    @property
    def views(self) -> list[View]:
        """Return the only view of a probe, named "probe", with the present logit scale."""
        is_sigmoid = self.config.suite.zeroshot == "sigmoid"
        return [View(PROBE, self.logit_scale, logit_bias=self.logit_bias if is_sigmoid else None)]

    @property
    def sources(self) -> list[Source]:
        """Return the sources of the sets of a probe."""
        return [entry.source for entry in self.probed]

    def _check_options(self) -> None:
        """Raise UserError for options that do not go with the objective or the model, before anything is trained."""
        if self.objective is None:
            return
        if self.config.fit.teacher_bf16 and not self.objective.needs_teacher:
            raise UserError(
                "fit.teacher_bf16=true, but no teacher runs: give objective.kl or objective.feature_mse a weight, or leave it out."
            )
        texts = self.clip.model is not None
        if "class_cross_entropy" in self.objective and not self.config.fit.from_scratch:
            raise UserError(
                "objective.class_cross_entropy needs labelled training images, which only recipe=pretrain_tiny has; "
                "give another objective a weight."
            )
        encoded = self.objective.needing("captions") or self.objective.needing("classes")
        if encoded and not texts:
            raise UserError(
                f"{encoded} needs a text tower, and this checkpoint has only the image tower: leave it out "
                "(objective.contrastive=0) and give objective.feature_mse or objective.kl (with data.text_bank=) a weight."
            )
        with_bias = self.objective.needing("bias")
        if with_bias and self.logit_bias is None:
            raise UserError(
                f"{with_bias} needs a logit bias, which {self.clip.facts['model']} does not have: give objective.contrastive a "
                "weight instead, or take a model that was trained with a sigmoid (SigLIP)."
            )
        with_bank = self.objective.needing("bank")
        if with_bank and not texts and self.bank is None:
            raise UserError(
                f"{with_bank} needs texts, and there is no text tower: give data.text_bank=FILE.safetensors:TABLE."
            )

    # -- embedding ---------------------------------------------------------------------------------------------------

    def embed(self, images: Tensor, visual: nn.Module | None = None) -> Tensor:
        """Return unit features (B, D) float32 of uint8 ``images`` (B, 3, S, S), by the student or by ``visual``."""
        # The features are scaled to unit length in float32, because lengths in bfloat16 would be off by some 1e-3.
        features = (visual or self.visual)(self.preprocess.normalize(images))
        return normalize(features.float(), dim=-1)

    def on_validation_start(self) -> None:
        """Encode the class prompts again where the text tower is trained too, because their features have changed."""
        if self.both_towers is not None:
            self.encode_classes(self.clip)

    def encode_classes(self, clip: Clip) -> None:
        """Replace all heads by heads of the text tower of ``clip``, with the same prompts."""
        self.heads = {reference: head.encoded_by(clip) for reference, head in self.heads.items()}
        self.ood_heads = {reference: head.encoded_by(clip) for reference, head in self.ood_heads.items()}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the Prediction of a probe's batch, from which callbacks compute metrics."""
        images, labels, index = batch
        features = self.embed(images)
        # Scores at temperature 1 may differ by only 1e-3, which bfloat16 does not resolve.
        with torch.autocast(self.device.type, enabled=False):
            return predicted(
                self.probed[dataloader_idx], features, labels, index, self.views, self.heads, self.ood_heads
            )

    # -- training ----------------------------------------------------------------------------------------------------

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Leave the gradients as they are.

        Lightning calls this hook between training_step and the last backward, when the gradients of all other parts of
        the batch exist already: training_step clears the gradients itself, before the first part.
        """

    def on_fit_start(self) -> None:
        """Bring the frozen towers to the student's device, and decide what depends on the machine."""
        # Lightning moves only submodules to the device, and the frozen towers are no submodules.
        self.clip.visual.to(self.device).eval()
        if self.clip.model is not None:
            self.clip.model.to(self.device)
        # Only a data module with looped samples has ``looped``; features of streamed samples are not kept.
        data = getattr(self.trainer, "datamodule", None)
        if self.batch_features is not None:
            self.batch_features.remember(getattr(data, "looped", None))
        self.choice = choose(self.config.fit, self.config.quant, self.step_needs(), self.trainer, self.choice)
        prepare_training(self.visual, self.choice["kernels"], self.config.quant.matmul)
        self.micro_batch = self.choice["micro_batch"]

    def step_needs(self) -> StepNeeds:
        """Return what a training step asks of the machine, measured on one image of zeros."""
        assert self.batch_features is not None
        size = torch.zeros(1, 3, self.preprocess.size, self.preprocess.size, device=self.device)
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return StepNeeds(self.batch_features.bytes_per_image(), trained, *rounded_elements(self.visual, size))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the scalar still to differentiate; a NaN or infinite loss raises UserError with step and layer.

        The loss is that of the global batch, for any number of processes and of parts that are computed one after the
        other. ``batch`` holds uint8 images (B, 3, S, S) and the other tensors that ``BatchFeatures`` reads.
        """
        assert self.batch_features is not None
        self.optimizers(use_pl_optimizer=False).zero_grad()  # type: ignore[union-attr]
        parts, features = parts_of(batch, self.micro_batch), self.batch_features
        if features.in_batch:
            frozen = self._frozen_of_all(parts)
            terms, left = in_batch_step(
                parts,
                features.learned,
                self._shared(),
                lambda learned, shared: self._terms({**frozen, **learned}, shared),
                self._backward,
            )
        else:
            terms, left = summed_step(
                parts,
                lambda part, i: self._terms({**features.frozen(part), **features.learned(part, i)}, self._shared()),
                self._backward,
            )
        if not torch.isfinite(terms["loss"]):
            raise UserError(
                f"the loss is {terms['loss'].item()} at step {self.global_step}; the first layer with a value that is not "
                f"finite is {self._first_non_finite(batch['images'])}. Lower fit.lr or optim.scale_lr; the last checkpoint is kept."
            )
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=len(batch["images"]))
        return left

    def _frozen_of_all(self, parts: list[Batch]) -> dict[str, Tensor]:
        """Return the tensors that training does not change, for all images of the global batch, (world B, ...)."""
        assert self.batch_features is not None
        of_parts = [self.batch_features.frozen(part) for part in parts]
        everyone: dict[str, Tensor] = {}
        for name in of_parts[0]:
            everyone[name] = gathered(torch.cat([tensors[name] for tensors in of_parts]))
        return everyone

    def _shared(self) -> dict[str, Tensor]:
        """Return the tensors of no image: the logit scale (), and where they are needed the bias () and class prompts (C, D)."""
        shared = {"scale": torch.tensor(self.logit_scale, device=self.device)}
        if self.both_towers is not None:
            shared["scale"] = self.both_towers.logit_scale.exp().clamp(max=MAX_LEARNED_SCALE)
        if self.objective is not None and self.objective.needing("bias"):
            shared["bias"] = torch.tensor(self.logit_bias, device=self.device)
            if self.both_towers is not None:
                shared["bias"] = self.both_towers.logit_bias
        if self.class_tokens is not None:
            assert self.batch_features is not None
            shared["classes"] = self.batch_features.texts(self.class_tokens.to(self.device))
        return shared

    def _terms(self, rows: dict[str, Tensor], shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the objective's terms () on the tensors ``rows`` of the global batch or of a part of the batch."""
        assert self.objective is not None
        # Without a bank the texts are the captions of the batch itself.
        bank = rows.get("captions") if self.bank is None else self.bank.to(self.device)
        # Losses are computed in float32, because cosines in bfloat16,
        # times a logit scale of 100, would be off by a tenth.
        with torch.autocast(self.device.type, enabled=False):
            return self.objective(Features(**rows, **shared, bank=bank))

    def _backward(self, loss: Tensor) -> None:
        """Add the gradients of a part but the last, which Lightning differentiates, and after which DDP averages."""
        # Lightning runs its own backward outside autocast, but training_step runs within autocast.
        with phase("backward"), torch.autocast(self.device.type, enabled=False):
            self.trainer.strategy.backward(loss, None)

    def _first_non_finite(self, images: Tensor) -> str:
        """Return the name of the first layer of the student whose output has a NaN or infinity."""
        found: list[str] = []

        def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            # An attention returns a tuple of its output and of its weights.
            tensor = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                found.append(name)

        # The tower itself, whose name is empty, is left out, because it runs last and names no layer.
        inside = {name: module for name, module in self.visual.named_modules() if name}
        with on_outputs(inside, look):
            for part in images.split(self.micro_batch or len(images)):
                self.embed(part)  # gradients stay on, because layers may compute differently without them
        return found[0] if found else "none (the objective itself)"

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the learned logit scale readable for the evaluations."""
        if self.both_towers is not None:
            self.take_scale(self.both_towers.logit_scale)
            self.take_bias(self.both_towers)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights, which the preset gives, out of the ``checkpoint``, and add the machine's choice."""
        kept = self.kept()
        checkpoint["state_dict"] = {name: of for name, of in checkpoint["state_dict"].items() if name in kept}
        # The key is older than the attribute's name, and earlier checkpoints have the key.
        checkpoint["settled"] = self.choice

    def kept(self) -> set[str]:
        """Return the names of the tensors that a checkpoint holds: the trained parameters and the buffers."""
        return set(self.state_dict()) - {name for name, of in self.named_parameters() if not of.requires_grad}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Complete the weights of the ``checkpoint`` by the frozen ones, and take its choice and its logit scale."""
        # Lightning loads only a state dict with every tensor of the module, and checkpoints have no frozen weights.
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}
        self.choice = checkpoint["settled"]
        # A run that was stopped after its last step has no further step that would set the scale.
        if self.both_towers is not None:
            self.take_scale(checkpoint["state_dict"]["both_towers.logit_scale"])
            bias = checkpoint["state_dict"].get("both_towers.logit_bias")
            self.logit_bias = None if bias is None else float(bias)

    def take_scale(self, learned: Tensor) -> None:
        """Set the logit scale to exp(``learned``), a tensor (1,) or scalar, but at most MAX_LEARNED_SCALE."""
        self.logit_scale = min(float(learned.detach().exp()), MAX_LEARNED_SCALE)

    def take_bias(self, model: Any) -> None:
        """Set the logit bias to that of ``model``, None for one without."""
        self.logit_bias = logit_bias(model)

    def configure_optimizers(self) -> Any:
        """Return AdamW over weights, undecayed vectors and log-scales, with a warm-up and a constant or cosine rate."""
        fit, optim = self.config.fit, self.config.optim
        optimizer = torch.optim.AdamW(self._groups(), lr=fit.lr, betas=(optim.betas[0], optim.betas[1]))

        def rate(step: int) -> float:
            # The + 1 gives the first step a rate above 0, so that the first step already trains.
            warm = min(1.0, (step + 1) / fit.warmup) if fit.warmup else 1.0
            progress = max(0, step - fit.warmup) / max(1, fit.steps - fit.warmup)
            return warm * (0.5 * (1 + math.cos(math.pi * min(1.0, progress))) if fit.schedule == "cosine" else 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        """Return AdamW's parameter groups that are not empty: decayed weights, undecayed vectors, and scales."""
        quantizers = [module for module in self.visual.modules() if isinstance(module, Quantizer)]
        # A dict is used, because a set would have another order in every process, and AdamW's state is restored by
        # position. The search is not recursive, because low-rank factors inside a quantizer are trained as weights.
        scales = dict.fromkeys(p for quantizer in quantizers for p in quantizer.parameters(recurse=False))
        trained = self.both_towers if self.both_towers is not None else self.visual
        rest = [p for p in trained.parameters() if p.requires_grad and p not in scales]
        # A tensor of at most one dimension (a bias, a norm, open_clip's class token) is not decayed. timm's class token
        # has three dimensions and is decayed.
        decayed = [p for p in rest if p.ndim >= 2]
        undecayed = [p for p in rest if p.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"name": "weights", "params": decayed, "weight_decay": self.config.optim.weight_decay},
            {"name": "vectors", "params": undecayed, "weight_decay": 0.0},
            {"name": "scales", "params": list(scales), "weight_decay": 0.0, "lr": self.config.optim.scale_lr},
        ]
        return [group for group in groups if group["params"]]
