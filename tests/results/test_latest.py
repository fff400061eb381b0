"""Which rows count: those of the last complete evaluation of every set, at scales that are used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qatlab import results
from qatlab.evaluation.evaluation import row
from qatlab.results.latest import latest, used
from qatlab.results.rowfile import FIT, Row
from qatlab.suites.source import Source, View


def scored(
    stage: str, definition: str, n: int = 128, dataset: str = "id", score: str = "zero_shot", basis: str = "", **more
) -> Row:
    view, source = View(stage, 100.0, basis), Source(dataset, "id", "id", definition)
    facts = {"run_id": "0a1b2c3d", "prompts": "a photo of a {}", "step": 0, "recipe": "light_qat"}
    return row(view, source, score, n, {"top1": 0.5}) | facts | more


def evaluation(definition: str, n: int, stages: tuple[str, ...], **more) -> list[Row]:
    basis = {"temperature": "split", "integer_onnx": "digest"}
    return [
        scored(stage, f"{dataset}-{definition}", n, dataset, score, basis.get(stage, ""), **more)
        for stage in stages
        for dataset, score in (("id", "zero_shot"), ("id", "refit_none"), ("noise", "zero_shot"))
    ]


FIT_STAGES = ("fp32", "quantized", "adapted", "temperature")
LAST = ("fp32", "adapted", "temperature")  # what qatlab.evaluate scores of a finished run
SMALL, LARGE = evaluation("small", 128, FIT_STAGES), evaluation("large", 512, LAST)


def fit(scale: float, at_bound: bool, **more) -> Row:
    view, source = View("temperature", scale), Source("calibration", "calibration", "calibration", "split")
    facts = {"run_id": "0a1b2c3d", "prompts": None, "step": 0}
    return row(view, source, FIT, 16, {"nll": 0.1, "at_bound": float(at_bound)}) | facts | more


def test_using_a5_a_set_on_more_images_takes_the_place_of_the_same_set_on_fewer() -> None:
    assert latest([*SMALL, *LARGE]) == LARGE
    assert latest([*LARGE, *SMALL]) == SMALL
    assert latest(SMALL) == SMALL


def test_using_a5_the_rows_that_are_left_can_be_pivoted(tmp_path: Path) -> None:
    write(tmp_path / "light_qat-0a1b2c3d", [*SMALL, *LARGE])
    frame = results.read(tmp_path)
    assert set(frame["n"]) == {512}
    assert not frame.select("run_id", "stage", "dataset", "score").is_duplicated().any()
    every = results.read(tmp_path, every=True)
    assert len(every) == len(SMALL) + len(LARGE)
    assert set(every["n"]) == {128, 512}


def test_using_a5_what_a_killed_evaluation_left_does_not_count() -> None:
    """fit scores FP32 and the quantized model before it reads the trained one back."""
    for count in (3, 6):
        begun = evaluation("large", 512, FIT_STAGES)[:count]
        assert latest([*SMALL, *begun]) == SMALL
        assert latest(begun) == begun  # there is nothing else
    assert latest([*SMALL, *evaluation("large", 512, FIT_STAGES)])[0]["n"] == 512
    ptq = [*evaluation("small", 128, ("fp32", "quantized")), *evaluation("large", 512, ("fp32",))]
    assert latest(ptq) == ptq[:6]


def test_using_a5_sets_are_told_apart() -> None:
    noise = [found for found in LARGE if found["dataset"] == "noise"]
    assert latest([*SMALL, *noise]) == [*(found for found in SMALL if found["dataset"] == "id"), *noise]


def test_using_a5_an_evaluation_of_an_export_or_of_the_unquantized_model_is_complete() -> None:
    of_export = evaluation("large", 512, ("fp32", "integer_onnx"))
    assert latest([*SMALL, *of_export]) == of_export
    plain = evaluation("small", 128, ("fp32",)), evaluation("large", 512, ("fp32",))
    assert latest([*plain[0], *plain[1]]) == plain[1]


def test_using_a5_runs_and_prompts_are_told_apart() -> None:
    other = [found | {"run_id": "ffffffff"} for found in SMALL]
    ensembled = [found | {"prompts": "imagenet80", "definition": f"80-{found['definition']}"} for found in SMALL]
    assert latest([*other, *ensembled, *LARGE]) == [*other, *ensembled, *LARGE]


def test_using_a5_probes_of_the_training_stay_beside_a_later_evaluation() -> None:
    probes = [scored("probe", "id-small", 16, step=step) for step in (1, 2)]
    assert latest([*SMALL, *probes, *LARGE]) == [*probes, *LARGE]


@pytest.mark.parametrize("stage", ["temperature", "integer_onnx"])
def test_using_a5_of_two_refits_or_exports_the_last_one_counts(stage: str) -> None:
    first, second = (
        [scored(stage, "id-small", basis=basis, score=score) for score in ("zero_shot", "msp")] for basis in "ab"
    )
    plain = [scored("fp32", "id-small"), scored("adapted", "id-small")]
    assert latest([*plain, *first, *second]) == [*plain, *second]


def test_using_a5_folders_are_read_by_themselves(tmp_path: Path) -> None:
    """The same run made twice, in two output folders, and scored on other images in each."""
    write(tmp_path / "a" / "light_qat-0a1b2c3d", SMALL)
    write(tmp_path / "b" / "light_qat-0a1b2c3d", LARGE)
    assert len(results.read(tmp_path)) == len(SMALL) + len(LARGE)


def test_using_a6_rows_at_a_scale_that_ended_at_its_bound_do_not_count() -> None:
    """An earlier release scored them: an ECE of 0 that nobody may use."""
    bound = fit(1000.0, True)
    assert used([bound, *SMALL]) == [bound, *(found for found in SMALL if found["stage"] != "temperature")]
    assert used([fit(16.0, False), *SMALL]) == [fit(16.0, False), *SMALL]
    # of another run, or of another split
    for other in (fit(1000.0, True, run_id="ffffffff"), fit(1000.0, True, definition="elsewhere")):
        assert used([other, *SMALL]) == [other, *SMALL]
    assert latest([bound, *SMALL])[0] == bound


def test_using_a6_nor_do_those_of_a_refit_on_captions() -> None:
    bound = fit(1.0, True, stage="temperature_proxy", definition="")
    proxy = scored("temperature_proxy", "id-small")
    assert used([bound, proxy, *SMALL]) == [bound, *SMALL]


def write(folder: Path, rows: list[Row]) -> None:
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(found) + "\n" for found in rows))
