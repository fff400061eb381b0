"""What a training run decides once by looking at the machine, and keeps when it is resumed: another choice, other bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from qatlab.memory import free_bytes, largest_micro_batch
from qatlab.quant import kernels
from qatlab.quant.calibrate import rounded_elements

if TYPE_CHECKING:
    from qatlab.module import Student

# Of each trained weight: its gradient, AdamW's two moments, and DDP's copy of the gradient.
BYTES_PER_WEIGHT = 16

Settled = dict[str, Any]


def settle(module: Student, trainer: L.Trainer, earlier: Settled | None) -> Settled:
    """Return ``micro_batch`` (images per forward on each device) and ``kernels`` (eager or compiled), printed on rank zero.

    The options fit.micro_batch and quant.kernels decide, else ``earlier``, the choice of the run that is resumed, else
    the free memory and the length of the run. Raises UserError for kernels that cannot be had here.
    """
    config, device = module.config, trainer.strategy.root_device
    images = config.fit.batch_size // trainer.world_size
    size = torch.zeros(1, 3, module.preprocess.size, module.preprocess.size, device=device)
    weights, activations = rounded_elements(module.visual, size)
    elements = config.fit.steps * (weights + images * activations)
    assert module.rows is not None
    per_image = module.rows.bytes_per_image()
    settled: Settled = {
        "micro_batch": _micro_batch(module, trainer, images, per_image),
        "kernels": kernels.choose(config.quant.kernels, device, elements),
    }
    if earlier and config.fit.micro_batch is None:
        settled["micro_batch"] = min(earlier["micro_batch"], images)
    if earlier and config.quant.kernels == "auto":
        # It may have been settled on a machine that has a compiler.
        settled["kernels"] = kernels.choose(earlier["kernels"], device, elements)
    # The device with the least room decides for all.
    least = trainer.strategy.reduce(torch.tensor(-settled["micro_batch"], device=device), reduce_op="max")
    settled = trainer.strategy.broadcast({**settled, "micro_batch": -int(least)})
    if trainer.is_global_zero:
        at_once = settled["micro_batch"]
        share = f"{at_once} of {images} images at a time" if at_once < images else f"all {images} images at once"
        products = "" if config.quant.matmul == "float" else f", {config.quant.matmul} products"
        print(f"  {share} ({at_once * per_image / 2**20:.0f} MiB), {settled['kernels']} kernels{products}", flush=True)
    return settled


def _micro_batch(module: Student, trainer: L.Trainer, images: int, per_image: int) -> int:
    if (asked := module.config.fit.micro_batch) is not None:
        return min(asked, images)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    free = free_bytes(trainer.strategy.root_device)
    if trainer.strategy.root_device.type == "cpu":
        free //= trainer.num_devices  # all of the node's processes take from it
    return largest_micro_batch(images, per_image, trained * BYTES_PER_WEIGHT, free)
