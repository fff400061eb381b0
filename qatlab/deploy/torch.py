"""torch.export's program, and inductor's int8 kernels that run it on a CPU."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qatlab.deploy.extras import require
from qatlab.deploy.integer import integer_layers
from qatlab.deploy.onnx import unreadable
from qatlab.deploy.parity import Part

FILE = "model.pt2"
_MATCHED = "qlinear_weight_prepack_matcher_count"


def write(model: nn.Module, folder: Path, size: int) -> Path:
    """Return the file that an ``integer_copy`` was written to as an exported program, for any number of images."""
    batch = torch.export.Dim("batch", min=1, max=65536)
    with torch.no_grad():
        program = torch.export.export(model, (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / FILE)
    return folder / FILE


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside this context the compiler keeps its advice about itself to itself."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


class TorchModel:
    """Features (B, D) float32 of preprocessed images (B, 3, S, S) float32, compiled by inductor at the first call.

    That takes half a minute and a C++ compiler, once for one image and once for any other number. The patterns that
    make integer products of quantize, dequantize and linear are torchao's.
    """

    def __init__(self, program: Path | nn.Module, threads: int | None = None) -> None:
        with _quiet():
            require("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        if threads:
            torch.set_num_threads(threads)
        if isinstance(program, Path):
            try:
                model: Any = torch.export.load(program).module()
            except Exception as error:  # zipfile's, pickle's and torch's own
                raise unreadable(program, error) from error
        else:
            model = program
        self.compiled = torch.compile(model, dynamic=True)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the features."""
        with torch._inductor.config.patch(freezing=True), _quiet():
            found = self.compiled(torch.from_numpy(np.ascontiguousarray(images)))
        return (found[0] if isinstance(found, tuple) else found).numpy()


class LayerPrograms:
    """The integer layers of a model, each compiled by itself."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = integer_layers(model)

    def part(self, name: str) -> Part:
        """Return a layer as inductor runs it."""
        layer = self.layers[name]
        torch.compiler.reset()  # inductor gives up on a function that it has compiled eight times
        compiled = TorchModel(layer)
        return Part(compiled, lambda x: layer.rounded(torch.from_numpy(x)).numpy(), True)


def integer_products(model: TorchModel, images: np.ndarray) -> int:
    """Return how many linear layers become products of integers where ``model`` is compiled for ``images``."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model(images)
    return int(counters["inductor"][_MATCHED])
