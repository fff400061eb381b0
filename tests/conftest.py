"""What every test shares: caches in a temporary folder, no W&B, a small run, and real data where there is some."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import forked
import pictures
import pytest
import torch
from brief import with_options
from omegaconf import OmegaConf

from qatlab.config import Config, compose, recipe_files
from qatlab.config.heeded import IN_SWEEP
from qatlab.fit import fit
from qatlab.results.run import Run

ROOT = Path(__file__).resolve().parents[1]
SETS = OmegaConf.load(recipe_files("suite")["embedded"]).sets
# One process, four small sets, two steps: about three seconds.
SMALL = [
    "trainer.accelerator=cpu",
    "suite.images=32",
    "suite.resamples=5",  # 1000 would be most of such a run
    *(f"~suite.sets.{name}" for name in SETS if name not in ("id", "calibration", "near_ood", "noise")),
    "suite.probe_sets=[id,near_ood]",
    "suite.probe_images=16",
    "quant.calibration_images=16",
    "data.samples=64",
    "fit.eval_every=1",
    "fit.workers=0",
    "wandb.mode=disabled",
]
TRAINING = ["fit.steps=2", "fit.batch_size=8", "fit.unique_samples=16"]


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QATLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("WANDB_SILENT", "true")
        # SMALL goes to every command of the tests, as what a sweep is given goes to every run: nothing of it is refused for
        # having no effect in one.
        patch.setenv(IN_SWEEP, "1")
        # Threads that share small tensors mostly wait for each other, a hundredfold where another process has a core.
        torch.set_num_threads(1)
        patch.setenv("OMP_NUM_THREADS", "1")
        pictures.leave_blank()
        # All modules are imported now and stay. A collection would look at their million objects each time, which takes a
        # sixth of a small run.
        gc.collect()
        gc.freeze()
        yield
        # A failed run's loader, which only a cycle of its error holds, still has its processes; these heed no signal, and the
        # end of this process would wait for them.
        gc.collect()


@pytest.fixture
def rendered() -> Iterator[None]:
    """In such a test pictures are drawn, where they are blank otherwise."""
    with pictures.rendered():
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test images; without it the test is skipped."""
    folder = Path(os.environ.get("QATLAB_TEST_DATA") or ROOT / "../shared/data").resolve()
    if not folder.is_dir():
        pytest.skip(f"no real test data at {folder} (set QATLAB_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def vit_b16_weights(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image tower of OpenAI's CLIP ViT-B/16 in float16; without it the test is skipped."""
    folder, checkpoint = shared_data / "clip_vitb16", tmp_path_factory.mktemp("weights") / "visual.safetensors"
    if not folder.is_dir():
        pytest.skip(f"no real ViT-B/16 at {folder}")
    unpack = [sys.executable, str(folder / "unpack.py"), str(checkpoint), "--dtype", "float16"]
    subprocess.run(unpack, check=True, capture_output=True)
    return checkpoint


@lru_cache
def composed(*overrides: str) -> Config:
    """The options, composed once: that takes a third of a second. Whoever changes them takes a copy."""
    return compose(*overrides)


def trains(recipe: str) -> bool:
    """Whether the recipe trains anything by itself."""
    return composed(f"recipe={recipe}").fit.steps > 0


def options(recipe: str, *overrides: str) -> Config:
    """The options of a run that takes seconds."""
    base = [*SMALL, *(TRAINING if trains(recipe) else [])]
    if recipe == "pretrain_tiny":
        base = [option for option in base if not option.startswith(("data.samples", "fit.unique"))]
    where = [override for override in overrides if override.startswith("output=")]  # another one each time
    others = [override for override in overrides if override not in where]
    config = deepcopy(composed(f"recipe={recipe}", *with_options(base, *others)))
    config.output = where[-1].partition("=")[2] if where else config.output
    return config


def run_small(recipe: str, folder: Path, *overrides: str) -> Run:
    """Such a run, done, below ``folder``."""
    return fit(options(recipe, f"output={folder}", *overrides), recipe)


@pytest.fixture(scope="session")
def small() -> Callable[..., Config]:
    return options


@pytest.fixture(scope="session")
def small_fit() -> Callable[..., Run]:
    return run_small


@pytest.fixture(scope="session")
def subprocess_environment() -> dict[str, str]:
    """What a ``python`` started by a test needs to import this checkout and this file."""
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


@pytest.fixture(scope="session")
def python(subprocess_environment: dict[str, str]) -> Iterator[str]:
    """A ``python`` for commands that need not be started for real: in half a second, with all imports done (forked.py)."""
    with TemporaryDirectory(prefix="qatlab-") as folder, forked.server(Path(folder), subprocess_environment) as program:
        yield program


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of this test's own: nothing of other tests lies there."""
    monkeypatch.setenv("QATLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a test has just written count as old ones, whose content is remembered."""
    monkeypatch.setattr("qatlab.core.contents.YOUNG", 0)


@pytest.fixture
def calls(clip: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each call of the text tower of the test's ``clip`` got."""
    found: list[int] = []
    encode = clip.model.encode_text
    monkeypatch.setattr(clip.model, "encode_text", lambda tokens: (found.append(len(tokens)), encode(tokens))[1])
    return found


@pytest.fixture(scope="session")
def small_options() -> list[str]:
    """The overrides that make a run small, for a command line."""
    return list(SMALL)
