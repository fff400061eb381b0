"""The picture of a run's curves: what training did, against step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from qatlab.cache import atomic
from qatlab.plots import FAINT, INK, plain

COLUMNS = 4  # panels side by side
MARKED = 30  # points up to which each is marked
SUMS = ("loss", "total")  # lines that add up the others of their panel: drawn dotted over them
_COLORS = ("#4c78a8", "#e07b54", "#54a07f", "#9467b0", "#c9a227", "#5ab4c4", "#b65c7c", "#7f7f7f", "#8c6d4f", "#a3b85c")


@dataclass(frozen=True)
class Panel:
    """One of the small pictures: the columns of metrics.csv whose names match ``pattern``, its group 1 naming the line.

    ``unit`` labels the y axis and "%" shows fractions as percentages. ``dashed`` is a second pattern, drawn dashed;
    ``log`` and ``from_zero`` are about the y axis.
    """

    title: str
    pattern: str
    unit: str
    dashed: str = ""
    log: bool = False
    from_zero: bool = False


PANELS = (
    Panel("loss", r"train/(.+)", "loss"),
    Panel("top-1 accuracy", r"probe/(.+)/zero_shot/top1", "%"),
    Panel("calibration error", r"probe/(.+)/zero_shot/ece", "%"),
    Panel("OOD detection", r"probe/(.+/.+)/auroc", "AUROC, %"),
    Panel("gradient norm, before clipping", r"grad_norm/(.+)", "norm", log=True),
    Panel(
        "movement of weight scales\n(dashed: its mean size)",
        r"scale/(.+)/weight/log_ratio",
        "mean log(s / s₀)",
        dashed=r"scale/(.+)/weight/abs_log_ratio",
    ),
    Panel(
        "movement of activation scales\n(dashed: its mean size)",
        r"scale/(.+)/act/log_ratio",
        "mean log(s / s₀)",
        dashed=r"scale/(.+)/act/abs_log_ratio",
    ),
    Panel("activations clipped", r"layers/(.+)/act_clipped", "%", from_zero=True),
    Panel("quantization noise of weights", r"layers/(.+)/weight_sqnr_db", "SQNR, dB"),
    Panel("quantization noise of activations", r"layers/(.+)/act_sqnr_db", "SQNR, dB"),
    Panel("quantization noise of outputs", r"layers/(.+)/output_sqnr_db", "SQNR, dB"),
)


def draw_curves(metrics: Path, path: Path) -> Path | None:
    """Return ``path``, a PNG of what the columns of ``metrics`` (a metrics.csv) show; None where no panel has a value."""
    frame = pl.read_csv(metrics, infer_schema_length=None)
    panels = [panel for panel in PANELS if any(_lines(frame, panel.pattern))]
    if not panels:
        return None
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    layout = ConstrainedLayoutEngine(wspace=0.05, hspace=0.06)
    figure = Figure(figsize=(3.7 * columns, 3.1 * rows), dpi=150, layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    last = max(float(steps[-1]) for panel in panels for _, steps, _ in _lines(frame, panel.pattern))
    for panel, box in zip(panels, axes, strict=False):
        _draw(box, frame, panel)
        box.set_xlim(-0.03 * last - 0.1, 1.03 * last + 0.1)
    for empty in axes[len(panels) :]:
        empty.set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, facecolor="white")
    return path


def _lines(frame: pl.DataFrame, pattern: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (name, steps, values) of every column that matches and has a finite value."""
    for column in frame.columns:
        if found := re.fullmatch(pattern, column):
            steps, values = frame["step"].to_numpy(), frame[column].cast(pl.Float64, strict=False).to_numpy()
            known = np.isfinite(values)
            if known.any():
                yield found.group(1), steps[known], values[known]


def _draw(axes: Axes, frame: pl.DataFrame, panel: Panel) -> None:
    """Draw the panel's lines with title, units and a legend below, off the lines."""
    colors: dict[str, str] = {}
    for pattern, style in ((panel.pattern, "-"), (panel.dashed, "--")):
        for name, steps, values in sorted(_lines(frame, pattern), key=lambda line: line[0] in SUMS):
            color = INK if name in SUMS else colors.setdefault(name, _COLORS[len(colors) % len(_COLORS)])
            marker = "o" if len(steps) <= MARKED else ""
            label = name.replace("/", " ") if style == "-" else None
            style_here = ":" if name in SUMS else style
            axes.plot(
                steps,
                values,
                style_here,
                color=color,
                linewidth=1.3,
                marker=marker,
                markersize=2.8,
                label=label,
                clip_on=False,
            )
    axes.set_title(panel.title, fontsize=10, color=INK)
    axes.set_xlabel("step", fontsize=8.5, color=INK)
    axes.set_ylabel(panel.unit.replace("%", "").rstrip(", "), fontsize=8.5, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if panel.log:
        axes.set_yscale("log")
    if panel.unit.endswith("%"):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    plain(axes)
    axes.tick_params(which="minor", labelsize=8.5, color=FAINT, labelcolor=INK)
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) > 12 else 4
    axes.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns,
        fontsize=7, frameon=False, labelcolor=INK, handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip
