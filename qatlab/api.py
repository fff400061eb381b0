"""What programs and notebooks use of qatlab; ``import qatlab`` gives all of it, and loads torch only when it is used.

>>> import qatlab
>>> clip = qatlab.load_clip()
>>> suite = qatlab.load_suite(clip, "suite.images=8")
>>> images = suite["id"]
>>> quantized = qatlab.quantize_model(clip.visual, clip.preprocess.normalize(qatlab.pixels(images)), weight="minmax")
>>> features = qatlab.embed(quantized, images, clip.preprocess)
>>> tuple(features.shape)
(8, 64)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from qatlab.config import QUANT_SLOTS, Config, check_options, compose
from qatlab.config.renamed import with_present_names
from qatlab.config.trust import layouts_of, require_known
from qatlab.core.errors import UserError
from qatlab.data.preprocess import Preprocess
from qatlab.deploy import load as load_export
from qatlab.metrics.calibration import score_zero_shot
from qatlab.metrics.ood import score_images
from qatlab.models import clip as clips
from qatlab.models.clip import Clip
from qatlab.models.quantized import fitted_copy, load_quantized
from qatlab.results import read as read_results
from qatlab.results.finished import FinishedRun
from qatlab.suites.suite import EvaluationSet, Suite, build_suite

__all__ = [
    "FinishedRun",
    "UserError",
    "embed",
    "execute",
    "features",
    "load_clip",
    "load_export",
    "load_quantized",
    "load_suite",
    "open_run",
    "options",
    "pixels",
    "quantize_model",
    "read_results",
    "score_images",
    "score_zero_shot",
]


def options(*overrides: str) -> Config:
    """Return the options that ``python -m qatlab.fit <overrides>`` would run with; raises UserError for a mistake in them.

    >>> options("recipe=ptq", "quant.weight.bits=4").quant.weight["bits"]
    4
    """
    return compose(*overrides)


def execute(config: Config, name: str) -> FinishedRun:
    """Return the finished run of some options: every stage is computed, or read back where an earlier call did.

    It lies in ``<config.output>/<name>-<run id>``; name it after its recipe, as the commands do. What it prints is what
    ``python -m qatlab.fit`` prints. Raises UserError as that does.
    """
    from qatlab.fit import fit

    check_options(config)  # a notebook may have changed them since they were composed
    return FinishedRun(fit(config, name).folder)


def open_run(folder: str | Path) -> FinishedRun:
    """Return the run in a folder, for reading; raises UserError where there is none."""
    return FinishedRun(folder)


def load_clip(*overrides: str) -> Clip:
    """Return a CLIP in eval mode on the CPU, by default the embedded one: "model=vit_b32_openai", "model.checkpoint=FILE".

    ``visual`` maps normalised images (B, 3, S, S) to features (B, D); ``preprocess`` makes such images of files.

    >>> load_clip().facts["model"]
    'tiny'
    """
    return clips.load(compose(*overrides).model)


def load_suite(clip: Clip, *overrides: str) -> Suite:
    """Return a suite with its class prompts encoded by ``clip``: "suite=cifar10", "suite.root=DIR"; ``suite[name]`` is a set.

    Folders of your own are "suite=folders" with "+suite.sets.mine={path: DIR, role: id}". Raises UserError for sets that are
    not there, and for the embedded ones, which are the default, with another model than the embedded one.
    """
    return build_suite(compose(*overrides).suite, clip)


def quantize_model(
    visual: nn.Module, images: Tensor, weight: Any = "minmax", act: Any = "minmax", **slots: Any
) -> nn.Module:
    """Return a quantized copy of an image tower, its scales fitted on normalised ``images`` (n, 3, S, S); ``visual`` stays.

    ``weight`` and ``act`` are choices of ``quant/weight=`` and ``quant/act=`` by name, blocks such as
    ``{"_target_": "qatlab.quant.MinMax", "bits": 4}``, or None for full precision. ``slots`` are the other options of
    ``quant``: rewrite, plan, adapter and compensate likewise, first, last and rules as they are. Raises UserError for
    what does not fit.

    >>> clip = load_clip()
    >>> images = torch.zeros(2, 3, clip.preprocess.size, clip.preprocess.size)
    >>> tower = quantize_model(clip.visual, images, weight="mse", act=None)
    >>> tower(images).shape
    torch.Size([2, 64])
    """
    # Names are composed by Hydra as on the command line; blocks and plain values are put into the result.
    asked = {"weight": weight, "act": act, **with_present_names(slots)}
    named = [f"quant/{slot}={asked.pop(slot)}" for slot in QUANT_SLOTS if isinstance(asked.get(slot), str)]
    quant = compose(*named).quant
    for slot, value in asked.items():
        if not hasattr(quant, slot):
            raise UserError(f"{slot} is not an option of quant; there are {', '.join(vars(quant))}.")
        setattr(quant, slot, value)
    model, _ = fitted_copy(visual, quant, lambda: images.split(64))
    return model.eval()


def pixels(images: EvaluationSet) -> Tensor:
    """Return the images of a set as a model's preprocessing crops them, (n, 3, S, S) uint8, in the order of the set."""
    # __getitems__ draws the images of a rendered set together, which is faster than one by one.
    places = list(range(len(images.images)))
    return torch.stack([image for image, _, _ in images.images.__getitems__(places)])


@torch.no_grad()
def embed(visual: nn.Module, images: EvaluationSet | Tensor, preprocess: Preprocess, batch_size: int = 64) -> Tensor:
    """Return the unit features (n, D) float32, on the CPU, of a set or of uint8 ``images`` (n, 3, S, S), by an image tower."""
    # On the device that the tower is on already: moving it there is up to the caller, whose tower it is.
    uint8 = pixels(images) if isinstance(images, EvaluationSet) else images
    device = next((tensor.device for tensor in visual.parameters()), torch.device("cpu"))
    found = []
    for part in uint8.split(batch_size):
        found.append(normalize(visual(preprocess.normalize(part.to(device))).float(), dim=-1).cpu())
    return torch.cat(found)


def features(run: FinishedRun, name: str, stage: str | None = None, trust: bool = False) -> Tensor:
    """Return the unit features (n, D) of a set of the run's suite by the image tower of a stage, by default the last one.

    ``trust`` lets the run's files name quantizers and layouts that are not qatlab's, whose code then runs. Raises UserError
    for a run that names some without it.
    """
    require_known(layouts_of(run.config.suite), run.folder / "config.yaml", trust)
    clip = clips.load(run.config.model)
    suite = build_suite(run.config.suite, clip)
    return embed(run.encoder(stage, trust), suite[name], clip.preprocess)
