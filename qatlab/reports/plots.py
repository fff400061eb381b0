"""The reliability diagram, the picture of images that move between its bins, and the style of all pictures."""

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

from qatlab.core.files import atomic
from qatlab.metrics.bins import Bins, reliability_bins
from qatlab.metrics.calibration import confidence_gap, expected_calibration_error
from qatlab.metrics.shift import Shift

# Text and lines are nearly black; frames and counts are in a light grey, so that they do not draw the eye.
INK, FAINT = "#333333", "#b8b8b8"
_ACCURACY, _OVER, _UNDER = "#4c78a8", "#f0a08a", "#8cc7b0"
_CONDITIONS = ("#333333", "#d1605e", "#4c78a8", "#59a14f", "#b07aa1", "#e7a03c")
# Gaps are hatched, so that they differ from bars without colours too: in a grey print, or for a colour-blind reader.
_GAP: dict[str, Any] = {"hatch": "////", "edgecolor": "white", "linewidth": 0}


def reliability_diagram(panels: Sequence[tuple[str, Any, Any]], path: Path, n_bins: int = 15, title: str = "") -> None:
    """Write a PNG with one panel per (title, confidence (N,), correct (N,)): accuracy per confidence bin, gaps, counts.

    The height of a bar is the accuracy of the bin. The hatched part lies between the accuracy and the mean confidence
    of the bin: the mean length of the hatched parts, weighted by the histogram below, is the expected calibration
    error. ``title`` stands above all panels and names the images and the model. Raises ValueError without panels, and
    where ``reliability_bins`` raises it. Source: DeGroot & Fienberg 1983; Guo et al. 2017, fig. 1.
    """
    if not panels:
        raise ValueError("a reliability diagram needs at least one (title, confidence, correct)")
    figure = Figure(figsize=(3.4 * len(panels) + 0.5, 4.6), dpi=150, layout=ConstrainedLayoutEngine(wspace=0.06))
    _entitle(figure, title)
    axes = figure.subplots(
        2, len(panels), squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": [4, 1]}
    )
    for (name, confidence, correct), (above, below) in zip(panels, axes.T, strict=True):
        bins = reliability_bins(confidence, correct, n_bins)
        ece = expected_calibration_error(confidence, correct, n_bins)
        _bars(above, bins, n_bins)
        above.set_title(name, fontsize=11, color=INK, pad=20)
        gap = f"{confidence_gap(confidence, correct):+.1%}".replace("-", "−")  # a minus sign as wide as the plus
        # The accuracy of an empty bin is NaN, which nansum leaves out.
        accuracy = np.nansum(bins.images * bins.accuracy) / bins.images.sum()
        # The numbers stand above the panel, because inside of it they would cover bars.
        text = f"top-1 {accuracy:.1%}    ECE {ece:.1%}    confidence − accuracy {gap}"
        above.text(0.5, 1.02, text, transform=above.transAxes, ha="center", va="bottom", fontsize=8, color=INK)
        _histogram(below, bins, n_bins)
    axes[0, 0].set_ylabel("accuracy", color=INK)
    axes[1, 0].set_ylabel("images", color=INK)
    _legend(figure, len(panels))
    with atomic(Path(path)) as temporary:
        figure.savefig(temporary, facecolor="white")


def bin_shift_plot(shifts: Mapping[str, Shift], path: Path, title: str = "") -> None:
    """Write a PNG of mean confidence and accuracy under each condition, for the images of each FP32 confidence bin.

    ``shifts`` {name of a condition: Shift} gives a line per condition. All lines are grouped by the same FP32 bins, and
    empty bins are left out. Below are the counts of images per bin; ``title`` stands above the two panels.
    """
    figure = Figure(figsize=(8.6, 4.6), dpi=150, layout=ConstrainedLayoutEngine(wspace=0.06))
    _entitle(figure, title)
    axes = figure.subplots(2, 2, sharex=True, sharey="row", gridspec_kw={"height_ratios": [4, 1]})
    for column, measured in enumerate(("confidence", "accuracy")):
        above, below = axes[:, column]
        # Two lines may be equal, because a refit of the temperature changes no answer. Each line is narrower than the
        # lines before it, so that it covers none of them completely.
        widths = np.linspace(3.2, 1.2, len(shifts))
        for color, width, (name, shift) in zip(_CONDITIONS, widths, shifts.items(), strict=False):
            filled = shift.images > 0
            # Every condition has its dot at the middle of the FP32 bin, whatever its own confidence is.
            centers = (np.arange(len(shift.images)) + 0.5) / len(shift.images)
            values = getattr(shift, measured)[filled]
            above.plot(centers[filled], values, "o-", color=color, markersize=2 + width, linewidth=width, label=name)
        # In the left panel the diagonal is the confidence of FP32, in the right panel the accuracy of a calibrated
        # model.
        above.plot([0, 1], [0, 1], "--", color=INK, linewidth=1)
        above.set_title(f"mean {measured} of the images of each FP32 bin", fontsize=10, color=INK)
        above.set(xlim=(0, 1), ylim=(0, 1))
        above.yaxis.set_major_formatter(PercentFormatter(1))
        images = next(iter(shifts.values())).images  # the same under every condition
        below.bar((np.arange(len(images)) + 0.5) / len(images), images, 0.88 / len(images), color=FAINT, zorder=2)
        below.xaxis.set_major_formatter(PercentFormatter(1))
        below.set_xlabel("confidence in FP32", color=INK)
        plain(above)
        plain(below)
    axes[1, 0].set_ylabel("images", color=INK)
    # One legend is enough, because the two panels have the same conditions in the same colours.
    handles, titles = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, titles, loc="outside lower center", ncols=len(shifts), frameon=False, fontsize=8.5, labelcolor=INK
    )
    with atomic(Path(path)) as temporary:
        figure.savefig(temporary, facecolor="white")


def _entitle(figure: Figure, title: str) -> None:
    """Write a title above all panels, letter by letter: by default matplotlib reads text between two $ as mathematics."""
    if title:
        figure.suptitle(title, fontsize=12, color=INK, parse_math=False)


def _bars(axes: Axes, bins: Bins, n_bins: int) -> None:
    """Draw a bar for the accuracy of each bin, and a hatched bar from the accuracy to the mean confidence."""
    centers, width = (np.arange(n_bins) + 0.5) / n_bins, 0.88 / n_bins
    filled = bins.images > 0
    accuracy, confidence, centers = bins.accuracy[filled], bins.confidence[filled], centers[filled]
    axes.bar(centers, accuracy, width, color=_ACCURACY, zorder=2)
    colors = [_OVER if over else _UNDER for over in confidence > accuracy]
    axes.bar(centers, confidence - accuracy, width, accuracy, color=colors, **_GAP, zorder=3)
    # A hatched bar of an underconfident bin covers the top of the accuracy bar, so a line marks the accuracy.
    edges = np.flatnonzero(filled) / n_bins
    axes.hlines(accuracy, edges + 0.06 / n_bins, edges + 0.94 / n_bins, color="#2d5a8c", linewidth=1.6, zorder=4)
    axes.plot([0, 1], [0, 1], "--", color=INK, linewidth=1, zorder=5)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    plain(axes)


def _histogram(axes: Axes, bins: Bins, n_bins: int) -> None:
    """Draw how many images fall into each confidence bin."""
    axes.bar((np.arange(n_bins) + 0.5) / n_bins, bins.images, 0.88 / n_bins, color=FAINT, zorder=2)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel(f"confidence  ({bins.images.sum():,} images)", color=INK)
    plain(axes)


def plain(axes: Axes) -> None:
    """Give the axes the style of every picture: a faint grid, no frame on top and right, small tick labels."""
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK, labelsize=8.5)


def _legend(figure: Figure, n_panels: int) -> None:
    # The entries are made by hand, because a picture may have no overconfident or no underconfident bin to take them
    # from.
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
