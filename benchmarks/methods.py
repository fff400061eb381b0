"""What every quantization method costs on an image tower: calibration, evaluation, a training step, memory.

python benchmarks/methods.py [--model ViT-B-16] [--methods absmax,mse,lsq_pc] [--kernels compiled]

  calib     from the full-precision model to the calibrated one (rewrite, quantize, calibrate), over the forward passes of
            the full-precision model that this needs; a backward counts as two
  eval      a forward with folded weights over that of the full-precision model
  step      forward and backward without the optimizer over those of the full-precision model, all of its weights trained
  kept      bytes kept for the backward, over those of the full-precision model
  peaks     what resident memory rises by at most: in calibration (calib^) over a forward, in a step (step^) over a step

Times are process CPU times; a method and the full-precision model, with the same attention, take turns, and a ratio is
the median over the rounds. Peaks come from a process of their own. Weights are random, with norms spread as trained ones
are: a histogram without outliers is counted faster. The target of the calibration is one for ViT-B-16 and 64 images, and
is left out elsewhere. torch's float32 products are slow on AMD processors, which flatters every ratio: the GFLOP/s are
printed.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

import open_clip
import torch
from method_table import A8, METHODS, W8, Method
from qat_step import Clock, gflops, step_of
from torch import Tensor, nn

from qatlab.quant import quant_layers, quantize
from qatlab.quant.layers.trainable import prepare_training
from qatlab.training.memory import saved_bytes

BATCH = 16
CALIBRATION, EVAL, KEPT, PEAK = 1.50, 1.30, 1.05, 1.10


def tower(name: str) -> nn.Module:
    """A tower of random weights whose norms make some features much larger than others."""
    logging.disable()  # open_clip warns about random weights
    visual = open_clip.create_model(name).visual
    with torch.no_grad():
        for module in visual.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.log_normal_(0.0, 1.0)
    return visual


def full_precision(visual: nn.Module) -> nn.Module:
    """The tower with the attention that quantized ones have, and nothing quantized."""
    model = quantize(copy.deepcopy(visual), W8, A8)
    for layer in quant_layers(model).values():
        layer.weight_quantizer = layer.act_quantizer = None
    return model


def evaluate(model: nn.Module, batches: list[Tensor]) -> Callable[[], None]:
    """A forward of every batch without gradients."""

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    return forward


class Bench:
    """A tower, its images, and the costs of methods relative to it."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        self.options, self.clock = options, Clock(torch.device("cpu"))
        size = open_clip.get_model_config(options.model)["vision_cfg"].get("image_size", 224)
        self.batches = list(torch.randn(options.images, 3, size, size).split(BATCH))
        self.visual = tower(options.model)
        self.reference = full_precision(self.visual)

    def make(self, method: Method, batches: list[Tensor], made: list[nn.Module]) -> Callable[[], None]:
        """What puts a calibrated model into ``made``; the copy of the tower it is made from is there before."""
        visual = copy.deepcopy(self.visual)
        return lambda: made.append(method.make(visual, batches))

    def step(self, model: nn.Module) -> Callable[[], None]:
        return step_of(model.train(), self.batches[0], "32-true")

    def versus(self, ours: Callable[[], None], theirs: Callable[[], None]) -> list[float]:
        """The ratios of their times over the rounds, after they have compiled and folded what they do."""
        for run in (ours, ours, theirs):
            run()
        return [self.clock.time(ours) / self.clock.time(theirs) for _ in range(self.options.rounds)]

    def row(self, method: Method) -> dict[str, list[float]]:
        """The ratios of a method by column, without the peaks."""
        made: list[nn.Module] = []
        columns: dict[str, list[float]] = {"calib": []}
        forward, batch = evaluate(self.reference.eval(), self.batches), self.batches[:1]
        for _ in range(self.options.rounds):
            made.clear()
            make = self.make(method, self.batches, made)
            columns["calib"].append(self.clock.time(make) / (method.passes * self.clock.time(forward)))
        model = made[0]
        columns["eval"] = self.versus(evaluate(model.eval(), batch), evaluate(self.reference, batch))
        if method.trained:
            prepare_training(model, self.options.kernels, "float")
            columns["step"] = self.versus(self.step(model), self.step(self.reference))
            columns["kept"] = [kept(model, batch[0]) / kept(self.reference, batch[0])]
        return columns

    def peaks(self) -> dict[str, list[int]]:
        """The bytes that memory rises by in calibration and a step of each method, and in a forward and a step of "fp32"."""
        batches = self.batches[:2]  # more images make no higher peak
        forward = evaluate(self.reference.eval(), batches)
        forward()
        found = {"fp32": [self.clock.peak(forward), self._step_peak(self.reference)]}
        for name in self.options.methods:
            made: list[nn.Module] = []
            found[name] = [self.clock.peak(self.make(METHODS[name], batches, made))]
            if METHODS[name].trained:
                prepare_training(made[0], self.options.kernels, "float")
                found[name].append(self._step_peak(made[0]))
        return found

    def _step_peak(self, model: nn.Module) -> int:
        step = self.step(model)
        step()
        return self.clock.peak(step)


def kept(model: nn.Module, images: Tensor) -> int:
    return saved_bytes(lambda: model(images), model.parameters())


def peaks_apart() -> dict[str, list[int]]:
    """The peaks of a process that gives freed memory back at once: the allocator that is fast to time keeps it."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    command = [sys.executable, __file__, *sys.argv[1:], "--peaks"]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def targets(method: Method, options: argparse.Namespace) -> dict[str, float]:
    """The most that a column is to show."""
    on_b16 = {"calib": CALIBRATION} if (options.model, options.images) == ("ViT-B-16", 64) else {}
    step = method.step[options.kernels] if isinstance(method.step, dict) else method.step
    learned = {"step": step, "kept": KEPT, "step^": PEAK} if method.trained else {}
    return {column: most for column, most in {**on_b16, "eval": EVAL, **learned}.items() if most is not None}


def line(name: str, columns: dict[str, list[float]], options: argparse.Namespace) -> str:
    cells = [f"{name:14}{METHODS[name].passes:2}"]
    for column, width in WIDTHS.items():
        ratios = columns.get(column, [])
        middle = f"{statistics.median(ratios):.2f}" if ratios else "-"
        extent = f" [{min(ratios):.2f}-{max(ratios):.2f}]" if len(ratios) > 1 else ""
        cells.append(f"{middle + extent:>{width}}")
    most = targets(METHODS[name], options)
    missed = [column for column in most if statistics.median(columns[column]) > most[column]]
    aims = ", ".join(f"{column} {most[column]:.2f}" for column in most)
    return "".join(cells) + f"   {aims}" + f"   MISSED: {', '.join(missed)}" * bool(missed)


def header(bench: Bench, peak: list[int]) -> str:
    options, batches = bench.options, bench.batches
    step = bench.step(bench.reference)
    step()
    seconds = bench.clock.time(step), bench.clock.time(evaluate(bench.reference.eval(), batches))
    sizes = [kept(bench.reference, batches[0]) / 2**20, *(rise / 2**20 for rise in peak)]
    return (
        f"{options.model}, batch {BATCH}, {options.threads} threads, {options.kernels} kernels, "
        f"{gflops(torch.device('cpu')):.0f} GFLOP/s in float32 products\n"
        f"full precision: {seconds[0]:.2f} s a step, {seconds[1]:.2f} s a pass over {options.images} images, "
        f"{sizes[0]:.0f} MiB kept, peaks of {sizes[1]:.0f} MiB in a forward and {sizes[2]:.0f} MiB in a step\n"
        f"{'':10}passes{''.join(f'{column:>{width}}' for column, width in WIDTHS.items())}   targets"
    )


WIDTHS = {"calib": 18, "eval": 18, "step": 18, "kept": 6, "calib^": 8, "step^": 7}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture with a vision transformer")
    parser.add_argument("--images", type=int, default=64, help="of the calibration; a forward or a step has 16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS), help="some of " + ", ".join(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernels", choices=["eager", "compiled"], default="eager", help="of the training step")
    parser.add_argument("--peaks", action="store_true", help="print the peaks in bytes as JSON and stop")
    options = parser.parse_args()
    options.methods = options.methods.split(",")
    if unknown := [name for name in options.methods if name not in METHODS]:
        parser.error(f"there is no method {unknown[0]}: there are {', '.join(METHODS)}")
    return options


def main() -> None:
    options = arguments()
    if options.peaks:
        print(json.dumps(Bench(options).peaks()))
        return
    peak = peaks_apart()
    bench = Bench(options)
    print(header(bench, peak["fp32"]))
    for name in options.methods:
        columns = bench.row(METHODS[name])
        columns |= {
            c: [ours / full] for c, ours, full in zip(["calib^", "step^"], peak[name], peak["fp32"], strict=False)
        }
        print(line(name, columns, options), flush=True)


if __name__ == "__main__":
    main()
