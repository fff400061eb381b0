from __future__ import annotations

import polars as pl
import pytest
from rich.console import Console
from statsmodels.stats.multitest import multipletests

from qatlab.errors import UserError
from qatlab.evaluation import Row, Source, View, row
from qatlab.metrics.ood import ALL_SCORES
from qatlab.metrics.paired import Difference
from qatlab.table import SCORES as NAMES
from qatlab.table import TITLES, adjusted, results_table, table_lines
from qatlab.table_files import check_format, export

STAGES = ["fp32", "quantized", "adapted", "temperature"]
TOP1 = {"fp32": 0.75, "quantized": 0.125, "adapted": 0.5, "temperature": 0.5}
LABELLED = {"ece": 0.0123, "nll": 1.23456, "confidence_gap": -0.025}
DETECTION = {"auroc": 0.9, "fpr95_id_pos": 0.4, "fpr95_ood_pos": 1.0}
SPURIOUS = {"common": 0.8, "counter": 0.6, "drop": 0.2, "rsg": 0.25}


def rows(stages: list[str], run_id: str = "0a1b2c3d") -> list[Row]:
    found = []
    for stage in stages:
        view = View(stage, 100.0)
        labelled = {"top1": TOP1[stage], **LABELLED}
        found.append(row(view, Source("birds", "id", "birds"), "zero_shot", 9, labelled))
        found.append(row(view, Source("sketch", "shifted", "birds"), "zero_shot", 9, labelled))
        found.append(row(view, Source("indoors", "counter", "birds"), "one_vs_all", 9, SPURIOUS))
        found += [row(view, Source("dtd", "far_ood", "birds"), score, 9, DETECTION) for score in ALL_SCORES]
    return [r | {"run_id": run_id, "recipe": "ptq"} for r in found]


def paired(stored: list[Row], metric: str, p_values: dict[tuple[str, str], float], value: float = -0.25) -> list[Row]:
    """The rows with a difference from FP32 of one metric, {(stage, set): p}."""
    for r in stored:
        if (r["stage"], r["dataset"]) in p_values and metric in r["metrics"]:
            p = p_values[r["stage"], r["dataset"]]
            r["paired"] = {metric: Difference(value, value - 0.1, value + 0.1, p)._asdict()}
    return stored


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
    assert cells[start + 2][0] == "indoors"


def test_a_spurious_pair_shows_its_gap():
    assert line(rendered(rows(["fp32"])), "drop | RSG %") == ["20.0 |  25.0"]


def test_an_ood_set_shows_every_score_in_both_conventions():
    cells = rendered(rows(["fp32", "quantized"]))
    assert set(NAMES) == set(ALL_SCORES)
    # the separators of the three numbers are plain bars, those of the table are not
    for name in NAMES.values():
        assert line(cells, f"OOD, {name}") == ["90.0 |  40.0 | 100.0"] * 2


def test_a_stage_without_a_set_leaves_its_cells_empty():
    stored = [r for r in rows(["fp32", "adapted"]) if (r["stage"], r["role"]) != ("fp32", "far_ood")]
    stored = [r for r in stored if (r["stage"], r["dataset"]) != ("adapted", "birds")]
    cells = rendered(stored)
    assert line(cells, "top-1 %", "birds") == ["75.0", ""]
    assert line(cells, "OOD, MSP") == ["", "90.0 |  40.0 | 100.0"]


def test_only_the_scores_that_were_asked_for_have_a_line():
    stored = [r for r in rows(["fp32"]) if r["role"] != "far_ood" or r["score"] in ("msp", "max_logit")]
    assert [c[1] for c in rendered(stored) if c[1].startswith("OOD")] == ["OOD, MSP", "OOD, MaxLogit"]


def test_differences_from_fp32_are_told_and_marked_where_they_are_beyond_chance():
    stored = paired(rows(STAGES[:2]), "top1", {("quantized", "birds"): 0.04, ("quantized", "sketch"): 0.001})
    _, lines = table_lines(stored)
    found = {found.dataset: found.cells for found in lines if found.label == "top-1 %"}
    # of two tests, the smaller p-value counts twice: 0.002, and then the other one by itself
    assert [cell.text.strip() for cell in found["birds"]] == ["75.0", "12.5 (-25.0)*"]
    assert [cell.verdict for cell in found["birds"]] == [0, -1]
    stored = paired(rows(STAGES[:2]), "top1", {("quantized", "birds"): 0.04, ("quantized", "sketch"): 0.03})
    assert not any("*" in cell.text for found in table_lines(stored)[1] for cell in found.cells)


@pytest.mark.parametrize(("metric", "verdict"), [("top1", -1), ("ece", 1)])
def test_a_lower_error_is_better_and_a_lower_accuracy_worse(metric, verdict):
    stored = paired(rows(STAGES[:2]), metric, {("quantized", "birds"): 0.001})
    verdicts = {cell.verdict for found in table_lines(stored)[1] for cell in found.cells}
    assert verdicts == {0, verdict}


def test_p_values_are_corrected_over_the_sets_of_a_metric():
    chances = {("quantized", "birds"): 0.01, ("quantized", "sketch"): 0.04, ("adapted", "birds"): 0.02}
    found = adjusted(paired(rows(STAGES), "top1", chances))
    quantized = [found["0a1b2c3d", "quantized", name, "zero_shot", "top1"] for name in ("birds", "sketch")]
    assert quantized == pytest.approx(multipletests([0.01, 0.04], method="holm")[1])
    assert found["0a1b2c3d", "adapted", "birds", "zero_shot", "top1"] == 0.02


def test_several_runs_stand_side_by_side_with_one_column_for_fp32():
    columns, lines = table_lines(
        [*rows(["fp32", "quantized"]), *rows(["fp32", "quantized", "temperature"], "99999999")]
    )
    assert columns == [
        "FP32",
        "ptq 0a1b2c3d\nquantized",
        "ptq 99999999\nquantized",
        "ptq 99999999\nafter temperature",
    ]
    assert all(len(found.cells) == 4 for found in lines)


@pytest.mark.parametrize("extra", [
    row(View("probe", 100.0), Source("birds", "id", "birds"), "zero_shot", 9, {"top1": 0.01, **LABELLED}),
    row(View("temperature", 50.0), Source("calibration", "calibration", "birds"), "logit_scale_fit", 9, {"nll": 1.0}),
])  # fmt: skip
def test_probes_and_the_fit_of_the_temperature_are_left_out(extra):
    assert rendered([*rows(STAGES), extra | {"run_id": "0a1b2c3d"}]) == rendered(rows(STAGES))


def test_the_title_and_the_conventions_are_told():
    table = results_table(rows(["fp32"]), "ptq 0a1b2c3d")
    assert table.title == "ptq 0a1b2c3d"
    assert "ID+" in str(table.caption)
    assert "OOD+" in str(table.caption)


# -- as a file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "read"), [("csv", pl.read_csv), ("parquet", pl.read_parquet)])
def test_every_number_goes_into_a_file(form, read, tmp_path):
    stored = paired(rows(STAGES[:2]), "top1", {("quantized", "birds"): 0.04})
    stored[0]["intervals"] = {"top1": [0.7, 0.8]}
    frame = read(export(stored, form, tmp_path))
    assert len(frame) == len(stored)
    first = frame.row(0, named=True)
    assert (first["top1"], first["top1_low"], first["top1_high"]) == (0.75, 0.7, 0.8)
    of_quantized = frame.filter(pl.col("top1_p").is_not_null()).row(0, named=True)
    assert (of_quantized["stage"], of_quantized["top1_difference"], of_quantized["top1_p"]) == (
        "quantized",
        -0.25,
        0.04,
    )


def test_the_table_goes_into_a_paper(tmp_path):
    path = export(rows(STAGES[:2]), "latex", tmp_path)
    text = path.read_text()
    assert path.name == "table.tex"
    assert text.startswith("\\begin{tabular}")
    assert "birds" in text
    assert "12.5" in text
    assert "top-1 \\%" in text


def test_the_table_goes_into_a_page(tmp_path):
    lines = export(rows(STAGES[:2]), "markdown", tmp_path).read_text().splitlines()
    assert len({text.count("|") for text in lines}) == 1
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["set", "metric", "FP32", "quantized"]


def test_an_unknown_format_is_told():
    check_format(None)
    with pytest.raises(UserError, match=r"format=markdwon is unknown .did you mean 'markdown'"):
        check_format("markdwon")
