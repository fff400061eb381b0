"""What every quantization method costs on an image tower: calibration, evaluation, a training step, memory.

python benchmarks/methods.py [--model ViT-B-16] [--methods absmax,mse,lsq_pc] [--kernels compiled]

  calib     from the full-precision model to the calibrated one (rewrite, quantize, calibrate), over the forward passes of
            the full-precision model that this needs; a backward counts as two
  eval      a forward with folded weights over that of the full-precision model
  step      forward and backward without the optimizer over those of the full-precision model, all of its weights trained
  kept      bytes kept for the backward, over those of the full-precision model
  peaks     what resident memory rises by at most, in calibration over that of a forward, and in a step over that of a step

Times are process CPU times; a method and the full-precision model, with the same attention, take turns, and a ratio is
the median over the rounds. Peaks come from a process of their own. Weights are random, with norms spread as trained ones
are: a histogram without outliers is counted faster. The target of the calibration is one for ViT-B-16 and 64 images, and
is left out elsewhere. torch's float32 products are slow on AMD processors, which flatters every ratio: the GFLOP/s are
printed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import open_clip
import torch
from qat_step import Clock, gflops, step_of
from torch import Tensor, nn

from qatlab.memory import saved_bytes
from qatlab.quant import LSQ, DynamicMinMax, LSQPlus, MinMax, calibrate, quant_layers, quantize
from qatlab.quant.allocate import bit_rules
from qatlab.quant.lora import LoRA
from qatlab.quant.lr_qat import LRQAT
from qatlab.quant.raana import RaanA
from qatlab.quant.rotation import Rotation
from qatlab.quant.sensitivity import gradient_sensitivities
from qatlab.quant.smoothquant import SmoothQuant
from qatlab.quant.trainable import prepare_training

BATCH = 16
CALIBRATION, EVAL, KEPT, PEAK = 1.50, 1.30, 1.05, 1.10
LSQ_STEP = {"compiled": 1.20, "eager": 1.45}

Make = Callable[[nn.Module, list[Tensor]], nn.Module]
Times = list[float]


@dataclass(frozen=True)
class Method:
    """How a full-precision tower and batches of images become a calibrated model, and what that is to cost."""

    make: Make
    passes: int = 1
    trained: bool = False
    step: float | dict[str, float] | None = None  # the target, or one for each choice of kernels


def plain(weight: Any, act: Any, rewrite: Any = None, **options: Any) -> Make:
    """Rewrite the tower where the method does, quantize it and calibrate it."""

    def make(visual: nn.Module, batches: list[Tensor]) -> nn.Module:
        visual = visual if rewrite is None else rewrite(visual, batches)
        model = quantize(visual, weight, act, **options)
        calibrate(model, batches)
        return model

    return make


def mixed_precision(visual: nn.Module, batches: list[Tensor]) -> nn.Module:
    """2 to 8 bits per layer, 6 on average, by the gradient's sensitivities."""
    shared = {id(parameter): parameter for parameter in visual.parameters()}
    model = quantize(copy.deepcopy(visual, shared), W8, A8)
    costs = {
        name: {bits: cost * 2.0**-bits for bits in range(2, 9)}
        for name, cost in gradient_sensitivities(model, batches).items()
    }
    sizes = {name: layer.weight.numel() for name, layer in quant_layers(model).items()}
    return plain(W8, A8, rules=bit_rules(costs, sizes, 6))(visual, batches)


def observed(**options: Any) -> Make:
    """Static activations, and weights by absmax per output channel."""
    return plain(W8, partial(MinMax, bits=8, **options))


def weights(weight: Any, **options: Any) -> Make:
    """Activations by absmax per tensor."""
    return plain(partial(weight, bits=8, **options), A8)


W8, A8 = partial(MinMax, bits=8, per_channel=True), partial(MinMax, bits=8)
LSQ_W, LSQ_PC, LSQ_A = partial(LSQ, bits=8), partial(LSQ, bits=8, per_channel=True), partial(LSQ, bits=8)
LR_QAT = partial(LRQAT, bits=8, per_channel=True)
METHODS = {
    "absmax": Method(observed(), trained=True),
    "ema": Method(observed(observer="ema")),
    "percentile": Method(observed(observer="percentile")),
    "mse": Method(observed(observer="mse")),
    "asymmetric": Method(observed(symmetric=False)),
    "asym_mse": Method(observed(symmetric=False, observer="mse")),
    "act_channel": Method(observed(per_channel=True)),
    "per_token": Method(plain(W8, partial(DynamicMinMax, bits=8))),
    "token_asym": Method(plain(W8, partial(DynamicMinMax, bits=8, symmetric=False))),
    "w_tensor": Method(weights(MinMax)),
    "w_group64": Method(weights(MinMax, group_size=64)),
    "w_percentile": Method(weights(MinMax, per_channel=True, observer="percentile")),
    "w_mse": Method(weights(MinMax, per_channel=True, observer="mse")),
    "raana_w8": Method(weights(RaanA)),
    "raana_w4": Method(plain(partial(RaanA, bits=4), A8)),
    "smooth_0.5": Method(plain(W8, A8, SmoothQuant(0.5)), 2),
    "smooth_search": Method(plain(W8, A8, SmoothQuant("search", W8, A8)), 2),
    "rotation_lsq": Method(plain(LSQ_PC, LSQ_A, Rotation()), trained=True),
    "mixed": Method(mixed_precision, 4),
    "lsq": Method(plain(LSQ_W, LSQ_A), trained=True, step=LSQ_STEP),
    "lsq_pc": Method(plain(LSQ_PC, LSQ_A), trained=True, step=LSQ_STEP),
    "lsq_plus": Method(plain(LSQ_PC, partial(LSQPlus, bits=8)), trained=True),
    "lora": Method(plain(W8, A8, adapter=LoRA), trained=True, step=0.90),
    "lora_lsq": Method(plain(W8, LSQ_A, adapter=LoRA), trained=True, step=0.90),
    "lr_qat": Method(plain(LR_QAT, LSQ_A), trained=True, step=1.25),
}


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

    def calibrated(self, method: Method) -> tuple[nn.Module, Times]:
        """A model and the ratios of the times it took to make it."""
        ratios, forward = [], evaluate(self.reference.eval(), self.batches)
        for _ in range(self.options.rounds):
            made: list[nn.Module] = []
            visual = copy.deepcopy(self.visual)
            full = self.clock.time(forward)
            seconds = self.clock.time(lambda visual=visual, made=made: made.append(method.make(visual, self.batches)))
            ratios.append(seconds / (method.passes * full))
        return made[0], ratios

    def versus(self, ours: Callable[[], None], theirs: Callable[[], None]) -> Times:
        """The ratios of their times over the rounds, after they have compiled and folded what they do."""
        for run in (ours, ours, theirs):
            run()
        return [self.clock.time(ours) / self.clock.time(theirs) for _ in range(self.options.rounds)]

    def step(self, model: nn.Module) -> Callable[[], None]:
        return step_of(model.train(), self.batches[0], "32-true")

    def row(self, method: Method) -> dict[str, Times]:
        """The ratios of the method by column, those of the peaks left out."""
        model, calib = self.calibrated(method)
        batch = self.batches[:1]
        columns = {"calib": calib}
        columns["eval"] = self.versus(evaluate(model.eval(), batch), evaluate(self.reference.eval(), batch))
        if method.trained:
            prepare_training(model, self.options.kernels, "float")
            columns["step"] = self.versus(self.step(model), self.step(self.reference))
            columns["kept"] = [kept(model, batch[0]) / kept(self.reference, batch[0])]
        return columns

    def peaks(self) -> dict[str, list[int]]:
        """By method the bytes that memory rises by in calibration and in a step, and in a forward and a step of "fp32"."""
        batches = self.batches[:2]  # the more images, the same peak
        found = {}
        for name in ("fp32", *self.options.methods):
            visual, held = copy.deepcopy(self.visual), []
            if name == "fp32":
                forward = evaluate(self.reference.eval(), batches)
                forward()
                rises = [self.clock.peak(forward)]
                held.append(self.reference)
            else:
                make = METHODS[name].make
                rises = [
                    self.clock.peak(lambda visual=visual, held=held, make=make: held.append(make(visual, batches)))
                ]
            if name == "fp32" or METHODS[name].trained:
                prepare_training(held[0], self.options.kernels, "float")
                step = self.step(held[0])
                step()
                rises.append(int(statistics.median(self.clock.peak(step) for _ in range(3))))
            found[name] = rises
            del visual, held
            gc.collect()
        return found


def kept(model: nn.Module, images: Tensor) -> int:
    return saved_bytes(lambda: model(images), model.parameters())


def peaks_apart() -> dict[str, list[int]]:
    """The peaks of a process that gives freed memory back at once: the allocator that is fast to time keeps it."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    command = [sys.executable, __file__, *sys.argv[1:], "--peaks"]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def targets(method: Method, options: argparse.Namespace) -> dict[str, float]:
    """The most that a column is to show."""
    most = {"eval": EVAL}
    if options.model == "ViT-B-16" and options.images == 64:
        most["calib"] = CALIBRATION
    if method.trained:
        most |= {"kept": KEPT, "step peak": PEAK}
    step = method.step[options.kernels] if isinstance(method.step, dict) else method.step
    return most if step is None else {**most, "step": step}


def line(name: str, columns: dict[str, Times], options: argparse.Namespace) -> str:
    most = targets(METHODS[name], options)
    cells = [f"{name:14}{METHODS[name].passes:3}"]
    for column, width in COLUMNS.items():
        ratios = columns.get(column)
        middle = f"{statistics.median(ratios):.2f}" if ratios else "-"
        extent = f" [{min(ratios):.2f}-{max(ratios):.2f}]" if ratios and len(ratios) > 1 else ""
        cells.append(f"{middle + extent:>{width}}")
    missed = [c for c, limit in most.items() if statistics.median(columns[c]) > limit]
    aims = ", ".join(f"{column} {most[column]:.2f}" for column in COLUMNS if column in most)
    return "".join(cells) + f"   {aims}" + (f"   MISSED: {', '.join(missed)}" if missed else "")


COLUMNS = {"calib": 19, "eval": 18, "step": 18, "kept": 7, "calib peak": 12, "step peak": 11}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture with a vision transformer")
    parser.add_argument("--images", type=int, default=64, help="of the calibration; a forward or step has 16")
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
    peak = {} if options.peaks else peaks_apart()
    bench = Bench(options)
    if options.peaks:
        print(json.dumps(bench.peaks()))
        return
    forward, step = evaluate(bench.reference.eval(), bench.batches), bench.step(bench.reference)
    print(
        f"{options.model}, {options.images} images, batch {BATCH}, {options.threads} threads, {options.kernels} kernels"
    )
    print(f"{gflops(torch.device('cpu')):.0f} GFLOP/s in float32 products; full precision: ", end="")
    step()
    print(
        f"{bench.clock.time(step):.2f} s a step, {kept(bench.reference, bench.batches[0]) / 2**20:.0f} MiB kept, ",
        end="",
    )
    bench.reference.eval()
    print(f"{bench.clock.time(forward):.2f} s a pass over the images, peaks of ", end="")
    print(" and ".join(f"{rise / 2**20:.0f}" for rise in peak["fp32"]) + " MiB in a forward and a step")
    print(f"{'method':10} passes" + "".join(f"{column:>{width}}" for column, width in COLUMNS.items()) + "   targets")
    for name in options.methods:
        columns = bench.row(METHODS[name])
        for column, rise, full in zip(("calib peak", "step peak"), peak[name], peak["fp32"], strict=False):
            columns[column] = [rise / full]
        print(line(name, columns, options), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
