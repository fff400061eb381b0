from __future__ import annotations

import re

import polars as pl
import pytest
from rich.console import Console
from statsmodels.stats.multitest import multipletests

from qatlab.config import compose
from qatlab.core.errors import UserError
from qatlab.evaluation.evaluation import row
from qatlab.metrics.ood import ALL_SCORES
from qatlab.metrics.paired import Difference
from qatlab.reports.files import check_shown, export
from qatlab.reports.table import adjusted, full_table, table_lines
from qatlab.reports.titles import SCORES as NAMES
from qatlab.results.rowfile import Row
from qatlab.results.stages import TITLES
from qatlab.suites.source import Source, View

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
        console.print(full_table(rows, title))
    lines = [line for line in capture.get().splitlines() if line[:1] in "│┃"]
    return [[cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")] for line in lines]


def line(cells: list[list[str]], label: str, dataset: str | None = None) -> list[str]:
    """Return the stages' cells of the first line with this label, or of the one that begins ``dataset``."""
    return next(c[2:] for c in cells if c[1] == label and (dataset is None or c[0] == dataset))


def values(cells: list[str]) -> list[str]:
    """The cells without their plain differences from FP32."""
    return [re.sub(r" \([+-][\d.]+\)$", "", cell.strip()) for cell in cells]


def test_stages_stand_in_their_order_whatever_the_order_of_the_rows():
    header, *_ = rendered(rows(STAGES[::-1]))
    assert header == ["set", "metric", *(TITLES[stage] for stage in STAGES)]


def test_a_labelled_set_shows_its_metrics_in_per_cent():
    cells = rendered(rows(STAGES))
    assert values(line(cells, "top-1 %", "birds")) == ["75.0", "12.5", "50.0", "50.0"]
    assert values(line(cells, "ECE %")) == ["1.2"] * 4
    assert values(line(cells, "NLL")) == ["1.235"] * 4
    assert values(line(cells, "confidence - accuracy %")) == ["-2.5"] * 4


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
    quantized = [found["0a1b2c3d", "quantized", name, "", "zero_shot", "top1"] for name in ("birds", "sketch")]
    assert quantized == pytest.approx(multipletests([0.01, 0.04], method="holm")[1])
    assert found["0a1b2c3d", "adapted", "birds", "", "zero_shot", "top1"] == 0.02


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


# -- several models ----------------------------------------------------------------------------------------------------

TINY = {"model": "tiny", "pretrained": "tiny", "weights": None, "activation": "gelu", "fp32_id": "11111111"}
OTHER = TINY | {"pretrained": None, "weights": "/a/other.safetensors", "fp32_id": "22222222"}


def of_model(run_id: str, facts: dict[str, str | None], top1: float, stages: tuple[str, ...] = ("fp32", "quantized")):
    """The rows of a run of a model whose FP32 has this accuracy, and loses 0.25 of it when quantized."""
    stored = [row | facts for row in rows(list(stages), run_id)]
    for found in stored:
        if found["score"] == "zero_shot":
            found["metrics"] = found["metrics"] | {"top1": top1 if found["stage"] == "fp32" else top1 - 0.25}
    return stored


def test_using_a8_every_model_has_its_own_fp32_column() -> None:
    stored = [*of_model("aaaaaaaa", TINY, 0.75), *of_model("bbbbbbbb", OTHER, 0.5), *of_model("cccccccc", TINY, 0.75)]
    columns, lines = table_lines(stored)
    assert columns == [
        "tiny\nFP32",
        "tiny\nptq aaaaaaaa\nquantized",
        "tiny\nptq cccccccc\nquantized",
        "tiny other.safetensors\nFP32",
        "tiny other.safetensors\nptq bbbbbbbb\nquantized",
    ]
    top1 = values([cell.text for cell in next(found for found in lines if found.label == "top-1 %").cells])
    assert top1 == ["75.0", "50.0", "50.0", "50.0", "25.0"]


def test_using_a8_the_order_of_the_runs_changes_no_number() -> None:
    first, second = of_model("aaaaaaaa", TINY, 0.75), of_model("bbbbbbbb", OTHER, 0.5)
    tables = []
    for stored in ([*first, *second], [*second, *first]):
        columns, lines = table_lines(stored)
        tables.append([dict(zip(columns, found.cells, strict=True)) for found in lines])
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        # other weights under the same path, which only the hash tells
        ({"fp32_id": "33333333"}, ["tiny gelu 11111111", "tiny gelu 33333333"]),
        # of an earlier release: no hash in either row
        ({"fp32_id": None, "activation": "quick_gelu"}, ["tiny gelu", "tiny quick_gelu"]),
    ],
)
def test_using_a8_models_of_one_name_are_told_apart(change: dict[str, str | None], names: list[str]) -> None:
    own = TINY | ({"fp32_id": None} if change["fp32_id"] is None else {})
    stored = [*of_model("aaaaaaaa", own, 0.75), *of_model("bbbbbbbb", TINY | change, 0.5)]
    columns, lines = table_lines(stored)
    assert [column for column in columns if "FP32" in column] == [f"{name}\nFP32" for name in names]
    assert values([cell.text for cell in lines[0].cells]) == ["75.0", "50.0", "50.0", "25.0"]


def test_using_a8_two_unquantized_models_beside_each_other() -> None:
    stored = [*of_model("aaaaaaaa", TINY, 0.75, ("fp32",)), *of_model("bbbbbbbb", OTHER, 0.5, ("fp32",))]
    columns, lines = table_lines(stored)
    assert columns == ["tiny\nFP32", "tiny other.safetensors\nFP32"]
    assert [cell.text.strip() for cell in lines[0].cells] == ["75.0", "50.0"]


def test_using_a8_other_images_under_the_name_of_a_set_have_lines_of_their_own() -> None:
    """Two runs of one model: FP32's numbers on 128 and on 512 images are both right, each where it belongs."""
    stored = [*of_model("aaaaaaaa", TINY, 0.75), *of_model("bbbbbbbb", TINY, 0.5)]
    for found in stored:
        large = found["run_id"] == "bbbbbbbb"
        found.update(n=512 if large else 128, definition="large" if large else "small")
    cells = rendered(paired(stored, "top1", {("quantized", "birds"): 0.01}))
    assert line(cells, "top-1 %", "birds, 128 images") == ["75.0", "50.0 (-25.0)*", ""]
    assert line(cells, "top-1 %", "birds, 512 images") == ["50.0", "", "25.0 (-25.0)*"]
    again = [found | {"n": 128} for found in stored]
    assert {cells[0] for cells in rendered(again)} >= {"birds, 128 images", "birds, 128 images (large)"}


def test_using_a8_models_that_prepare_images_in_other_ways_share_a_sets_lines() -> None:
    stored = [*of_model("aaaaaaaa", TINY, 0.75), *of_model("bbbbbbbb", OTHER, 0.5)]
    for found in stored:
        found["definition"] = found["fp32_id"]
    assert values(line(rendered(stored), "top-1 %", "birds")) == ["75.0", "50.0", "50.0", "25.0"]


def test_using_a8_rows_of_earlier_releases_join_those_of_their_run() -> None:
    stored = of_model("aaaaaaaa", TINY, 0.75)
    for found in stored:
        if found["dataset"] == "birds":
            del found["fp32_id"]
    columns, lines = table_lines(stored)
    assert columns == ["tiny\nFP32", "tiny\nquantized"]
    assert all(cell.text for found in lines for cell in found.cells)


@pytest.mark.parametrize("form", ["latex", "markdown"])
def test_using_a8_a_file_too_tells_the_models_apart(form: str, tmp_path) -> None:
    stored = [*of_model("aaaaaaaa", TINY, 0.75), *of_model("bbbbbbbb", OTHER, 0.5)]
    table, *_ = tables(export(stored, form, tmp_path / "table").read_text())
    found = {(cells["set"], cells["model"], cells["stage"]): cells["top-1 %"] for cells in table}
    assert found["birds", "tiny", "FP32"] == "75.0"
    assert found["birds", "tiny other.safetensors", "FP32"] == "50.0"
    assert found["birds", "tiny other.safetensors", "ptq bbbbbbbb, quantized"] == "25.0"


@pytest.mark.parametrize(("form", "read"), [("csv", pl.read_csv), ("parquet", pl.read_parquet)])
def test_using_a8_a_file_of_numbers_tells_models_apart(form, read, tmp_path) -> None:
    stored = [*of_model("aaaaaaaa", TINY, 0.75), *of_model("bbbbbbbb", OTHER, 0.5)]
    for found in stored:
        if found["score"] == "zero_shot" and found["stage"] == "quantized":
            found["refit"] = {"ece": Difference(-0.1, -0.2, -0.05, 0.01)._asdict()}
    frame = read(export(stored, form, tmp_path / "table")).filter(
        (pl.col("stage") == "fp32") & (pl.col("dataset") == "birds")
    )
    assert [str(known) for known in frame["fp32_id"]] == ["11111111", "22222222"]
    assert frame["top1"].to_list() == [0.75, 0.5]


def test_using_a8_holms_families_are_of_one_run_and_tell_definitions_apart() -> None:
    stored = [*of_model("aaaaaaaa", TINY, 0.75), *of_model("bbbbbbbb", OTHER, 0.5)]
    paired(stored, "top1", {("quantized", "birds"): 0.01, ("quantized", "sketch"): 0.04})
    again = [found | {"definition": "other"} for found in stored if found["run_id"] == "aaaaaaaa"]
    found = adjusted([*stored, *again])
    own = [p for key, p in found.items() if key[0] == "aaaaaaaa"]
    assert sorted(own) == pytest.approx(sorted(multipletests([0.01, 0.01, 0.04, 0.04], method="holm")[1]))
    other = [p for key, p in found.items() if key[0] == "bbbbbbbb"]
    assert other == pytest.approx(multipletests([0.01, 0.04], method="holm")[1])


@pytest.mark.parametrize("extra", [
    row(View("probe", 100.0), Source("birds", "id", "birds"), "zero_shot", 9, {"top1": 0.01, **LABELLED}),
    row(View("temperature", 50.0), Source("calibration", "calibration", "birds"), "logit_scale_fit", 9, {"nll": 1.0}),
])  # fmt: skip
def test_probes_and_the_fit_of_the_temperature_are_left_out(extra):
    assert rendered([*rows(STAGES), extra | {"run_id": "0a1b2c3d"}]) == rendered(rows(STAGES))


def test_using_a6_the_row_of_a_fit_makes_no_column() -> None:
    fit = row(View("temperature", 1000.0), Source("calibration", "calibration", "birds"), "logit_scale_fit", 9, {})
    assert table_lines([*rows(STAGES[:2]), fit | {"run_id": "0a1b2c3d", "recipe": "ptq"}])[0] == ["FP32", "quantized"]


def test_the_title_and_the_conventions_are_told():
    table = full_table(rows(["fp32"]), "ptq 0a1b2c3d")
    assert table.title == "ptq 0a1b2c3d"
    assert "FPR@95 ID+" in str(table.caption)
    assert "OOD+" in str(table.caption)


SHARES = {"weight_share": 0.9, "act_share": 0.5, "product_share": 0.5, "skipped_share": 0.0, "attention_share": 0.02}
STATED = "90.0 % of the products with a weight have the weight rounded, 50.0 % both operands; QK^T and PV, 2.0 %"


def test_models_d1_the_table_states_what_each_run_rounds(tmp_path):
    unknown = dict.fromkeys(SHARES)
    first = [r | (unknown if r["stage"] == "fp32" else SHARES) for r in rows(STAGES)]
    second = [r | SHARES | {"skipped_share": 0.1} for r in rows(["quantized"], "4e5f6071")]
    assert STATED in full_table(first, "ptq 0a1b2c3d").caption.splitlines()[-1]
    *_, one, other = full_table([*first, *second], "both").caption.splitlines()
    assert one.startswith(f"ptq 0a1b2c3d: {STATED}")
    assert other.startswith("ptq 4e5f6071: 90.0 % ")
    assert "both operands, 10.0 % are left out by quant.rules;" in other
    assert full_table(rows(STAGES), "of an earlier release").caption.endswith("no tests.")
    assert export(first, "markdown", tmp_path / "table.md").read_text().splitlines()[-1].startswith(STATED)
    assert export(first, "latex", tmp_path / "table.tex").read_text().splitlines()[-1].startswith(f"% {STATED}")


# -- as a file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "read"), [("csv", pl.read_csv), ("parquet", pl.read_parquet)])
def test_every_number_goes_into_a_file(form, read, tmp_path):
    stored = paired(rows(STAGES[:2]), "top1", {("quantized", "birds"): 0.04})
    stored[0]["intervals"] = {"top1": [0.7, 0.8]}
    frame = read(export(stored, form, tmp_path / "table"))
    assert len(frame) == len(stored)
    first = frame.row(0, named=True)
    assert (first["top1"], first["top1_low"], first["top1_high"]) == (0.75, 0.7, 0.8)
    of_quantized = frame.filter(pl.col("top1_p").is_not_null()).row(0, named=True)
    assert (of_quantized["stage"], of_quantized["top1_difference"], of_quantized["top1_p"]) == (
        "quantized",
        -0.25,
        0.04,
    )


def tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a file, a line of cells by the heads of its columns."""
    found: list[list[list[str]]] = [[]]
    for written in text.replace("\\%", "%").splitlines():
        if "tabular" in written or "rule" in written or set(written) <= set("|-"):
            continue
        row = written.startswith("|") or written.endswith("\\\\")
        if row:
            cells = re.split(r"(?<!\\)\|", written.strip("|")) if written[0] == "|" else written[:-2].split("&")
            found[-1].append([cell.strip() for cell in cells])
        elif found[-1]:
            found.append([])
    return [[dict(zip(heads, cells, strict=True)) for cells in lines] for heads, *lines in filter(None, found)]


@pytest.mark.parametrize("form", ["latex", "markdown"])
def test_using_a4_a_file_has_a_column_per_metric_with_its_interval(form, tmp_path):
    stored = paired(rows(STAGES[:2]), "top1", {("quantized", "birds"): 0.001})
    for found in stored:
        found["intervals"] = {"top1": [0.1, 0.2], "auroc": [0.85, 0.95]}
        found |= {"weight_bits": 8, "act_bits": 4, "model": "tiny", "pretrained": "tiny"}
    labelled, detection, spurious = tables(export(stored, form, tmp_path / "deep" / "table.txt").read_text())
    quantized = next(line for line in labelled if (line["set"], line["stage"]) == ("birds", "quantized"))
    between = "[{}, {}]" if form == "latex" else r"\[{}, {}\]"
    assert quantized == {
        **{"set": "birds", "n": "9", "model": "tiny", "bits": "W8A4", "stage": "quantized"},
        **{"top-1 %": f"12.5 {between.format('10.0', '20.0')}*", "ECE %": "1.2", "NLL": "1.235"},
        "confidence - accuracy %": "-2.5",
    }
    assert {line["bits"] for line in labelled if line["stage"] == "FP32"} == {"32"}
    mcm = next(line for line in detection if (line["score"], line["stage"]) == ("MCM", "FP32"))
    assert [mcm[head] for head in ("AUROC %", "FPR@95 ID+ %", "FPR@95 OOD+ %")] == [
        f"90.0 {between.format('85.0', '95.0')}",
        "40.0",
        "100.0",
    ]
    assert [line["drop %"] for line in spurious] == ["20.0"] * 2


def test_using_a4_the_file_begins_with_what_the_rows_show_and_ends_with_what_marks_mean(tmp_path):
    stored = rows(STAGES[:2])
    for form, begin in (("latex", "% "), ("markdown", "")):
        first, *_, last = export(stored, form, tmp_path / form).read_text().splitlines()
        assert first.startswith(f"{begin}quantized: accuracy −62.5 points on birds (n = 9)")
        assert "suite.resamples=0" in last


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("a&b", "a&amp;b"),
        ("[here](javascript:x)", r"\[here\](javascript:x)"),
        ("two\nlines", "two lines"),
        ("imagenet_c-3.5%", "imagenet_c-3.5%"),
    ],
)
def test_faults_s9_names_of_sets_are_shown_letter_by_letter(tmp_path, name, shown):
    stored = [r | {"dataset": name if r["dataset"] == "birds" else r["dataset"]} for r in rows(STAGES[:2])]
    lines = export(stored, "markdown", tmp_path / "table.md").read_text().splitlines()
    assert shown in {cell.strip() for line in lines for cell in line.strip("|").split("|")}
    assert not any("<" in line for line in lines)


@pytest.mark.parametrize("form", ["latex", "markdown"])
def test_faults_s9_a_name_ends_no_comment(form, tmp_path):
    stored = [r | {"dataset": "two\n\\input{x}" if r["dataset"] == "birds" else r["dataset"]} for r in rows(STAGES[:2])]
    lines = export(stored, form, tmp_path / "table").read_text().splitlines()
    assert not any(line.startswith("\\input") for line in lines)


def test_what_is_shown_and_where_is_looked_at_first(tmp_path):
    check_shown(compose("table=full", "format=csv", f"file={tmp_path}/new/table.csv"))
    for options, told in (
        (["format=markdwon"], r"format=markdwon is unknown .did you mean 'markdown'"),
        (["table=ful"], r"table=ful is unknown .did you mean 'full'"),
        (["file=a.tex"], r"file=a\.tex says where .* add format="),
        (["format=latex", f"file={tmp_path}"], "is a folder: name the file in it"),
    ):
        with pytest.raises(UserError, match=told):
            check_shown(compose(*options))


def test_b4_own_scores_and_evaluations_have_lines_of_their_own() -> None:
    stored = rows(STAGES[:2])
    for stage in STAGES[:2]:
        view, outside = View(stage, 100.0), Source("dtd", "far_ood", "birds")
        own = [
            row(view, outside, "my.score", 9, DETECTION),
            row(view, Source("birds", "id", "birds"), "mine", 9, {"hits": 1234.56}),
        ]
        stored += [found | {"run_id": "0a1b2c3d", "recipe": "ptq"} for found in own]
    stored[0]["metrics"]["added"] = 0.5
    cells = rendered(stored)
    assert line(cells, "OOD, my.score") == ["90.0 |  40.0 | 100.0"] * 2
    assert values(line(cells, "mine, hits")) == ["1235", "1235"]
    assert line(cells, "zero_shot, added") == ["0.5", ""]


def test_columns_say_model_and_bits() -> None:
    stored = [r | {"weight_bits": 4.5, "act_bits": None} for r in of_model("aaaaaaaa", TINY, 0.75)]
    assert table_lines(stored)[0] == ["tiny\nFP32", "tiny W4.5\nquantized"]


def test_plain_differences_are_told_where_there_are_no_tests() -> None:
    stored = rows(STAGES[:2])
    cells = rendered(stored)
    assert line(cells, "top-1 %", "birds") == ["75.0", "12.5 (-62.5)"]
    assert "no tests" in str(full_table(stored, "").caption)
    assert "p < 0.05" not in str(full_table(stored, "").caption)
    other = [r | {"n": 10} if r["stage"] == "quantized" else r for r in stored]
    assert line(rendered(other), "top-1 %", "birds") == ["75.0", "12.5"]  # of other images: no difference
