"""What is said of a refit of the temperature below the table."""

from __future__ import annotations

import pytest

from qatlab.evaluation.evaluation import row
from qatlab.metrics.paired import Difference
from qatlab.reports.helped import refit_lines
from qatlab.results.rowfile import Row
from qatlab.suites.source import Source, View


def refitted(ece: Difference, nll: Difference, role: str = "id", **more: str) -> Row:
    view = View("temperature", 18.0, "split", "adapted")
    found = row(view, Source("photos", role, "photos", "d"), "zero_shot", 150, {"ece": 0.1, "nll": 0.5})
    return found | {"refit": {"ece": ece._asdict(), "nll": nll._asdict()}, "recipe": "ptq", "run_id": "0a1b2c3d"} | more


UNCLEAR, BETTER, WORSE = (
    Difference(-0.0061, -0.0132, 0.0041, 0.2),
    Difference(-0.0222, -0.0331, -0.0104, 0.002),
    Difference(0.0222, 0.0101, 0.0334, 0.002),
)


def test_using_c4_a_line_says_what_the_refit_changed_and_whether_that_is_shown() -> None:
    assert refit_lines([refitted(UNCLEAR, BETTER)]) == [
        "photos: the temperature refit changed ECE by −0.6 points [−1.3, +0.4], not shown to help; "
        "NLL by −0.022 [−0.033, −0.010], shown to help"
    ]
    assert ", shown to harm; NLL" in refit_lines([refitted(WORSE, UNCLEAR)])[0]


def test_using_c4_runs_beside_each_other_are_named_and_other_sets_have_no_line() -> None:
    rows = [refitted(UNCLEAR, BETTER), refitted(BETTER, BETTER, run_id="ffffffff"), refitted(WORSE, WORSE, "shifted")]
    assert [line.partition(":")[0] for line in refit_lines(rows)] == ["ptq 0a1b2c3d, photos", "ptq ffffffff, photos"]
    old = refitted(UNCLEAR, UNCLEAR)
    del old["refit"]  # of an earlier release
    assert refit_lines([old]) == []


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (UNCLEAR, "not shown to help"),
        (BETTER, "shown to help"),
        (WORSE, "shown to harm"),
        # resampling raises an ECE, the lower one more: an interval beside the value shows nothing
        (Difference(-0.001, 0.001, 0.02, 0.04), "not shown to help"),
    ],
)
def test_using_c4_only_an_interval_without_zero_on_the_values_side_shows_anything(found: Difference, said: str) -> None:
    assert refit_lines([refitted(found, found)])[0].endswith(f", {said}")


def test_using_a6_a_cross_fit_at_its_bound_is_told() -> None:
    view, source = View("quantized", 24.0), Source("photos", "id", "photos", "d")
    found = row(view, source, "refit_temperature", 150, {"ece": 0.1, "at_bound": 0.4}) | {"run_id": "0a1b2c3d"}
    (line,) = refit_lines([found])
    assert line.startswith("photos, quantized: 40 % of the images keep the model's temperature")
    assert refit_lines([found | {"metrics": {"ece": 0.1, "at_bound": 0.0}}]) == []
    assert refit_lines([found | {"metrics": {"ece": 0.1}}]) == []
