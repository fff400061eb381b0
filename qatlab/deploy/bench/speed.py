"""The times of an encoder in all its forms (torch, integer exports, bitsandbytes), as a table and a chart."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import nn

from qatlab.core.console import console
from qatlab.deploy.bench import bitsandbytes
from qatlab.deploy.bench.timing import Job, run
from qatlab.deploy.contents import ABOUT
from qatlab.deploy.cpu import cpu
from qatlab.deploy.formats import onnx
from qatlab.deploy.runtimes import FORMATS

if TYPE_CHECKING:
    from qatlab.config import BenchConfig

# Every form that is timed, in the order of the table.
TITLES = {
    "fp32": "torch FP32",
    "bf16": "torch bf16",
    "simulated": "torch, simulated",
    "bnb_int8": "bitsandbytes int8",
    "bnb_nf4": "bitsandbytes NF4",
    "torch": "torch int8 (inductor)",
    "onnx_fp32": "ONNX Runtime FP32",
    "onnx": "ONNX Runtime int8",
    "openvino_fp32": "OpenVINO FP32",
    "openvino_bf16": "OpenVINO bf16",
    "openvino": "OpenVINO int8",
}


def written(
    fp32: nn.Module, simulated: nn.Module, exports: Path, size: int, folder: Path, device: str, trust: bool = False
) -> dict[str, Path]:
    """Return {key of TITLES: file or folder} of the forms of an encoder; forms that are no exports are written to ``folder``.

    For each runtime with an integer model there is also full precision in this runtime, so that the gain by integers
    alone is seen. An export for torch, whose file can run code, is included only with ``trust``.
    """
    found = {kind: folder / f"{kind}.pt" for kind in ("fp32", "simulated")}
    for kind, visual in (("fp32", fp32), ("simulated", simulated)):
        torch.save(visual.eval(), found[kind])
    # bf16 and bitsandbytes' layers are made of the FP32 file in the process that times them.
    found["bf16"] = found["fp32"]
    if importlib.util.find_spec("bitsandbytes"):
        found |= dict.fromkeys(bitsandbytes.KINDS, found["fp32"])
    if device == "cpu":  # the runtimes of exports compute on the CPU alone
        forms = [form for form in FORMATS if trust or form != "torch"]
        exported = {form: exports / form for form in forms if (exports / form / ABOUT).exists()}
        if {"onnx", "openvino"} & exported.keys():
            floats = onnx.write(fp32, folder, size)
            kinds = {"onnx": ["onnx_fp32"], "openvino": ["openvino_fp32", "openvino_bf16"]}
            found |= {kind: floats for form in exported for kind in kinds.get(form, ())}
        found |= exported
    return {kind: found[kind] for kind in TITLES if kind in found}


def measure(kind: str, source: Path, reference: Path, size: int, options: BenchConfig) -> list[dict[str, object]]:
    """Return a row per batch size: seconds a call, the ratio to FP32, images per second, peak memory, size on disk."""
    found = run(
        Job(kind, str(source), str(reference), size, options.batches, options.threads, options.rounds, options.device)
    )
    files = [source] if source.is_file() else list(source.glob("model.*"))
    size_mib = sum(file.stat().st_size for file in files) / 2**20
    stored = kind in (
        "fp32",
        "simulated",
        *FORMATS,
    )  # the file of any other form is FP32's, whose size says nothing of it
    return [
        {
            "kind": kind,
            "batch": int(batch),  # a string since it was a key of JSON
            "seconds": times["wall"],
            "ratio": times["seconds"] / times["reference"],
            "images_per_second": int(batch) / times["wall"],
            "memory_mib": found["memory_mib"],
            "file_mib": size_mib if stored else None,
            "threads": options.threads,
            "machine": machine(options.device),
        }
        for batch, times in found["times"].items()
    ]


def machine(device: str) -> str:
    """Return the name of the processor that is timed; of a CPU also its instructions for products of integers."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return cpu()


def print_times(found: pl.DataFrame, options: BenchConfig) -> None:
    """Print the table of the times that ``measure`` found."""
    threads = f", {options.threads} thread{'s' if options.threads > 1 else ''}" if options.device == "cpu" else ""
    # Which clock timing.py reads: CPU time of one thread is not disturbed by neighbours on the machine.
    clock = "CPU time" if options.device == "cpu" and options.threads == 1 else "time"
    table = Table(
        title=machine(options.device) + threads,
        title_justify="left",
        caption=f"Milliseconds a call, and {clock} over torch FP32's, both measured in turns in one process; medians of "
        f"{options.rounds}. Peak memory of {max(options.batches)} images.",
        caption_justify="left",
    )
    table.add_column("encoder")
    for batch in options.batches:
        table.add_column(f"batch {batch}", justify="right")
    for name in ("images/s", "memory MiB", "file MiB"):
        table.add_column(name, justify="right")
    for (kind,), rows in found.group_by("kind", maintain_order=True):
        cells = [f"{1000 * row['seconds']:.0f} ms  {row['ratio']:.2f}" for row in rows.iter_rows(named=True)]
        file = "" if rows["file_mib"][0] is None else f"{rows['file_mib'][0]:.0f}"
        best = f"{max(rows['images_per_second']):.1f}"
        table.add_row(TITLES[str(kind)], *cells, best, f"{rows['memory_mib'][0]:.0f}", file)
    console(120).print(table)


def draw_times(found: pl.DataFrame, path: Path) -> None:
    """Write the chart of the ratios to a PNG."""
    kinds, batches = (
        found["kind"].unique(maintain_order=True).to_list(),
        found["batch"].unique(maintain_order=True).to_list(),
    )
    figure = Figure(figsize=(8, 0.6 * len(kinds) + 1.2), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(batches)  # the bars of a form fill four fifths of its place, and the rest parts it from the next
    for i, batch in enumerate(batches):
        rows = found.filter(pl.col("batch") == batch)
        places = [kinds.index(kind) + (i - (len(batches) - 1) / 2) * height for kind in rows["kind"]]
        bars = axes.barh(places, rows["ratio"].to_list(), height * 0.9, label=f"batch {batch}", color=f"C{i}")
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.set_yticks(range(len(kinds)), [TITLES[kind] for kind in kinds])
    axes.invert_yaxis()  # the first form at the top, as in the table
    axes.axvline(1, color="0.3", linewidth=0.8, linestyle="--")
    axes.set_xlabel("time over torch FP32's")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
