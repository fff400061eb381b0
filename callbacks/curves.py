"""Curves of a training against its step: gradients, learned scales, clipping, quantization noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from qatlab.core.signals import Stopped
from qatlab.quant import Quantizer, layer_report
from qatlab.quant.layers.walk import quant_layers

_REPORTED = ("act_clipped", "weight_sqnr_db", "act_sqnr_db", "output_sqnr_db")


class Curves(L.Callback):
    """Logs, beside the terms of the loss and the probes, what a number at the end of the run cannot tell.

    A kind is the last part of a layer's name (in_proj, out_proj, c_fc, c_proj). A value at step n was measured after n
    steps, as the loss is.

    * each step: ``grad_norm/total`` and ``grad_norm/<group>`` for the optimizer's groups (weights, vectors, scales),
      before clipping and without the factor of mixed precision; ``scale/<kind>/<weight|act>/log_ratio``, the mean over
      the learned scales s of log(s / s_0), where s_0 is the calibrated scale, and ``.../abs_log_ratio``, the mean of
      the magnitude of the logarithm.
    * at the start and at every probe: ``layers/<kind>/act_clipped`` (fraction of activations beyond the grid) and
      ``layers/<kind>/<weight|act|output>_sqnr_db``, the mean over the layers of ``qatlab.quant.layer_report`` on
      ``images()``, normalised (B, 3, S, S), called once and on rank zero only.

    Training reads nothing that this callback writes: the weights are the same with and without it, bit for bit.
    """

    def __init__(self, images: Callable[[], Tensor]) -> None:
        self.images = images
        self._few: Tensor | None = None
        self._reported: int | None = None  # the step of the last report
        self.learned: dict[str, list[Quantizer]] = {}
        self.initial: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Keep the calibrated scales; the trainer restores the scales of a checkpoint only after this hook."""
        if stage == "fit":
            self.learned = learned_scales(pl_module.visual)
            self.initial = {name: _log_scales(quantizers) for name, quantizers in self.learned.items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the layers before the first step."""
        self.initial = {name: start.to(pl_module.device) for name, start in self.initial.items()}
        # The curves of a run that goes on from a checkpoint already have the report of step 0.
        if trainer.global_step == 0:
            self._report(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradient and the movement of the scales."""
        values = _on_host({**gradient_norms(optimizer), **self._movement()})
        pl_module.log_dict(values, on_step=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the layers beside a probe, before it counts as done."""
        self._report(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Log where the last step took the scales, before its checkpoint is written."""
        if trainer.global_step == trainer.max_steps:
            self._log_movement(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Log where the last step took the scales when a run is told to stop, for no further step does."""
        if isinstance(exception, Stopped):
            self._log_movement(trainer)

    def _log_movement(self, trainer: L.Trainer) -> None:
        moved = {name: value.item() for name, value in _on_host(self._movement()).items()}
        for logger in trainer.loggers if moved else ():
            logger.log_metrics(moved, step=trainer.global_step)

    @torch.no_grad()
    def _movement(self) -> dict[str, Tensor]:
        """Return the mean of log(s / s_0) and of its magnitude, per kind and tensor, on the module's device."""
        values: dict[str, Tensor] = {}
        for name, quantizers in self.learned.items():
            moved = _log_scales(quantizers) - self.initial[name]
            values |= {f"scale/{name}/log_ratio": moved.mean(), f"scale/{name}/abs_log_ratio": moved.abs().mean()}
        return values

    def _report(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not (trainer.is_global_zero and trainer.loggers and quant_layers(pl_module.visual)):
            return
        # A probe at step 0 and the start of training right after it see the same layers.
        if self._reported == pl_module.step:
            return
        self._reported = pl_module.step
        # The images are read once, so that the reports of a run differ by the model alone.
        if self._few is None:
            self._few = self.images()
        values = layer_means(layer_report(pl_module.visual, self._few))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=pl_module.step)


def learned_scales(visual: nn.Module) -> dict[str, list[Quantizer]]:
    """Return the quantizers of ``visual`` that learn a scale, by "<kind>/weight" and "<kind>/act"."""
    found: dict[str, list[Quantizer]] = {}
    for name, layer in quant_layers(visual).items():
        for tensor, quantizer in (("weight", layer.weight_quantizer), ("act", layer.act_quantizer)):
            # A learned scale is a parameter of the quantizer itself;
            # other quantizers compute the scale or keep a buffer.
            if quantizer is not None and any(
                parameter.requires_grad for parameter in quantizer.parameters(recurse=False)
            ):
                found.setdefault(f"{name.rsplit('.', 1)[-1]}/{tensor}", []).append(quantizer)
    return found


def gradient_norms(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return {"grad_norm/total": its norm, "grad_norm/<group>": ...} of the optimizer's groups, () on their device."""
    norms = {}
    for group in optimizer.param_groups:
        if gradients := [p.grad for p in group["params"] if p.grad is not None]:
            norms[f"grad_norm/{group['name']}"] = get_total_norm(gradients)
    # The norm over all tensors equals the norm of the groups' norms.
    return {"grad_norm/total": torch.stack(list(norms.values())).norm(), **norms} if norms else {}


def layer_means(report: list[dict[str, Any]]) -> dict[str, float]:
    """Return ``layers/<kind>/<column>``: the mean over the layers of a kind that have a finite value."""
    values = {}
    for kind in dict.fromkeys(row["kind"] for row in report):
        for column in _REPORTED:
            of_kind = [row[column] for row in report if row["kind"] == kind]
            # The report has None where a layer has nothing to measure, such as an input that is not quantized.
            known = [value for value in of_kind if value is not None and math.isfinite(value)]
            if known:
                values[f"layers/{kind}/{column}"] = sum(known) / len(known)
    return values


@torch.no_grad()
def _log_scales(quantizers: list[Quantizer]) -> Tensor:
    """Return the logarithms of all scales of some quantizers, (n,)."""
    return torch.cat([quantizer.scale.detach().flatten() for quantizer in quantizers]).log()


def _on_host(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return scalars on the CPU, copied there together, because every copy from a GPU waits for the GPU to finish."""
    return dict(zip(values, torch.stack(list(values.values())).cpu(), strict=True)) if values else {}
