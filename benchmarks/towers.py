"""What quantizing does to the image towers of open_clip's architectures: how much is rounded, and how far the features turn.

python benchmarks/towers.py [ARCHITECTURE ...]               (one small tower of each family)
python benchmarks/towers.py --coverage [ARCHITECTURE ...]    (the first three columns alone, of all architectures)

Products are counted on the meta device, where a tower has shapes and no weights. Weights are random, and no easy ones
(random_towers.py): the input of every layer has outliers. The columns are the products with a weight in 10^9
multiply-accumulates; the share of them with both operands rounded, by default and with the first and last layers; the
smallest absmax / standard deviation of a layer's input; the cosines of the features to those in full precision at 8 bits, by
recipe=ptq, with activations by least squares, and with a zero point besides, and at 4 bits by recipe=ptq; how many times as
large a relative change of the images is in the features, which tells a network that blows up any error from a fault in
rounding; the largest distance of features after each rewrite, relative to their norm, before anything is rounded; and whether
every learned tensor got a gradient in two steps of training.
"""

from __future__ import annotations

import argparse
import copy
import logging
from functools import partial
from typing import Any

import open_clip
import torch
from random_towers import built, images_for, spreads, tower_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.core.errors import UserError
from qatlab.quant import LSQ, MinMax, calibrate, quantize, verify
from qatlab.quant.inspect.coverage import coverage
from qatlab.quant.rewrites.rotation import Rotation
from qatlab.quant.rewrites.smoothquant import SmoothQuant
from qatlab.towers.batch_norms import fold_batch_norms
from qatlab.towers.registry import final_projections

FAMILIES = (
    *("ViT-B-32", "coca_ViT-B-32", "RN50", "convnext_tiny", "MobileCLIP2-S0", "MobileCLIP-B", "ViTamin-S"),
    *("ViT-B-32-SigLIP2-256", "EVA02-B-16", "PE-Core-T-16-384", "vit_medium_patch16_gap_256"),
    *("vit_relpos_medium_patch16_cls_224", "swin_base_patch4_window7_224"),
)
IMAGES = 4
COLUMNS = ("10^9", "default %", "whole %", "absmax / std", "W8A8", "W8A8 mse", "W8A8 mse, zero point", "W4A4", "growth")
WIDTH = 180
COUNTED = 3  # the first columns
REWRITES = ("SmoothQuant", "rotation", "gradients")


def quantized(visual: nn.Module, bits: int, images: Tensor, act: Any = MinMax, **options: Any) -> nn.Module:
    """Return a calibrated copy with a weight scale per output channel and one scale per tensor of activations."""
    weight = partial(act if act is LSQ else MinMax, bits, per_channel=True)
    model = quantize(copy.deepcopy(visual), weight, partial(act, bits, **options))
    calibrate(model, [images])
    return model


def cosine(visual: nn.Module, model: nn.Module, images: Tensor) -> float:
    """Return the mean cosine between the features of both towers."""
    with torch.no_grad():
        return float(F.cosine_similarity(visual(images), model(images)).mean())


def shares(name: str) -> tuple[int, float, float]:
    """Return the products with a weight of one image, and the share with both operands rounded, by default and of all layers."""
    eight, found = partial(MinMax, 8), []
    with torch.device("meta"):
        visual = built(name).eval()
        fold_batch_norms(visual)
    images = images_for(visual, 1).to("meta")
    for whole in (False, True):
        last = whole and bool(final_projections(visual))  # SigLIP's towers end in their pool
        model = quantize(copy.deepcopy(visual), eight, eight, patch_conv=whole, final_proj=last)
        found.append(coverage(model, images, {}))
    total = sum(product.macs for product in found[0].products)
    return total, *(each.shares["product_share"] for each in found)


def without_gradient(visual: nn.Module, images: Tensor) -> list[str]:
    """Return the names of learned tensors that got no gradient in two steps of LSQ."""
    model = quantized(visual, 8, images[:2], LSQ).train()
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-6)
    for _ in range(2):
        optimizer.zero_grad()
        (1 - F.cosine_similarity(model(images[:2]), visual(images[:2]).detach())).mean().backward()
        optimizer.step()
    return [name for name, parameter in learned.items() if parameter.grad is None or not parameter.grad.any()]


def least_squares(visual: nn.Module, images: Tensor) -> list[float]:
    """Return the cosines at 8 bits with activations by least squares, without and with a zero point.

    The first half of ``images`` (2 * B, 3, S, S) calibrates, the second is measured.
    """
    calibration, held_out = images.chunk(2)
    grids = ({"observer": "mse"}, {"observer": "mse", "symmetric": False})
    return [cosine(visual, quantized(visual, 8, calibration, **grid), held_out) for grid in grids]


@torch.no_grad()
def growth(visual: nn.Module, images: Tensor) -> float:
    """Return the relative change of the features over that of ``images`` (B, 3, S, S), for a small one of all their pixels."""
    noise = 1e-4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    before, after = visual(images), visual(images + noise)
    return float((after - before).norm() / before.norm() / (noise.norm() / images.norm()))


def rewritten(visual: nn.Module, rewrite: Any, images: Tensor) -> str:
    """Return how far a rewrite moves the features, relative to their norm, and the parts of it that are left out.

    The parts that are not exact in this tower are those that the rewrite refuses.
    """
    parts: dict[str, bool] = {}
    while True:
        try:
            model = rewrite(**parts)(copy.deepcopy(visual), [images[:2]])
            break
        except UserError as error:
            refused = next((part for part in ("residual", "heads", "mlp") if f"set {part}=false" in str(error)), None)
            if refused is None:
                return "none"
            parts[refused] = False
    with torch.no_grad():
        before, after = visual(images[:2]), model(images[:2])
    distance = float(((after - before).norm(dim=1) / before.norm(dim=1)).max())
    return f"{distance:.0e}" + "".join(f", no {part}" for part in parts)


def counted(name: str) -> list[str]:
    """Return the columns that are counted on the meta device, as they are shown."""
    total, default, whole = shares(name)
    return [f"{total / 1e9:.1f}", f"{100 * default:.2f}", f"{100 * whole:.2f}"]


def row(name: str) -> list[str]:
    """Return the columns of one architecture as they are shown."""
    visual = tower_of(name)
    images = images_for(visual, 2 * IMAGES)
    calibration, held_out = images[:IMAGES], images[IMAGES:]
    eight = quantized(visual, 8, calibration)
    verify(eight, calibration[:2])
    cosines = [f"{cosine(visual, eight, held_out):.4f}", *map("{:.4f}".format, least_squares(visual, images))]
    cosines.append(f"{cosine(visual, quantized(visual, 4, calibration), held_out):.4f}")
    spread = min(spreads(visual, images).values())
    cosines.append(f"{growth(visual, held_out):.1f}")
    missing = without_gradient(visual, images)
    gradients = f"{len(missing)} lack one, {missing[0]}" if missing else "all"
    rewrites = [rewritten(visual, rewrite, images) for rewrite in (SmoothQuant, Rotation)]
    return [*counted(name), f"{spread:.1f}", *cosines, *rewrites, gradients]


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser()
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE")
    parser.add_argument("--coverage", action="store_true", help="count the products alone, of all architectures")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.coverage:
        columns, make, names = COLUMNS[:COUNTED], counted, open_clip.list_models()
    else:
        columns, make, names = (*COLUMNS, *REWRITES), row, FAMILIES
    table = Table("architecture", *columns)
    for name in options.architectures or names:
        found = make(name)
        print(name, *found, flush=True)
        table.add_row(name, *found)
    Console(width=WIDTH).print(table)


if __name__ == "__main__":
    main()
