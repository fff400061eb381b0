from __future__ import annotations

import pytest
from rich.console import Console

from qatlab.evaluation import Row, Source, View, row
from qatlab.metrics.ood import SCORES
from qatlab.table import SCORES as NAMES
from qatlab.table import TITLES, results_table

STAGES = ["fp32", "quantized", "adapted", "temperature"]
TOP1 = {"fp32": 0.75, "quantized": 0.125, "adapted": 0.5, "temperature": 0.5}
LABELLED = {"ece": 0.0123, "nll": 1.23456, "confidence_gap": -0.025}
DETECTION = {"auroc": 0.9, "fpr95_id_pos": 0.4, "fpr95_ood_pos": 1.0}


def rows(stages: list[str]) -> list[Row]:
    found = []
    for stage in stages:
        view = View(stage, 100.0)
        labelled = {"top1": TOP1[stage], **LABELLED}
        found.append(row(view, Source("birds", "id", "birds"), "zero_shot", 9, labelled))
        found.append(row(view, Source("sketch", "shifted", "birds"), "zero_shot", 9, labelled))
        found += [row(view, Source("dtd", "far_ood", "birds"), score, 9, DETECTION) for score in SCORES]
    return found


def rendered(rows: list[Row], title: str = "ptq 0a1b2c3d") -> list[list[str]]:
    """Return the cells of the table's printed lines."""
    console = Console(width=250, record=True, quiet=False, force_terminal=False, no_color=True)
    with console.capture() as capture:
        console.print(results_table(rows, title))
    lines = [line for line in capture.get().splitlines() if line[:1] in "│┃"]
    return [[cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")] for line in lines]


def line(cells: list[list[str]], label: str, dataset: str | None = None) -> list[str]:
    """Return the stages' cells of the first line with this label, or of the one that begins ``dataset``."""
    return next(c[2:] for c in cells if c[1] == label and (dataset is None or c[0] == dataset))


def test_stages_stand_in_their_order_whatever_the_order_of_the_rows():
    header, *_ = rendered(rows(STAGES[::-1]))
    assert header == ["set", "metric", *(TITLES[stage] for stage in STAGES)]


def test_a_labelled_set_shows_its_metrics_in_per_cent():
    cells = rendered(rows(STAGES))
    assert line(cells, "top-1 %", "birds") == ["75.0", "12.5", "50.0", "50.0"]
    assert line(cells, "ECE %") == ["1.2"] * 4
    assert line(cells, "NLL") == ["1.235"] * 4
    assert line(cells, "confidence - accuracy %") == ["-2.5"] * 4


def test_a_shifted_set_shows_less():
    cells = rendered(rows(["fp32"]))
    start = next(i for i, c in enumerate(cells) if c[0] == "sketch")
    assert [c[1] for c in cells[start : start + 2]] == ["top-1 %", "ECE %"]
    assert cells[start + 2][0] == "dtd"


def test_an_ood_set_shows_every_score_in_both_conventions():
    cells = rendered(rows(["fp32", "quantized"]))
    assert list(NAMES) == list(SCORES)
    # the separators of the three numbers are plain bars, those of the table are not
    for name in NAMES.values():
        assert line(cells, f"{name}: AUROC | FPR@95 ID+ | OOD+") == ["90.0 |  40.0 | 100.0"] * 2


def test_a_stage_without_a_set_leaves_its_cells_empty():
    stored = [r for r in rows(["fp32", "adapted"]) if (r["stage"], r["role"]) != ("fp32", "far_ood")]
    stored = [r for r in stored if (r["stage"], r["dataset"]) != ("adapted", "birds")]
    cells = rendered(stored)
    assert line(cells, "top-1 %", "birds") == ["75.0", ""]
    assert line(cells, "MSP: AUROC | FPR@95 ID+ | OOD+") == ["", "90.0 |  40.0 | 100.0"]


def test_only_the_scores_that_were_asked_for_have_a_line():
    stored = [r for r in rows(["fp32"]) if r["score"] not in ("energy", "mcm")]
    labels = [c[1] for c in rendered(stored) if c[1].endswith("OOD+")]
    assert [label.split(":")[0] for label in labels] == ["MSP", "MaxLogit"]


@pytest.mark.parametrize("extra", [
    row(View("probe", 100.0), Source("birds", "id", "birds"), "zero_shot", 9, {"top1": 0.01, **LABELLED}),
    row(View("temperature", 50.0), Source("calibration", "calibration", "birds"), "logit_scale_fit", 9, {"nll": 1.0}),
])  # fmt: skip
def test_probes_and_the_fit_of_the_temperature_are_left_out(extra):
    assert rendered([*rows(STAGES), extra]) == rendered(rows(STAGES))


def test_the_title_and_the_conventions_are_told():
    table = results_table(rows(["fp32"]), "ptq 0a1b2c3d")
    assert table.title == "ptq 0a1b2c3d"
    assert "ID+" in str(table.caption)
    assert "OOD+" in str(table.caption)
