"""What a run decides once from its machine and keeps when resumed, because another choice would give other bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning as L
import torch

from qatlab.config import FitConfig, QuantConfig
from qatlab.quant.quantizers import kernels
from qatlab.training.memory import free_bytes, largest_micro_batch

# Bytes of the four float32 numbers of a trained weight: its gradient, AdamW's two moments, DDP's copy of the gradient.
BYTES_PER_WEIGHT = 16

MachineChoice = dict[str, Any]
"""``micro_batch``, the images per forward on each device, and ``kernels``, eager or compiled; checkpoints hold it."""


class StepNeeds(NamedTuple):
    """The needs of a training step.

    ``image_bytes`` that an image keeps for the backward, the number of ``trained`` weights, and the numbers of rounded
    elements: of ``weights``, and of ``activations`` per image.
    """

    image_bytes: int
    trained: int
    weights: int
    activations: int


def choose(
    fit: FitConfig, quant: QuantConfig, needs: StepNeeds, trainer: L.Trainer, earlier: MachineChoice | None
) -> MachineChoice:
    """Return the choice for this machine, the same in all processes, and print it on rank zero.

    The options fit.micro_batch and quant.kernels decide first, then ``earlier``, the choice of the run that is resumed,
    then the free memory and the length of the run. Raises UserError for kernels that this machine cannot compile.
    """
    device = trainer.strategy.root_device
    images = fit.batch_size // trainer.world_size
    elements = fit.steps * (needs.weights + images * needs.activations)
    choice: MachineChoice = {
        "micro_batch": _micro_batch(fit.micro_batch, needs, trainer, images),
        "kernels": kernels.choose(quant.kernels, device, elements),
    }
    if earlier and fit.micro_batch is None:
        choice["micro_batch"] = min(earlier["micro_batch"], images)
    if earlier and quant.kernels == "auto":
        # The earlier choice may come from a machine with a compiler, and this machine may have none.
        choice["kernels"] = kernels.choose(earlier["kernels"], device, elements)
    # The device with the least room decides for all: the maximum
    # of negative numbers belongs to the smallest micro-batch.
    least = trainer.strategy.reduce(torch.tensor(-choice["micro_batch"], device=device), reduce_op="max")
    choice = trainer.strategy.broadcast({**choice, "micro_batch": -int(least)})
    if trainer.is_global_zero:
        at_once = choice["micro_batch"]
        share = f"{at_once} of {images} images at a time" if at_once < images else f"all {images} images at once"
        products = "" if quant.matmul == "float" else f", {quant.matmul} products"
        kept = at_once * needs.image_bytes / 2**20
        print(f"  {share} ({kept:.0f} MiB), {choice['kernels']} kernels{products}", flush=True)
    return choice


def _micro_batch(asked: int | None, needs: StepNeeds, trainer: L.Trainer, images: int) -> int:
    """Return how many of ``images`` are computed at once: ``asked`` of them, or as many as fit into the free memory."""
    if asked is not None:
        return min(asked, images)
    free = free_bytes(trainer.strategy.root_device)
    if trainer.strategy.root_device.type == "cpu":
        # All processes of this node share one memory.
        free //= trainer.num_devices
    return largest_micro_batch(images, needs.image_bytes, needs.trained * BYTES_PER_WEIGHT, free)
