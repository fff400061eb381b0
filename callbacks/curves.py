"""What happens inside while training, against step: gradients, learned scales, clipping, quantization noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from qatlab.quant import Quantizer, layer_report
from qatlab.quant.layers import quant_layers
from qatlab.stopping import Stopped

_REPORTED = ("act_clipped", "weight_sqnr_db", "act_sqnr_db", "output_sqnr_db")


class Curves(L.Callback):
    """Logs, beside the terms of the loss and the probes, what a number at the end of the run cannot tell.

    A kind is the last part of a layer's name (in_proj, out_proj, c_fc, c_proj). Whatever stands at step n was measured
    after n steps, as the loss is.

    * each step: ``grad_norm/total`` and ``grad_norm/<group>`` for the optimizer's groups (weights, vectors, scales), before
      clipping and without the factor of mixed precision; ``scale/<kind>/<weight|act>/log_ratio``, the mean over the
      learned scales s of log(s / s_0), and ``.../abs_log_ratio``, the mean of its magnitude, s_0 being the calibrated scale.
    * at the start and at every probe: ``layers/<kind>/act_clipped`` (fraction of activations beyond the grid) and
      ``layers/<kind>/<weight|act|output>_sqnr_db``, the mean over the layers of ``qatlab.quant.layer_report`` on
      ``images()``, normalised (B, 3, S, S), called once and on rank zero only.

    Nothing that training reads is touched: the weights come out the same with and without it, bit for bit.
    """

    def __init__(self, images: Callable[[], Tensor]) -> None:
        self.images = images
        self._few: Tensor | None = None
        self.learned: dict[str, list[Quantizer]] = {}
        self.initial: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Keep the scales that training starts from: the trainer restores a checkpoint only after this."""
        if stage == "fit":
            self.learned = learned_scales(pl_module.visual)
            self.initial = {name: _log_scales(quantizers) for name, quantizers in self.learned.items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the layers before the first step."""
        self.initial = {name: start.to(pl_module.device) for name, start in self.initial.items()}
        if trainer.global_step == 0:
            self._report(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradient and the movement of the scales."""
        values = _on_host({**gradient_norms(optimizer), **self._movement()})
        pl_module.log_dict(values, on_step=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the layers beside a probe."""
        self._report(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log where the last step took the scales."""
        self._log_movement(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Log the same where a run is told to stop: it may have been the last step."""
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
            if quantizer is not None and any(
                parameter.requires_grad for parameter in quantizer.parameters(recurse=False)
            ):
                found.setdefault(f"{name.rsplit('.', 1)[-1]}/{tensor}", []).append(quantizer)
    return found


def gradient_norms(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return ``grad_norm/total`` and ``grad_norm/<name>`` of each of the optimizer's groups, scalars on their device."""
    norms = {}
    for group in optimizer.param_groups:
        if gradients := [p.grad for p in group["params"] if p.grad is not None]:
            norms[f"grad_norm/{group['name']}"] = get_total_norm(gradients)
    return {"grad_norm/total": torch.stack(list(norms.values())).norm(), **norms} if norms else {}


def layer_means(report: list[dict[str, Any]]) -> dict[str, float]:
    """Return ``layers/<kind>/<column>``, the mean over the layers of a kind; None and infinite (no error at all) are left out."""
    values = {}
    for kind in dict.fromkeys(row["kind"] for row in report):
        for column in _REPORTED:
            of_kind = [row[column] for row in report if row["kind"] == kind]
            known = [value for value in of_kind if value is not None and math.isfinite(value)]
            if known:
                values[f"layers/{kind}/{column}"] = sum(known) / len(known)
    return values


@torch.no_grad()
def _log_scales(quantizers: list[Quantizer]) -> Tensor:
    return torch.cat([quantizer.scale.detach().flatten() for quantizer in quantizers]).log()


def _on_host(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the scalars on the CPU, brought there together: each copy from a GPU by itself would wait for it."""
    return dict(zip(values, torch.stack(list(values.values())).cpu(), strict=True)) if values else {}
