"""The LightningModule: it trains the student and embeds images; it owns no metric."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from qatlab.clip import Clip
from qatlab.config import Config
from qatlab.data.heads import Head
from qatlab.data.suites import EvaluationSet, predicted
from qatlab.errors import UserError, nearest
from qatlab.evaluation import Row, Source, View
from qatlab.globalbatch import gathered, in_batch_step, parts_of, summed_step
from qatlab.objectives import Features, Objective
from qatlab.phases import phase
from qatlab.quant import Quantizer
from qatlab.quant.trainable import prepare_training
from qatlab.rows import BatchRows
from qatlab.settle import Settled, settle

# An image tower that learns from scratch may not sharpen its softmax without bound (Radford et al. 2021 clip at 100; the
# embedded world needs less).
MAX_LEARNED_SCALE = 50.0
SCHEDULES = ("constant", "cosine")


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
        self._frozen = {"clip": clip}  # in a dict, so that it is no submodule
        self.bank = bank
        self.logit_scale = clip.logit_scale
        self.rows = BatchRows(self, self.objective) if self.objective is not None else None
        self.settled: Settled | None = None  # what training found out about this machine, see qatlab.settle
        self.micro_batch: int | None = None  # images per forward and backward; None: all of this process at once
        self.class_tokens: Tensor | None = None  # prompts of the labels, where the data has labels
        self.facts: Row = {}  # what every row of a probe says besides its numbers
        self.probed_step: int | None = None  # the step of a probe that is made up for
        self.probed: list[EvaluationSet] = []  # the sets of a probe
        self.heads: dict[str, Head] = {}  # zero-shot heads by ID reference
        self.ood_heads: dict[str, Head] = {}  # those of the OOD scores, where they have prompts of their own
        self._check_options()

    @property
    def clip(self) -> Clip:
        """Return the unquantized model."""
        return self._frozen["clip"]

    @property
    def step(self) -> int:
        """Return the training step that a probe belongs to."""
        return self.global_step if self.probed_step is None else self.probed_step

    @property
    def views(self) -> list[View]:
        """Return what a probe is reported under: the logit scale of the moment."""
        return [View("probe", self.logit_scale)]

    @property
    def sources(self) -> list[Source]:
        """Return the sets of a probe."""
        return [entry.source for entry in self.probed]

    def _check_options(self) -> None:
        """Raise UserError for an objective whose texts are not there, or no such schedule, before anything is trained."""
        if self.objective is None:
            return
        if (schedule := self.config.fit.schedule) not in SCHEDULES:
            raise UserError(
                f"fit.schedule={schedule} is unknown{nearest(schedule, SCHEDULES)}; there are {', '.join(SCHEDULES)}."
            )
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
        if "contrastive" in self.objective and not texts:
            raise UserError(
                "objective.contrastive needs a text tower, and this checkpoint has only the image tower: set "
                "objective.contrastive=0 and give objective.feature_mse or objective.kl (with data.text_bank=) a weight."
            )
        if "kl" in self.objective and not texts and self.bank is None:
            raise UserError(
                "objective.kl needs texts, and there is no text tower: give data.text_bank=FILE.safetensors:TABLE."
            )

    # -- embedding ---------------------------------------------------------------------------------------------------

    def embed(self, images: Tensor, visual: nn.Module | None = None) -> Tensor:
        """Return unit features (B, D) float32 of uint8 ``images`` (B, 3, S, S), by the student or by ``visual``."""
        features = (visual or self.visual)(self.preprocess.normalize(images))
        return normalize(features.float(), dim=-1)

    def on_validation_start(self) -> None:
        """Encode the class prompts anew where the text tower is trained too."""
        if self.both_towers is not None:
            self.encode_classes(self.clip)

    def encode_classes(self, clip: Clip) -> None:
        """Have the classes' prompts encoded by the text tower of ``clip``."""
        self.heads, self.ood_heads = (
            {reference: head.encoded_by(clip) for reference, head in heads.items()}
            for heads in (self.heads, self.ood_heads)
        )

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the Prediction of a probe's batch, which every evaluation is fed with."""
        images, labels, index = batch
        features = self.embed(images)
        with torch.autocast(self.device.type, enabled=False):  # scores at temperature 1 differ by 1e-3: not in bfloat16
            return predicted(
                self.probed[dataloader_idx], features, labels, index, self.views, self.heads, self.ood_heads
            )

    # -- training ----------------------------------------------------------------------------------------------------

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Leave the gradients alone: training_step clears them itself, before the backwards of its own parts."""

    def on_fit_start(self) -> None:
        """Bring the frozen towers to the student's device."""
        self.clip.visual.to(self.device).eval()
        if self.clip.model is not None:
            self.clip.model.to(self.device)
        data = getattr(self.trainer, "datamodule", None)
        if self.rows is not None:
            self.rows.remember(getattr(data, "looped", None))
        self.settled = settle(self, self.trainer, self.settled)
        prepare_training(self.visual, self.settled["kernels"], self.config.quant.matmul)
        self.micro_batch = self.settled["micro_batch"]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return what is left to differentiate; a NaN or infinite loss raises UserError with the step and the layer.

        The loss is that of the global batch, whatever the number of processes and of parts that go through at once.
        """
        assert self.rows is not None
        self.optimizers(use_pl_optimizer=False).zero_grad()  # type: ignore[union-attr]
        parts, rows = parts_of(batch, self.micro_batch), self.rows
        if rows.in_batch:
            cut = [rows.frozen(part) for part in parts]
            frozen = {name: gathered(torch.cat([part[name] for part in cut])) for name in cut[0]}
            terms, left = in_batch_step(
                parts,
                rows.learned,
                self._shared(),
                lambda learned, shared: self._terms({**frozen, **learned}, shared),
                self._backward,
            )
        else:
            terms, left = summed_step(
                parts,
                lambda part, i: self._terms({**rows.frozen(part), **rows.learned(part, i)}, self._shared()),
                self._backward,
            )
        if not torch.isfinite(terms["loss"]):
            raise UserError(
                f"the loss is {terms['loss'].item()} at step {self.global_step}; the first layer with a value that is not "
                f"finite is {self._first_non_finite(batch['images'])}. Lower fit.lr or optim.scale_lr; the last checkpoint is kept."
            )
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=len(batch["images"]))
        return left

    def _shared(self) -> dict[str, Tensor]:
        """Return the logit scale and, where an objective reads them, the class prompts: what belongs to no image."""
        shared = {"scale": torch.tensor(self.logit_scale, device=self.device)}
        if self.both_towers is not None:
            shared["scale"] = self.both_towers.logit_scale.exp().clamp(max=MAX_LEARNED_SCALE)
        if self.class_tokens is not None:
            assert self.rows is not None
            shared["classes"] = self.rows.texts(self.class_tokens.to(self.device))
        return shared

    def _terms(self, rows: dict[str, Tensor], shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the objective's terms on rows of the global batch or of a part of it."""
        assert self.objective is not None
        bank = rows.get("captions") if self.bank is None else self.bank.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            return self.objective(Features(**rows, **shared, bank=bank))

    def _backward(self, loss: Tensor) -> None:
        """Add the gradients of a part; those of the last one are Lightning's to compute, and DDP's to average."""
        with phase("backward"), torch.autocast(self.device.type, enabled=False):  # as Lightning's is outside of it
            self.trainer.strategy.backward(loss, None)

    def _first_non_finite(self, images: Tensor) -> str:
        """Return the name of the first layer of the student whose output has a NaN or infinity."""
        found: list[str] = []

        def look(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                if not found and isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                    found.append(name)

            return hook

        handles = [module.register_forward_hook(look(name)) for name, module in self.visual.named_modules() if name]
        for part in images.split(self.micro_batch or len(images)):
            self.embed(part)  # with its graph, as in training
        for handle in handles:
            handle.remove()
        return found[0] if found else "none (the objective itself)"

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the learned logit scale readable for the evaluations."""
        if self.both_towers is not None:
            self._take_scale(self.both_towers.logit_scale)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained and the buffers; frozen weights come from the model preset again."""
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        for name in frozen:
            del checkpoint["state_dict"][name]
        checkpoint["settled"] = self.settled

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Complete the weights, and take the learned logit scale over for a run that was stopped after its last step."""
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}
        self.settled = checkpoint["settled"]
        if self.both_towers is not None:
            self._take_scale(checkpoint["state_dict"]["both_towers.logit_scale"])

    def _take_scale(self, learned: Tensor) -> None:
        self.logit_scale = min(float(learned.detach().exp()), MAX_LEARNED_SCALE)

    def configure_optimizers(self) -> Any:
        """Return AdamW over weights, undecayed vectors and log-scales, with a warm-up and a constant or cosine rate."""
        fit, optim = self.config.fit, self.config.optim
        optimizer = torch.optim.AdamW(self._groups(), lr=fit.lr, betas=(optim.betas[0], optim.betas[1]))

        def rate(step: int) -> float:
            warm = min(1.0, (step + 1) / fit.warmup) if fit.warmup else 1.0
            progress = max(0, step - fit.warmup) / max(1, fit.steps - fit.warmup)
            return warm * (0.5 * (1 + math.cos(math.pi * min(1.0, progress))) if fit.schedule == "cosine" else 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        quantizers = [module for module in self.visual.modules() if isinstance(module, Quantizer)]
        # A dict, because a set has another order in every process, and AdamW's state is restored by position.
        # Of a quantizer's own: the factors of a low-rank adapter inside one are trained as weights are.
        scales = dict.fromkeys(p for quantizer in quantizers for p in quantizer.parameters(recurse=False))
        trained = self.both_towers if self.both_towers is not None else self.visual
        rest = [p for p in trained.parameters() if p.requires_grad and p not in scales]
        decayed = [p for p in rest if p.ndim >= 2]
        undecayed = [p for p in rest if p.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"name": "weights", "params": decayed, "weight_decay": self.config.optim.weight_decay},
            {"name": "vectors", "params": undecayed, "weight_decay": 0.0},
            {"name": "scales", "params": list(scales), "weight_decay": 0.0, "lr": self.config.optim.scale_lr},
        ]
        return [group for group in groups if group["params"]]
