"""What quantization adds to a training step of an image tower: time, peak memory, bytes kept for the backward.

python benchmarks/qat_step.py [--device cuda --batch 256] [--variants eager compiled int8 bf16 naive]

A step is forward and backward of all linear layers with W8 per channel and A8 per tensor, both learned (LSQ), without the
optimizer. The variants take turns in one process; a ratio is the median over the rounds of a variant's time over that of
the full-precision model as open_clip builds it, in the same round: process CPU time, or events on a GPU. Weights are
random, which changes no time. torch's float32 products are slow on AMD processors, which flatters every ratio: the
GFLOP/s are printed.
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
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from qatlab.quant import LSQ, calibrate, quantize
from qatlab.quant.layers.trainable import prepare_training
from qatlab.training.memory import saved_bytes

# name: (kernels, products, target of the time ratio)
VARIANTS = {
    "compiled": ("compiled", "float", 1.20),
    "eager": ("eager", "float", 1.45),
    "int8": ("compiled", "int8", 0.95),
    "bf16": ("compiled", "bf16", 0.85),
    "naive": ("eager", "float", None),
}
SAVED_TARGET, PEAK_TARGET = 1.05, 1.10


class NaiveLSQ(LSQ):
    """LSQ written with detach() alone, as many publications do: what the fused layer is measured against."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        factor = (self._elements_per_scale(x) * self.qmax) ** -0.5
        scale = self.scale.detach() + (self.scale - self.scale.detach()) * factor
        v = (x / scale).clamp(self.qmin, self.qmax)
        return (v + (v.round() - v).detach()) * scale


def student(visual: nn.Module, images: Tensor, kernels: str, matmul: str, quantizer: type[LSQ] = LSQ) -> nn.Module:
    """A calibrated W8A8 copy of the tower in training mode."""
    model = quantize(copy.deepcopy(visual), partial(quantizer, bits=8, per_channel=True), partial(quantizer, bits=8))
    calibrate(model, [images[:4]])
    prepare_training(model, kernels, matmul)
    return model.train()


def naive(model: nn.Module) -> nn.Module:
    """The same model with unfused layers: the quantizers' graphs are kept from forward to backward."""
    for module in model.modules():
        if hasattr(module, "matmul"):
            module.forward = partial(_unfused, module)
    return model


def _unfused(layer: Any, x: Tensor) -> Tensor:
    return layer.compute(layer.act_quantizer(x), layer.weight_quantizer(layer.weight))


class Clock:
    """Seconds and bytes of one step on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, step: Callable[[], None]) -> float:
        """Process CPU seconds of a step, or those between two events on a GPU."""
        if self.device.type != "cuda":
            start = time.process_time()
            step()
            return time.process_time() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    def peak(self, step: Callable[[], None]) -> int:
        """The bytes that memory rises by in a step, at most."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            return torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        step()
        return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def step_of(model: nn.Module, images: Tensor, precision: str) -> Callable[[], None]:
    """Forward and backward, leaving no gradient behind."""

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = model(images).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def gflops(device: torch.device) -> float:
    """The speed of a float32 product as large as the layers'."""
    a, b = torch.randn(800, 768, device=device), torch.randn(3072, 768, device=device)
    clock = Clock(device)
    return 2 * 800 * 768 * 3072 / statistics.median(clock.time(lambda: a @ b.T) for _ in range(15)) / 1e9


def build(options: argparse.Namespace, images: Tensor) -> dict[str, nn.Module]:
    """The full-precision tower and every variant asked for."""
    logging.disable()  # open_clip warns about random weights
    tower = open_clip.create_model(options.model).visual.to(images.device)
    models: dict[str, nn.Module] = {"fp32": copy.deepcopy(tower).train()}
    for name in options.variants:
        kernels, matmul, _ = VARIANTS[name]
        if name == "naive":
            models[name] = naive(student(tower, images, kernels, matmul, NaiveLSQ))
        else:
            models[name] = student(tower, images, kernels, matmul)
    return models


def report(name: str, ratio: float, saved: float, peak: float, low: float, high: float) -> None:
    target = VARIANTS[name][2] if name in VARIANTS else None
    aims = f"   targets {target:.2f}  {SAVED_TARGET:.2f}  {PEAK_TARGET:.2f}" if target else ""
    print(f"{name:10} {ratio:6.2f}  [{low:.2f}-{high:.2f}]  {saved:6.2f}  {peak:6.2f}{aims}")


def peaks(options: argparse.Namespace, steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Bytes that memory rises by in a step of each variant."""
    clock = Clock(torch.device(options.device))
    for step in steps.values():
        step()
    return {name: statistics.median(clock.peak(step) for _ in range(3)) for name, step in steps.items()}


def peaks_apart(options: argparse.Namespace) -> dict[str, float]:
    """The same, of a process that gives freed memory back at once: the allocator that is fast to time keeps it."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    command = [sys.executable, __file__, *sys.argv[1:], "--peaks"]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--peaks", action="store_true", help="print the peaks as JSON and stop")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    peak = {} if options.peaks or device.type == "cuda" else peaks_apart(options)
    size = open_clip.get_model_config(options.model)["vision_cfg"].get("image_size", 224)
    images = torch.randn(options.batch, 3, size, size, device=device)
    models = build(options, images)
    steps = {name: step_of(model, images, options.precision) for name, model in models.items()}
    if options.peaks:
        print(json.dumps(peaks(options, steps)))
        return
    for step in steps.values():
        step()  # compiles
        step()
    peak = peak or peaks(options, steps)
    saved = {n: saved_bytes(lambda model=m: model(images), m.parameters()) for n, m in models.items()}
    clock = Clock(device)
    rounds = [{name: clock.time(step) for name, step in steps.items()} for _ in range(options.rounds)]
    print(f"{options.model}, batch {options.batch}, {device}, {options.precision}, {options.threads} threads")
    print(f"{gflops(device):.0f} GFLOP/s in float32 products; full precision: ", end="")
    print(
        f"{statistics.median(r['fp32'] for r in rounds):.3f} s a step, {saved['fp32'] / 2**20:.0f} MiB kept, ", end=""
    )
    print(
        f"{peak['fp32'] / 2**20:.0f} MiB peak\n{'':10}   time  [ range  ]    kept    peak   (ratios to full precision)"
    )
    for name in models:
        ratios = [r[name] / r["fp32"] for r in rounds]
        kept, rise = saved[name] / saved["fp32"], peak[name] / peak["fp32"]
        report(name, statistics.median(ratios), kept, rise, min(ratios), max(ratios))


if __name__ == "__main__":
    main()
