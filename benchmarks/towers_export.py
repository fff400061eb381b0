"""What becomes of the image towers of open_clip's architectures as integer models, with random weights.

python benchmarks/towers_export.py [ARCHITECTURE ...]        (one small tower of each family)

Every layer is quantized, first and last ones too. The columns are, for ONNX Runtime and for OpenVINO: the layers, the
products that run in integers (a layer that the runtime splits counts twice), how far the features are from the
simulation's, and the block that is the furthest off in the running model, relative to what quantization changes of it.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from towers import FAMILIES, images_for, tower_of

from qatlab.deploy.formats import onnx, openvino
from qatlab.deploy.integer import integer_copy, integer_layers
from qatlab.deploy.parity import BlockParity, compare_blocks
from qatlab.quant import MinMax, calibrate, quantize
from qatlab.towers.registry import final_projections

IMAGES = 4
COLUMNS = ("layers", "ONNX integers", "features", "worst block", "OpenVINO integers", "features", "worst block")


def told(blocks: list[BlockParity]) -> list[str]:
    """Return the error of the features, and the block that is the furthest off, as they are shown."""
    worst = max(blocks, key=lambda of: of.error / of.simulated)
    said = f"{worst.block} {worst.error:.1e} / {worst.simulated:.1e}"
    return [f"{blocks[-1].error:.1e}", said if worst.passed else f"FAILS: {said}"]


def row(name: str, folder: Path) -> list[str]:
    """Return the columns of one architecture as they are shown."""
    visual: Any = tower_of(name)
    images = images_for(visual, IMAGES)
    weight = partial(MinMax, 8, per_channel=True)
    last = bool(final_projections(visual))  # SigLIP's towers end in their pool
    model = quantize(visual, weight, partial(MinMax, 8), patch_conv=True, final_proj=last)
    calibrate(model, [images])
    integer, size = integer_copy(model.eval()), images.shape[-1]
    file = onnx.write(integer, folder, size)
    features = torch.from_numpy(onnx.OnnxModel(file)(images.numpy()))
    found = told(compare_blocks(model, images, partial(onnx.block_outputs, file), features))
    shown = [str(len(integer_layers(integer))), str(onnx.integer_products(file)), *found]
    file = openvino.write(openvino.source(integer, folder, size), folder)
    served = openvino.OpenVinoModel(file)
    features = torch.from_numpy(served(images.numpy()))
    every, integers = served.integer_products()
    found = told(compare_blocks(model, images, partial(openvino.block_outputs, file), features))
    return [*shown, f"{integers} of {every}", *found]


def main() -> None:
    """Print the table, a row as soon as it is known."""
    logging.disable(logging.WARNING)
    table = Table("architecture", *COLUMNS)
    for name in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found = row(name, Path(folder))
        print(name, *found, flush=True)
        table.add_row(name, *found)
    Console().print(table)


if __name__ == "__main__":
    main()
