"""curves.png: the panels that have something to show, for a long run, a short one, and one without training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure
from PIL import Image

from qatlab.reports.curves import PANELS, draw_curves

KINDS = ("in_proj", "c_fc")


@pytest.fixture
def drawn(rendered: None, monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that was saved."""
    found: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (found.append(self), save(self, *a, **k))[1])
    return found


def write(folder: Path, steps: int, probes: int = 10) -> Path:
    """A metrics.csv as a run of so many steps leaves it, with a probe every ``probes`` steps."""
    n = np.arange(steps + 1, dtype=float)
    probed = np.where(n % probes == 0, n, np.nan)
    columns: dict[str, np.ndarray] = {"train/loss": 1 / (1 + n), "train/kl": 1 / (1 + n), "epoch": 0 * n}
    columns |= {f"grad_norm/{name}": 10.0 ** (-i) + 0 * n for i, name in enumerate(("total", "weights", "scales"))}
    for kind in KINDS:
        for tensor in ("weight", "act"):
            columns |= {f"scale/{kind}/{tensor}/{name}": 1e-3 * n for name in ("log_ratio", "abs_log_ratio")}
            columns[f"layers/{kind}/{tensor}_sqnr_db"] = 40 - 0.01 * probed
        columns |= {f"layers/{kind}/output_sqnr_db": 30 + 0 * probed, f"layers/{kind}/act_clipped": 0 * probed}
    columns |= {"probe/id/zero_shot/top1": 0.9 + 0 * probed, "probe/id/zero_shot/ece": 0.05 + 0 * probed}
    columns |= {"probe/near_ood/mcm/auroc": 0.8 + 0 * probed, "probe/near_ood/mcm/fpr95_id_pos": 0.4 + 0 * probed}
    path = folder / "metrics.csv"
    pl.DataFrame({"step": n.astype(int), **columns}).fill_nan(None).write_csv(path)
    return path


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_visible()]


@pytest.mark.parametrize("steps", [0, 1, 2, 400])
def test_every_panel_with_values_is_drawn(steps: int, tmp_path: Path, drawn: list[Figure]) -> None:
    picture = draw_curves(write(tmp_path, steps), tmp_path / "curves.png")
    assert picture == tmp_path / "curves.png"
    with Image.open(picture) as image:
        assert image.width > image.height > 1000
    (figure,) = drawn
    assert titles(figure) == [panel.title for panel in PANELS]
    for axes in figure.axes[: len(PANELS)]:
        legend = axes.get_legend()
        assert legend is not None
        # every line has a point inside the axes, and every solid one its name
        left, right = axes.get_xlim()
        assert left < 0 < right
        assert right >= steps
        assert all(len(line.get_xdata()) for line in axes.lines)
        solid = {str(line.get_label()) for line in axes.lines if line.get_linestyle() != "--"}
        # An OOD line is of a set and a score, which have an entry each.
        named = set(" ".join(solid).split()) if axes.get_title() == "OOD detection" else solid
        assert len(legend.get_texts()) == len(named)


def test_lines_hold_the_values_of_the_file(tmp_path: Path, drawn: list[Figure]) -> None:
    metrics = write(tmp_path, 40)
    draw_curves(metrics, tmp_path / "curves.png")
    frame = pl.read_csv(metrics)
    panels = dict(zip(titles(drawn[0]), drawn[0].axes, strict=False))
    for title, line, column in (
        ("loss", "kl", "train/kl"),
        ("top-1 accuracy", "id", "probe/id/zero_shot/top1"),
        ("OOD detection", "near_ood mcm", "probe/near_ood/mcm/auroc"),
        ("quantization noise of weights", "c_fc", "layers/c_fc/weight_sqnr_db"),
    ):
        (found,) = [one for one in panels[title].lines if one.get_label() == line]
        known = frame.select("step", column).drop_nulls()
        assert list(found.get_xdata()) == known["step"].to_list()
        assert list(found.get_ydata()) == known[column].to_list()


def test_no_two_lines_of_a_panel_look_alike(tmp_path: Path, drawn: list[Figure]) -> None:
    """Thirteen sets, and three sets by four scores, in ten colours."""
    columns = {f"probe/set{i}/zero_shot/top1": [0.1, 0.2] for i in range(13)}
    columns |= {
        f"probe/{name}/{score}/auroc": [0.1, 0.2] for name in "abc" for score in ("msp", "mcm", "energy", "my.own")
    }
    pl.DataFrame({"step": [0, 50], **columns}).write_csv(tmp_path / "metrics.csv")
    draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    for axes, lines, entries in zip(drawn[0].axes, (13, 12), (13, 3 + 4), strict=True):
        looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}
        assert len(looks) == len(axes.lines) == lines
        assert {line.get_xdata()[0] for line in axes.lines} == {0}
        legend = axes.get_legend()
        assert legend is not None
        assert len({text.get_text() for text in legend.get_texts()}) == entries


def test_a_model_that_is_not_quantized_has_no_empty_panels(tmp_path: Path, drawn: list[Figure]) -> None:
    metrics = write(tmp_path, 5)
    frame = pl.read_csv(metrics)
    frame.select(name for name in frame.columns if not name.startswith(("layers/", "scale/"))).write_csv(metrics)
    draw_curves(metrics, tmp_path / "curves.png")
    assert titles(drawn[0]) == [
        "loss",
        "top-1 accuracy",
        "calibration error",
        "OOD detection",
        "gradient norm, before clipping",
    ]


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,train/kl\n0,1.0,nan\n1,inf,\n2,0.5,nan\n")
    draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    (line,) = drawn[0].axes[0].lines
    assert list(line.get_xdata()) == [0, 2]


def test_without_a_value_there_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,epoch\n0,0\n")
    assert draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png") is None
    assert not (tmp_path / "curves.png").exists()


def test_using_a3_probes_with_and_without_their_size_are_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    """Those of an earlier release have none; a run that was begun by one and gone on with has both."""
    names = ("zero_shot/top1", "zero_shot/ece", "msp/auroc")
    header = ",".join(f"probe/id{size}/{name}" for size in ("", "@128") for name in names)
    (tmp_path / "metrics.csv").write_text(f"step,{header}\n0,0.5,0.1,0.6,,,\n1,,,,0.75,0.2,0.7\n")
    draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    lines = [{str(line.get_label()): list(line.get_ydata()) for line in axes.lines} for axes in drawn[0].axes[:3]]
    assert lines == [
        {"id": [0.5], "id@128": [0.75]},
        {"id": [0.1], "id@128": [0.2]},
        {"id msp": [0.6], "id@128 msp": [0.7]},
    ]
