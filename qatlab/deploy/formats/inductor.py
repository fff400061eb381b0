"""The program of torch.export, and the int8 kernels of inductor that run it on a CPU."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qatlab.core.extras import require
from qatlab.deploy.blocks import with_blocks
from qatlab.deploy.formats.onnx import unreadable
from qatlab.deploy.integer import integer_layers
from qatlab.deploy.parity import Part

FILE = "model.pt2"
# torch's own counter of the linear layers in which inductor found its int8 patterns.
_MATCHED = "qlinear_weight_prepack_matcher_count"


def write(model: nn.Module, folder: Path, size: int) -> Path:
    """Return the file to which an ``integer_copy`` was written as an exported program, for any number of images."""
    batch = torch.export.Dim("batch", min=1, max=65536)
    # The example has two images, because torch.export would take a size of one for a constant.
    with torch.no_grad():
        program = torch.export.export(model, (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / FILE)
    return folder / FILE


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside this context torch's compiler prints no warnings and no advice, on which no user of qatlab can act."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


class TorchModel:
    """Features (B, D) float32 of preprocessed images (B, 3, S, S) float32, compiled by inductor at the first call.

    Compiling takes half a minute and a C++ compiler, once for one image and once for any other number. torchao has the
    patterns that turn quantize, dequantize and linear into integer products.
    """

    def __init__(self, program: Path | nn.Module, threads: int | None = None) -> None:
        # Importing this module of torchao registers its patterns with inductor, which otherwise multiplies floats.
        with _quiet():
            require("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        if threads:
            torch.set_num_threads(threads)
        if isinstance(program, Path):
            try:
                model: Any = torch.export.load(program).module()
            except Exception as error:  # the errors of zipfile, pickle and torch have no other common class
                raise unreadable(program, error) from error
        else:
            model = program
        self.compiled = torch.compile(model, dynamic=True)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the features (B, D) float32 of ``images`` (B, 3, S, S) float32."""
        return self.outputs(images)[0]

    @torch.no_grad()
    def outputs(self, images: np.ndarray) -> list[np.ndarray]:
        """Return all outputs of the program for ``images`` (B, 3, S, S) float32, the features (B, D) first."""
        # Freezing turns the weights into constants, and inductor packs only constants for int8 products.
        with torch._inductor.config.patch(freezing=True), _quiet():
            found = self.compiled(torch.from_numpy(np.ascontiguousarray(images)))
        return [output.numpy() for output in (found if isinstance(found, tuple) else (found,))]


class LayerPrograms:
    """The integer layers of a model, each compiled by itself."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = integer_layers(model)

    def part(self, name: str) -> Part:
        """Return a layer as inductor runs it."""
        layer = self.layers[name]
        torch.compiler.reset()  # torch stops compiling a function after eight versions; models have more layers
        compiled = TorchModel(layer)
        return Part(compiled, lambda x: layer.rounded(torch.from_numpy(x)).numpy(), True)

    def write(self, name: str, x: np.ndarray, path: Path) -> None:
        """Write the layer ``name`` as a program of its own to ``path``, for inputs of the shape of ``x`` (..., K)."""
        with torch.no_grad():
            torch.export.save(torch.export.export(self.layers[name], (torch.from_numpy(x),)), path)


def block_outputs(model: nn.Module, size: int, names: Sequence[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """Return what the blocks ``names`` of an ``integer_copy`` give, compiled with it, for ``images`` (B, 3, size, size)."""
    with torch.no_grad(), with_blocks(model, torch.zeros(2, 3, size, size)) as known:
        program = torch.export.export(model, (torch.from_numpy(images),))
    compiled = TorchModel(program.module()).outputs(images)
    # The model's own outputs come first.
    found = dict(zip(known, compiled[-len(known) :], strict=True))
    return {name: found[name] for name in names}


def integer_products(model: TorchModel, images: np.ndarray) -> int:
    """Return how many linear layers run as integer products after ``model`` is compiled for ``images`` (B, 3, S, S)."""
    from torch._dynamo.utils import counters

    # A model that is compiled already would not be matched again, and its layers would not be counted.
    torch._dynamo.reset()
    counters.clear()
    model(images)
    return int(counters["inductor"][_MATCHED])
