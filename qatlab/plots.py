"""The reliability diagram, the shift between its bins, and the style that it shares with other pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from qatlab.cache import atomic
from qatlab.metrics.bins import Bins, reliability_bins
from qatlab.metrics.calibration import confidence_gap, expected_calibration_error
from qatlab.metrics.shift import Shift

INK, FAINT = "#333333", "#b8b8b8"
_ACCURACY, _OVER, _UNDER = "#4c78a8", "#f0a08a", "#8cc7b0"
_CONDITIONS = ("#333333", "#d1605e", "#4c78a8", "#59a14f", "#b07aa1", "#e7a03c")
_GAP: dict[str, Any] = {"hatch": "////", "edgecolor": "white", "linewidth": 0}


def reliability_diagram(panels: Sequence[tuple[str, Any, Any]], path: Path, n_bins: int = 15) -> None:
    """Write a PNG with one panel per (title, confidence (N,), correct (N,)): accuracy per confidence bin, gaps, counts.

    A bar reaches up to the bin's accuracy; the hatched part lies between that and the bin's mean confidence, so its
    length, weighted by the histogram below, is the expected calibration error. Raises ValueError as
    ``reliability_bins`` does, and on no panel. DeGroot & Fienberg 1983; Guo et al. 2017, fig. 1.
    """
    if not panels:
        raise ValueError("a reliability diagram needs at least one (title, confidence, correct)")
    figure = Figure(figsize=(3.4 * len(panels) + 0.5, 4.6), dpi=150, layout=ConstrainedLayoutEngine(wspace=0.06))
    axes = figure.subplots(
        2, len(panels), squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": [4, 1]}
    )
    for (title, confidence, correct), (above, below) in zip(panels, axes.T, strict=True):
        bins = reliability_bins(confidence, correct, n_bins)
        ece = expected_calibration_error(confidence, correct, n_bins)
        _bars(above, bins, n_bins)
        above.set_title(title, fontsize=11, color=INK, pad=20)
        gap = f"{confidence_gap(confidence, correct):+.1%}".replace("-", "−")
        accuracy = np.nansum(bins.images * bins.accuracy) / bins.images.sum()
        # Above the panel, where no bar is.
        text = f"top-1 {accuracy:.1%}    ECE {ece:.1%}    confidence − accuracy {gap}"
        above.text(0.5, 1.02, text, transform=above.transAxes, ha="center", va="bottom", fontsize=8, color=INK)
        _histogram(below, bins, n_bins)
    axes[0, 0].set_ylabel("accuracy", color=INK)
    axes[1, 0].set_ylabel("images", color=INK)
    _legend(figure, len(panels))
    with atomic(Path(path)) as temporary:
        figure.savefig(temporary, facecolor="white")


def bin_shift_plot(shifts: Mapping[str, Shift], path: Path) -> None:
    """Write a PNG of where the images of each FP32 confidence bin are under each condition: confidence, accuracy, counts.

    A line per condition of ``shifts`` {title: Shift}, all grouped by the same FP32 bins; empty bins are left out.
    """
    figure = Figure(figsize=(8.6, 4.6), dpi=150, layout=ConstrainedLayoutEngine(wspace=0.06))
    axes = figure.subplots(2, 2, sharex=True, sharey="row", gridspec_kw={"height_ratios": [4, 1]})
    for column, name in enumerate(("confidence", "accuracy")):
        above, below = axes[:, column]
        for color, (title, shift) in zip(_CONDITIONS, shifts.items(), strict=False):
            filled = shift.images > 0
            centers = (np.arange(len(shift.images)) + 0.5) / len(shift.images)
            values = getattr(shift, name)[filled]
            above.plot(centers[filled], values, "o-", color=color, markersize=3.5, linewidth=1.4, label=title)
        above.plot([0, 1], [0, 1], "--", color=INK, linewidth=1)
        above.set_title(f"mean {name} of the images of each FP32 bin", fontsize=10, color=INK)
        above.set(xlim=(0, 1), ylim=(0, 1))
        above.yaxis.set_major_formatter(PercentFormatter(1))
        images = next(iter(shifts.values())).images
        below.bar((np.arange(len(images)) + 0.5) / len(images), images, 0.88 / len(images), color=FAINT, zorder=2)
        below.xaxis.set_major_formatter(PercentFormatter(1))
        below.set_xlabel("confidence in FP32", color=INK)
        plain(above)
        plain(below)
    axes[1, 0].set_ylabel("images", color=INK)
    handles, titles = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, titles, loc="outside lower center", ncols=len(shifts), frameon=False, fontsize=8.5, labelcolor=INK
    )
    with atomic(Path(path)) as temporary:
        figure.savefig(temporary, facecolor="white")


def _bars(axes: Axes, bins: Bins, n_bins: int) -> None:
    """Draw accuracy, and its distance from the mean confidence, over the width of each bin."""
    centers, width = (np.arange(n_bins) + 0.5) / n_bins, 0.88 / n_bins
    filled = bins.images > 0
    accuracy, confidence, centers = bins.accuracy[filled], bins.confidence[filled], centers[filled]
    axes.bar(centers, accuracy, width, color=_ACCURACY, zorder=2)
    colors = [_OVER if over else _UNDER for over in confidence > accuracy]
    axes.bar(centers, confidence - accuracy, width, accuracy, color=colors, **_GAP, zorder=3)
    edges = np.flatnonzero(filled) / n_bins
    axes.hlines(accuracy, edges + 0.06 / n_bins, edges + 0.94 / n_bins, color="#2d5a8c", linewidth=1.6, zorder=4)
    axes.plot([0, 1], [0, 1], "--", color=INK, linewidth=1, zorder=5)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    plain(axes)


def _histogram(axes: Axes, bins: Bins, n_bins: int) -> None:
    """Draw how many images fall into each bin, and where their mean confidence lies."""
    axes.bar((np.arange(n_bins) + 0.5) / n_bins, bins.images, 0.88 / n_bins, color=FAINT, zorder=2)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel(f"confidence  ({bins.images.sum():,} images)", color=INK)
    plain(axes)


def plain(axes: Axes) -> None:
    """Give the axes the style of every picture: a faint grid, no frame on top and right, small grey figures."""
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK, labelsize=8.5)


def _legend(figure: Figure, n_panels: int) -> None:
    handles = [
        Line2D([], [], color=INK, linestyle="--", linewidth=1, label="calibrated"),
        Patch(color=_ACCURACY, label="accuracy"),
        Patch(facecolor=_OVER, **_GAP, label="overconfident by"),
        Patch(facecolor=_UNDER, **_GAP, label="underconfident by"),
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2 if n_panels == 1 else 4,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
