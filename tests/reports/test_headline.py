"""The first line of what a run prints, and its last one: made from rows by rule."""

from __future__ import annotations

import pytest

from qatlab.config import compose
from qatlab.evaluation.evaluation import row
from qatlab.metrics.paired import Difference
from qatlab.metrics.resampling import Interval
from qatlab.models.quantized import method
from qatlab.reports.difference import signed, verdict
from qatlab.reports.headline import headlines
from qatlab.reports.next_step import RECOVERS, next_line
from qatlab.results.rowfile import Row
from qatlab.suites.source import Source, View


def rows(
    top1: Difference | None = None, ece: Difference | None = None, stage: str = "quantized", run_id: str = "0a1b2c3d"
) -> list[Row]:
    """FP32 and another stage on an ID set, and on a second one that the line is not about."""
    found = []
    intervals = {"top1": Interval(0.9, 0.945), "ece": Interval(0.02, 0.05)}
    for name in ("id", "other"):
        for at, value in (("fp32", 0.924), (stage, 0.922)):
            tested = at != "fp32" and top1 is not None and ece is not None
            paired = {"top1": top1, "ece": ece} if tested and name == "id" else {}
            metrics = {"top1": value, "ece": 0.028 if at == "fp32" else 0.031}
            made = row(View(at, 20.0), Source(name, "id", name), "zero_shot", 512, metrics, intervals, paired)  # type: ignore[arg-type]
            facts = {"model": "tiny", "data": "embedded", "recipe": "ptq", "run_id": run_id}
            found.append(made | facts | ({} if at == "fp32" else {"weight_bits": 8, "act_bits": 8}))
    return found


UNCLEAR, SMALLER = Difference(-0.002, -0.009, 0.005, 0.4), Difference(0.003, -0.004, 0.01, 0.5)
LOST, GREATER = Difference(-0.031, -0.05, -0.012, 0.001), Difference(0.02, 0.01, 0.03, 0.001)
SURE = Difference(-0.001, -0.004, 0.003, 0.6)


@pytest.mark.parametrize(
    ("top1", "ece", "said"),
    [
        (
            UNCLEAR,
            SMALLER,
            "W8A8: accuracy −0.2 points [−0.9, +0.5] on id (n = 512), ECE +0.3 [−0.4, +1.0]: no difference shown",
        ),
        (LOST, GREATER, "W8A8: accuracy −3.1 points [−5.0, −1.2] on id (n = 512), ECE +2.0 [+1.0, +3.0]: worse"),
        (
            LOST,
            SMALLER,
            "W8A8: accuracy −3.1 points [−5.0, −1.2] on id (n = 512), ECE +0.3 [−0.4, +1.0]: accuracy worse, ECE not "
            "shown to differ",
        ),
        (SURE, SURE, "W8A8: accuracy −0.1 points [−0.4, +0.3] on id (n = 512), ECE −0.1 [−0.4, +0.3]: unchanged"),
    ],
)
def test_two_tables_have_two_lines(top1: Difference, ece: Difference, said: str) -> None:
    assert headlines(rows(top1, ece)) == [said]


def test_runs_beside_each_other_have_a_line_each_and_the_last_stage_counts() -> None:
    refitted = [r | {"stage": "temperature"} for r in rows(LOST, GREATER) if r["stage"] == "quantized"]
    adapted = rows(UNCLEAR, SMALLER, "adapted", "ffffffff")
    earlier = [r | {"run_id": "ffffffff"} for r in rows(LOST, GREATER) if r["stage"] == "quantized"]
    first, second = headlines([*rows(LOST, SMALLER), *refitted, *adapted, *earlier])
    assert first.startswith("ptq 0a1b2c3d, W8A8: accuracy −3.1 points")
    assert second.startswith("ptq ffffffff, W8A8, adapted: accuracy −0.2 points")


def test_another_set_can_be_the_first_and_without_resamples_nothing_is_claimed() -> None:
    assert headlines(rows(LOST, GREATER), "other") == headlines(
        [r | {"dataset": "other"} for r in rows() if r["dataset"] == "id"]
    )
    (line,) = headlines(rows())
    assert line.startswith("W8A8: accuracy −0.2 points on id (n = 512), ECE +0.3: plain differences")
    assert line.endswith("(no intervals: suite.resamples=0)")


def test_a_model_in_full_precision_has_its_values() -> None:
    fp32 = [r for r in rows() if r["stage"] == "fp32"]
    assert headlines(fp32) == ["FP32: accuracy 92.4 % [90.0, 94.5] on id (n = 512), ECE 2.8 % [2.0, 5.0]"]
    assert headlines([r | {"intervals": {}} for r in fp32]) == ["FP32: accuracy 92.4 % on id (n = 512), ECE 2.8 %"]
    assert headlines([]) == []


@pytest.mark.parametrize(
    ("found", "less_is_better", "said"),
    [
        (Difference(0.004, 0.001, 0.005, 0.01), False, "unchanged"),  # shown, and shown to be small
        (Difference(0.004, 0.001, 0.0051, 0.01), False, "better"),
        (Difference(0.004, 0.001, 0.0051, 0.01), True, "worse"),
        (Difference(-0.02, -0.03, -0.01, 0.01), True, "better"),
        (Difference(0.0, -0.006, 0.004, 1.0), False, ""),
        # resampling raises an ECE: an interval beside the value shows nothing
        (Difference(-0.001, 0.001, 0.02, 0.04), True, ""),
        (Difference(0.02, -0.001, 0.004, 0.04), True, ""),
        # the table has no star there: of several sets one differs so much by chance
        (Difference(-0.15, -0.27, -0.03, 0.06), False, ""),
    ],
)
def test_the_rule_of_the_verdict(found: Difference, less_is_better: bool, said: str) -> None:
    assert verdict(found._asdict(), less_is_better, 100, found.p_value) == said


def test_a_few_images_that_all_stayed_the_same_show_nothing() -> None:
    same = Difference(0.0, 0.0, 0.0, 1.0)._asdict()
    assert [verdict(same, False, images, 1) for images in (32, 599, 600)] == ["", "", "unchanged"]


def test_what_is_rounded_to_zero_has_one_sign() -> None:
    assert [signed(value) for value in (-0.0004, 0.0, 0.0004, -0.0006)] == ["+0.0", "+0.0", "+0.0", "−0.1"]


def test_the_embedded_models_last_line_names_what_has_something_to_win() -> None:
    nothing, lost = next_line(rows(UNCLEAR, SMALLER)), next_line(rows(LOST, SMALLER))
    assert nothing is not None
    assert nothing.startswith("At W8A8 no loss of accuracy is shown: training has nothing to win back. At W4A4 it has")
    assert nothing.endswith(f"\n  {RECOVERS}")
    assert lost is not None
    assert lost.startswith("W8A8 cost accuracy here. A run in which training wins some of it back")
    sure = next_line(rows(SURE, SURE))
    assert sure is not None
    assert sure.startswith("At W8A8 accuracy is unchanged")
    assert next_line(rows(LOST, SMALLER, "adapted")) is None
    assert next_line(rows()) is None
    assert next_line([r | {"model": "ViT-B-32"} for r in rows(UNCLEAR, SMALLER)]) is None


@pytest.mark.parametrize("slot", ["weight", "act"])
@pytest.mark.parametrize("name", ["fp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp4", "nvfp4"])
def test_a_format_whose_bits_are_fixed_is_not_told_to_choose_others(name: str, slot: str) -> None:
    named = method(compose("recipe=ptq", f"quant/{slot}={name}").quant)
    assert next_line([row | {"method": named} for row in rows(LOST, SMALLER)]) is None
