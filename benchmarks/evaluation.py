"""What scoring a suite costs over the encoder's own time.

python benchmarks/evaluation.py [--images 1000] [--model vit_b16_openai] [--scores msp,mcm,knn]

An ID set with 1000 classes and two OOD sets, all scores that need no text tower, every metric with its interval: decoding,
encoder, features to disk and back, scores, metrics, bootstrap, rows, per-image predictions. The reference is the same
batches, decoded before, through the image tower alone, in the same process. Times are process CPU times after imports and
model load. Weights are random, the images smooth noise of 500 x 375 pixels as JPEG.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from pathlib import Path

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import resize

from qatlab.config import SetConfig, compose
from qatlab.core.signals import StopSignals
from qatlab.data.texttable import TextTable, save_text_table
from qatlab.results.run import Run
from qatlab.stages.experiment import Experiment
from qatlab.stages.opening import open_experiment
from qatlab.stages.score import score
from qatlab.suites.source import View

TARGET = 1.15


def main() -> None:
    """Print the times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--model", default="vit_b16_openai")
    parser.add_argument("--scores", default="msp,energy,max_logit,mcm,entropy,mahalanobis,knn,vim")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["QATLAB_CACHE"] = str(root / "cache")
        measure(root, options)


def measure(root: Path, options: argparse.Namespace) -> None:
    """Score a suite below ``root`` and run the tower by itself."""
    write_images(root / "images", options.images)
    experiment = build(root, options)
    start = time.process_time()
    score([(experiment, [View("fp32", experiment.towers.full.logit_scale)])])
    total = time.process_time() - start
    images = torch.stack([experiment.suite.sets[0].images.images.at(place) for place in range(options.images)])
    batches = experiment.towers.full.preprocess.normalize(images).split(experiment.config.suite.batch_size)
    start = time.process_time()
    with torch.no_grad():
        for batch in batches:
            experiment.towers.full.visual(batch)
    encoder = time.process_time() - start
    print(
        f"{options.images} images, {experiment.work.decoded} decoded, {sum(experiment.work.encoded.values())} encoded"
    )
    print(f"encoder {encoder:.1f} s, all of it {total:.1f} s: {total / encoder:.3f} [{TARGET}]")


def build(root: Path, options: argparse.Namespace) -> Experiment:
    """Return an experiment with a tower of random weights and three sets of the same images."""
    torch.manual_seed(0)
    preset = compose(f"model={options.model}").model
    visual = open_clip.create_model(preset.name).visual
    save_file({f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}, root / "weights.safetensors")
    names = [f"class {i}" for i in range(1000)]
    features = torch.randn(1000, visual.output_dim)
    save_text_table(root / "texts.safetensors", {"classes": TextTable(features, names, "")})
    (root / "names.txt").write_text("\n".join(f"c{i:04d}" for i in range(1000)))
    config = compose(
        f"model={options.model}",
        f"model.checkpoint={root}/weights.safetensors",
        f"model.text_features={root}/texts.safetensors",
        "suite=folders",
        f"suite.root={root}",
        f"callbacks.ood.scores=[{options.scores}]",
        f"callbacks.predictions.scores=[{options.scores}]",
        "callbacks.temperature=null",
        "wandb.mode=disabled",
        "fit.workers=0",
        f"output={root}/runs",
        "~quant/weight",
        "~quant/act",
    )
    half = options.images // 2
    config.suite.sets = {
        "id": SetConfig("images", "id", pick=f":{half}", classes="names.txt"),
        "calibration": SetConfig("images", "calibration", pick=f"{half}:", classes="names.txt"),
        "near": SetConfig("images", "near_ood", pick=f"{half}:"),
        "far": SetConfig("images", "far_ood", pick=f"{half}::2"),
    }
    run = Run(config, "benchmark")
    run.__enter__()
    return open_experiment(config, run, "benchmark", StopSignals())


def write_images(folder: Path, images: int) -> None:
    """Write JPEGs of smooth noise, 1000 classes in turn, as folders."""
    generator = torch.Generator().manual_seed(0)
    for i in range(images):
        small = torch.randint(0, 256, (3, 12, 16), dtype=torch.uint8, generator=generator)
        path = folder / f"c{i % 1000:04d}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(resize(small, [375, 500]).permute(1, 2, 0).numpy()).save(path, quality=90)


if __name__ == "__main__":
    main()
