"""The picture of a run's curves: losses, probes, scales and layers against the training step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from qatlab.core.files import atomic
from qatlab.reports.plots import FAINT, INK, plain
from qatlab.reports.titles import SCORES
from qatlab.results.curves import read_curves

COLUMNS = (4, 3)  # numbers of panels side by side: with more columns the panels would be too small on a page
MARKED = 30  # a line with more points than this has no markers, because the markers would touch each other
# Names of lines that are the sum of the other lines of their panel. They are dotted and drawn last, so that they cover
# no other line.
SUMS = ("loss", "total")
_COLORS = ("#4c78a8", "#e07b54", "#54a07f", "#9467b0", "#c9a227", "#5ab4c4", "#b65c7c", "#7f7f7f", "#8c6d4f", "#a3b85c")
# Lines of the same colour differ in dashes and markers: dashes are seen on long lines, markers on lines of few points.
_STYLES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class Panel:
    """A small picture of the columns of metrics.csv whose names match the regular expression ``pattern``.

    Group 1 of the pattern is the name of a line. Where the pattern has a group 2, lines with the same group 1 have the
    same colour, and lines with the same group 2 have the same dashes and markers. ``unit`` labels the y axis; a unit
    that ends in "%" shows fractions as percentages. Columns that match ``dashed`` are drawn as dashed lines. ``log``
    makes the y axis logarithmic, ``from_zero`` starts it at 0.
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
    Panel("OOD detection", r"probe/(.+)/([^/]+)/auroc", "AUROC, %"),
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


class _Curve(NamedTuple):
    """A line of a panel: its ``name``, its ``kind`` ("" where the pattern has no group 2), ``steps`` and ``values`` (n,)."""

    name: str
    kind: str
    steps: np.ndarray
    values: np.ndarray


@dataclass
class _Looks:
    """Colours, dashes and markers of a panel: the name of a line decides its colour, the kind its dashes and markers.

    Names and kinds are numbered in the order in which they are first asked for.
    """

    names: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def of(self, curve: _Curve) -> tuple[str, Any, str]:
        """Return colour, line style and marker of a line."""
        name, kind = _place(self.names, curve.name), _place(self.kinds, curve.kind)
        # With more names than colours the colours start again, with the next dashes.
        k = kind + name // len(_COLORS)
        marker = _MARKERS[(k + k // len(_STYLES)) % len(_MARKERS)]
        return _COLORS[name % len(_COLORS)], _STYLES[k % len(_STYLES)], marker


def _place(known: list[str], word: str) -> int:
    """Return the index of a word in ``known``; a new word is appended first."""
    if word not in known:
        known.append(word)
    return known.index(word)


def draw_curves(metrics: Path, path: Path) -> Path | None:
    """Return ``path``, a PNG with the curves of ``metrics``, a file metrics.csv; None where no panel has a finite value."""
    frame = read_curves(metrics)
    panels = [panel for panel in PANELS if any(_lines(frame, panel.pattern))]
    if not panels:
        return None
    # The number of columns is chosen so that the fewest places of the grid stay empty.
    columns = len(panels) if len(panels) <= COLUMNS[0] else min(COLUMNS, key=lambda number: -len(panels) % number)
    rows = -(-len(panels) // columns)  # rounded up
    layout = ConstrainedLayoutEngine(wspace=0.05, hspace=0.06)
    figure = Figure(figsize=(3.7 * columns, 3.1 * rows), dpi=150, layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    # All panels have the same range of steps, so that a step is at the same place in each of them.
    last = max(float(curve.steps[-1]) for panel in panels for curve in _lines(frame, panel.pattern))
    for panel, box in zip(panels, axes, strict=False):
        _draw(box, frame, panel)
        # The margin keeps the first and the last marker off the frame. The 0.1 gives the axis a width where all curves
        # have only step 0.
        box.set_xlim(-0.03 * last - 0.1, 1.03 * last + 0.1)
    # The last row of the grid may have more places than panels.
    for empty in axes[len(panels) :]:
        empty.set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, facecolor="white")
    return path


def _lines(frame: pl.DataFrame, pattern: str) -> Iterator[_Curve]:
    """Yield a curve for every column whose name matches ``pattern`` and that has a finite value."""
    for column in frame.columns:
        if found := re.fullmatch(pattern, column):
            steps, values = frame["step"].to_numpy(), frame[column].cast(pl.Float64, strict=False).to_numpy()
            # Most columns have values at a few steps only, for example at the steps of the probes; a loss may be NaN.
            known = np.isfinite(values)
            if known.any():
                name, kind = (*found.groups(), "")[:2]
                yield _Curve(name, kind, steps[known], values[known])


def _draw(axes: Axes, frame: pl.DataFrame, panel: Panel) -> None:
    """Draw the lines of a panel with title and units, and the legend below the panel, where it covers no line."""
    looks = _Looks()
    for pattern, dashed in ((panel.pattern, False), (panel.dashed, True)):
        for curve in sorted(_lines(frame, pattern), key=lambda line: line.name in SUMS):
            color, style, marker = (INK, ":", "o") if curve.name in SUMS else looks.of(curve)
            axes.plot(
                curve.steps,
                curve.values,
                linestyle="--" if dashed else style,  # a dashed line has the colour of the solid line with its name
                color=color,
                linewidth=1.3,
                marker=marker if len(curve.steps) <= MARKED else "",
                markersize=2.8,
                # A dashed line has no entry in the legend, because the title of the panel says what the dashed lines
                # are.
                label=None if dashed else " ".join(filter(None, [curve.name.replace("/", " "), curve.kind])),
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
    handles = _entries(looks) if looks.kinds not in ([], [""]) else axes.get_legend_handles_labels()[0]
    # Two long names, such as names of sets, or four short ones, such as names of layers, fit side by side below a
    # panel.
    columns = 2 if max(len(str(handle.get_label())) for handle in handles) > 12 else 4
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns,
        fontsize=7, frameon=False, labelcolor=INK, handlelength=2.2, columnspacing=1.2,
    )  # fmt: skip


def _entries(looks: _Looks) -> list[Line2D]:
    """Return the legend of a panel whose lines have a name and a kind: an entry for each name, then one for each kind."""
    found = []
    for name in looks.names:
        color, style, _ = looks.of(_Curve(name, looks.kinds[0], np.empty(0), np.empty(0)))
        found.append(Line2D([], [], color=color, linestyle=style, linewidth=2.5, label=name.replace("/", " ")))
    for kind in looks.kinds:
        _, style, marker = looks.of(_Curve(looks.names[0], kind, np.empty(0), np.empty(0)))
        label = SCORES.get(kind, kind)
        found.append(
            Line2D([], [], color=INK, linestyle=style, marker=marker, markersize=2.8, linewidth=1.3, label=label)
        )
    return found
