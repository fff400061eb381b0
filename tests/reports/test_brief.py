"""The table of at most 20 lines: what stands in it, what is a mean of what, and what is counted instead."""

from __future__ import annotations

import pytest

from qatlab.evaluation.evaluation import row
from qatlab.metrics.paired import Difference
from qatlab.reports.brief import LINES, brief_lines, brief_table
from qatlab.reports.table import table_lines
from qatlab.results.rowfile import Row
from qatlab.suites.source import Source, View

DETECTION = ("auroc", "fpr95_id_pos", "fpr95_ood_pos")
ROLES = {
    "id": ("birds", "cats", "dogs"),
    "shifted": ("fog", "noise"),
    "near_ood": ("near",),
    "far_ood": ("far", "farther"),
    "common": ("usual",),
    "counter": ("unusual",),
}


def rows(scores: tuple[str, ...] = ("msp", "mcm"), p: float = 0.001) -> list[Row]:
    """FP32 and a quantized stage; every metric of the i-th set is i / 10, and 0.05 more when quantized."""
    found: list[Row] = []
    for stage in ("fp32", "quantized"):
        for role, names in ROLES.items():
            for i, name in enumerate(names, 1):
                of = (
                    [(score, DETECTION) for score in scores]
                    if "ood" in role
                    else [("zero_shot", ("top1", "ece", "nll"))]
                )
                of += [("one_vs_all", ("drop", "rsg"))] if role == "counter" else []
                for score, metrics in of:
                    found.append(made(stage, role, name, score, dict.fromkeys(metrics, i / 10), p))
    return found


def made(stage: str, role: str, name: str, score: str, metrics: dict[str, float], p: float = 0.001) -> Row:
    more = 0.05 if stage == "quantized" else 0.0
    paired = {metric: Difference(0.05, 0.01, 0.09, p) for metric in metrics} if more else {}
    of = row(
        View(stage, 20.0), Source(name, role, "birds"), score, 9, {k: v + more for k, v in metrics.items()}, {}, paired
    )
    return of | {"run_id": "0a1b2c3d", "recipe": "ptq"}


def texts(found: list[Row], first: str | None = None) -> dict[tuple[str, str], list[str]]:
    return {
        (line.dataset, line.label): [cell.text.strip() for cell in line.cells]
        for line in brief_lines(found, first).lines
    }


def test_the_first_id_set_stands_by_itself_and_others_as_means() -> None:
    assert texts(rows()) == {
        ("birds", "top-1 %"): ["10.0", "15.0 (+5.0)*"],
        ("birds", "ECE %"): ["10.0", "15.0 (+5.0)*"],
        ("birds", "NLL"): ["0.100", "0.150 (+0.050)*"],
        ("mean of 2 other ID sets", "top-1 %"): ["25.0", "30.0 (+5.0)"],
        ("mean of 2 other ID sets", "ECE %"): ["25.0", "30.0 (+5.0)"],
        ("mean of 2 shifted sets", "top-1 %"): ["15.0", "20.0 (+5.0)"],
        ("mean of 2 shifted sets", "ECE %"): ["15.0", "20.0 (+5.0)"],
        ("near", "AUROC %, MCM"): ["10.0", "15.0 (+5.0)*"],
        ("near", "FPR@95 ID+ %, MCM"): ["10.0", "15.0 (+5.0)*"],
        ("mean of 2 far-OOD sets", "AUROC %, MCM"): ["15.0", "20.0 (+5.0)"],
        ("mean of 2 far-OOD sets", "FPR@95 ID+ %, MCM"): ["15.0", "20.0 (+5.0)"],
        ("unusual", "spurious gap: drop %"): ["10.0", "15.0 (+5.0)*"],
    }
    assert ("cats", "NLL") in texts(rows(), "cats")


def test_a_line_counts_the_rest_which_the_full_table_has() -> None:
    found = rows()
    brief, (_, full) = brief_lines(found), table_lines(found)
    known = {(line.dataset, line.label) for line in brief.lines}
    assert brief.left == sum((line.dataset, line.label) not in known for line in full) > 0
    caption = str(brief_table(found, "").caption)
    assert (
        caption.splitlines()[-1] == f"{brief.left} lines of single sets and scores are not shown: table=full has them"
    )
    alone = [r for r in found if r["dataset"] == "birds"]
    assert "not shown" not in str(brief_table(alone, "").caption)


def test_a_mean_is_over_the_same_sets_in_every_column_or_not_there() -> None:
    found = [r for r in rows() if (r["stage"], r["dataset"]) != ("quantized", "noise")]
    assert texts(found)["mean of 2 shifted sets", "top-1 %"] == ["15.0", ""]


def test_without_mcm_another_score_stands_for_all() -> None:
    assert ("near", "AUROC %, Energy") in texts(rows(("energy", "vim")))


def test_b4_what_a_user_added_is_shown_and_the_table_stays_short() -> None:
    found = rows(("mcm", "my.score"))
    own = {f"m{i}": 1234.56 for i in range(20)}
    found += [made(stage, "id", "birds", "mine", own) for stage in ("fp32", "quantized")]
    shown = texts(found)
    assert shown["near", "AUROC %, my.score"] == ["10.0", "15.0 (+5.0)*"]
    assert shown["mean of 2 far-OOD sets", "FPR@95 ID+ %, my.score"] == ["15.0", "20.0 (+5.0)"]
    assert shown["birds", "mine, m0"][0] == "1235"
    assert len(shown) == LINES == 20
    assert brief_lines(found).left > 10


@pytest.mark.parametrize(("p", "marked"), [(0.001, True), (0.4, False)])
def test_single_sets_keep_their_tests(p: float, marked: bool) -> None:
    assert texts(rows(p=p))["birds", "top-1 %"][1].endswith("*") is marked
