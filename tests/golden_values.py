"""What qatlab promises to users who keep runs and caches: ids, definitions, names and rows, as they are now.

``python tests/golden_values.py`` writes them to tests/golden/, which a change of any of them does together with CHANGELOG.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qatlab.config import ModelConfig, SetConfig, SuiteConfig, compose, is_quantized, recipe_files
from qatlab.core.signals import StopSignals
from qatlab.models import clip as clips
from qatlab.models.quantized import quantized_copy, quantized_text
from qatlab.results.identity import evaluation_id, run_id
from qatlab.results.run import Run
from qatlab.stages.opening import open_experiment
from qatlab.suites.suite import Suite, build_suite

FOLDER = Path(__file__).parent / "golden"
CLASSES = ["circle", "star"]
RUNS = ("ptq", "light_qat_lsq")
# What differs from machine to machine or from commit to commit.
OF_MACHINE = ("config", "versions", "commit")


def ids() -> dict[str, Any]:
    """The run id and the evaluation id of every recipe."""
    configs = {recipe: compose(f"recipe={recipe}") for recipe in recipe_files()}
    return {recipe: [run_id(config), evaluation_id(config)] for recipe, config in configs.items()}


def states() -> dict[str, list[str]]:
    """The names of the tensors that every recipe's quantized towers store, recipes that share them named together."""
    model = clips.load(ModelConfig()).model
    found: dict[str, list[str]] = {}
    for recipe in recipe_files():
        quant = compose(f"recipe={recipe}").quant
        if is_quantized(quant, "visual"):
            names = list(quantized_copy(model.visual, quant).state_dict())
            same = next((known for known, of in found.items() if of == names), None)
            found[f"{same}, {recipe}" if same else recipe] = found.pop(same) if same else names
    quant = compose("recipe=ptq", "quant.tower=text").quant
    return {**found, "ptq quant.tower=text": list(quantized_text(model, quant).state_dict())}


def sets(folder: Path) -> dict[str, Any]:
    """The definition of every embedded set, and per layout of a tree below ``folder``; ids of images; store keys."""
    config = compose("recipe=ptq", f"output={folder / 'runs'}", "trainer.accelerator=cpu", "wandb.mode=disabled")
    with StopSignals() as stop:
        experiment = open_experiment(config, Run(config, "ptq"), "ptq", stop)
    entries = {name: SetConfig(path=path, role="id") for name, path in write_tree(folder / "tree").items()}
    suite = SuiteConfig(root=str(folder / "tree"), sets=entries, class_names=CLASSES)
    return {
        "fp32 store key": experiment.towers.full_key,
        "embedded": _told(experiment.suite),
        "layouts": _told(build_suite(suite, experiment.towers.full)),
    }


def _told(suite: Suite) -> dict[str, Any]:
    return {
        entry.source.name: {
            "definition": entry.source.definition,
            "pool": entry.images.images.pool,
            "ids": entry.images.images.ids([0, 1]),
        }
        for entry in suite.sets
    }


def rows(run_small: Callable[..., Run], folder: Path) -> dict[str, Any]:
    """The rows of small runs, without what tells machine and commit."""
    found = {}
    for recipe in RUNS:
        stored = run_small(recipe, folder, "suite.resamples=20").rows()
        found[recipe] = [{key: value for key, value in row.items() if key not in OF_MACHINE} for row in stored]
    return found


def write_tree(root: Path) -> dict[str, str]:
    """Write two grey images of its own in every layout that is read; returns {layout: path of the set below ``root``}."""
    for label, name in enumerate(CLASSES):
        _write(root / "folders" / name / "0.ppm", 10 + label)
        _write(root / "imglist" / f"{label}.ppm", 20 + label)
        _write(root / "manifest" / f"{label}.ppm", 30 + label)
        _write(root / "tiny" / "images" / f"{label}.ppm", 40 + label)
    (root / "imglist" / "test.txt").write_text("0.ppm 0\n1.ppm 1\n")
    with (root / "manifest" / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), ("0.ppm", 0), ("1.ppm", 1)])
    (root / "tiny" / "val_annotations.txt").write_text("0.ppm\tcircle\t0\n1.ppm\tstar\t0\n")
    for folder in ("web/test", "cifar", "npy"):
        (root / folder).mkdir(parents=True)
    (root / "web" / "test" / "nshards.txt").write_text("1")
    (root / "web" / "classnames.txt").write_text("circle\nstar\n")
    with tarfile.open(root / "web" / "test" / "0.tar", "w") as tar:
        for label in (0, 1):
            _add(tar, f"{label}.cls", str(label).encode())
            _add(tar, f"{label}.png", picture(50 + label))  # decoders go by the content
    images = np.stack([np.full(3072, value, np.uint8) for value in (60, 61)])
    (root / "cifar" / "test_batch").write_bytes(pickle.dumps({"data": images, "labels": [0, 1]}, protocol=2))
    (root / "cifar" / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}, protocol=2))
    np.save(root / "npy" / "fog.npy", 10 + images.reshape(2, 32, 32, 3))
    np.save(root / "npy" / "labels.npy", np.array([0, 1]))
    return {
        "folders": "folders",
        "imglist": "imglist/test.txt",
        "manifest": "manifest/test.csv",
        "tiny_imagenet": "tiny",
        "webdataset": "web",
        "cifar": "cifar",
        "npy": "npy/fog.npy",
    }


def _write(file: Path, value: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(picture(value))


def picture(value: int, size: int = 64) -> bytes:
    """A grey image as a file whose bytes depend on no library."""
    return b"P6 %d %d 255\n" % (size, size) + bytes([value]) * (3 * size * size)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def stored(name: str) -> Any:
    """What lies in tests/golden/."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def main() -> None:
    """Write all of it anew."""
    import torch
    from conftest import run_small

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["QATLAB_CACHE"] = f"{temporary}/cache"
        folder = Path(temporary)
        found = {"ids": ids(), "states": states(), "sets": sets(folder), "rows": rows(run_small, folder)}
    for name, values in found.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")
    print(f"written: {', '.join(found)} in {FOLDER}", file=sys.stderr)


if __name__ == "__main__":
    main()
