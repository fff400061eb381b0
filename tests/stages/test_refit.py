"""The refit of the temperature in a run: what becomes of one that its images do not tell, and what is said of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from qatlab.config import Config, compose
from qatlab.core.signals import StopSignals
from qatlab.evaluate import evaluate
from qatlab.results.rowfile import FIT
from qatlab.results.rows import read
from qatlab.results.run import Run
from qatlab.stages.experiment import Experiment
from qatlab.stages.opening import open_experiment
from qatlab.stages.requested import requested_runs
from qatlab.stages.summary import asked_rows
from qatlab.stages.temperature import scale_to_export, stored_scales

Evaluated = Callable[..., Run]
FEW = "suite.images=8"  # all of them right: no scale is too large


@pytest.fixture(scope="module")
def options(small_options: list[str]) -> list[str]:
    dropped = ("quant.", "data.", "fit.eval", "suite.images", "suite.resamples")
    return [*(option for option in small_options if not option.startswith(dropped)), "callbacks.refits=null"]


@pytest.fixture
def evaluated(options: list[str], tmp_path: Path) -> Evaluated:
    def run(*overrides: str) -> Run:
        (run,) = evaluate(configured(options, tmp_path, *overrides), "evaluate")
        return run

    return run


def configured(options: list[str], folder: Path, *overrides: str) -> Config:
    return compose(*options, f"output={folder}", "suite.resamples=20", *overrides)


def experiment_of(config: Config) -> Experiment:
    with StopSignals() as stop:
        (each,) = requested_runs(config, "evaluate")
        return open_experiment(each.config, each.run, each.recipe, stop)


def fit_of(run: Run) -> dict:
    return next(row for row in run.rows() if row["score"] == FIT)


def test_using_a6_a_temperature_at_its_bound_is_not_used(
    evaluated: Evaluated, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluated(FEW)
    said = capsys.readouterr().out
    row = fit_of(run)
    assert (row["logit_scale"], row["metrics"]["at_bound"], row["n"]) == (1000.0, 1.0, 8)
    assert (
        "ended at its bound, s = 1000, and is not used: 8 images do not tell the scale, which stays s = 24.13" in said
    )
    assert "after temperature" not in said
    (scale,) = {found["logit_scale"] for found in run.rows() if found["score"] != FIT}
    assert scale == pytest.approx(24.133327)
    assert not (run.folder / "predictions" / "temperature.parquet").exists()
    assert not (run.folder / "scales.json").exists()
    assert scale_to_export(experiment_of(configured(options, tmp_path, FEW))).logit_scale == pytest.approx(24.133327)
    # the same command again fits nothing and says it again
    stored = run.results.read_bytes()
    evaluated(FEW)
    said = capsys.readouterr().out
    assert "refitting" not in said
    assert "and is not used" in said
    assert run.results.read_bytes() == stored


def test_using_a6_nor_is_one_that_an_earlier_release_stored(
    evaluated: Evaluated, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It had scored everything at s = 1000, drawn that, and kept the scale for exports."""
    run = evaluated(FEW)
    row = fit_of(run)
    name = f"temperature/{row['definition']}"
    (run.folder / "scales.json").write_text(json.dumps({name: 1000.0}))
    predictions = pl.read_parquet(run.folder / "predictions" / "fp32.parquet")
    old = predictions.with_columns(pl.col("definition") + "+" + row["definition"], confidence=pl.lit(1.0))
    old.write_parquet(run.folder / "predictions" / "temperature.parquet")
    with run.results.open("a") as file:
        for found in [found for found in run.rows() if found["score"] != FIT]:
            changed = {"stage": "temperature", "definition": f"{found['definition']}+{row['definition']}"}
            file.write(json.dumps(found | changed | {"logit_scale": 1000.0}) + "\n")
    capsys.readouterr()
    evaluated(FEW)
    said = capsys.readouterr().out
    assert "and is not used" in said
    assert "after temperature" not in said
    experiment = experiment_of(configured(options, tmp_path, FEW))
    assert {found["stage"] for found in asked_rows(experiment) if found["score"] != FIT} == {"fp32"}
    assert stored_scales(experiment.run) == {}
    assert scale_to_export(experiment).logit_scale == pytest.approx(24.133327)
    assert set(pl.read_csv(run.folder / "reliability.csv")["stage"]) == {"fp32"}
    assert read(run.folder).filter(pl.col("score") != FIT)["stage"].unique().to_list() == ["fp32"]


def test_using_a6_a_refit_is_read_back_from_its_row(
    evaluated: Evaluated, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluated("suite.images=32")
    scale = fit_of(run)["logit_scale"]
    assert 1 < scale < 1000
    (run.folder / "scales.json").unlink()  # a process that was killed between the two
    capsys.readouterr()
    evaluated("suite.images=32")
    assert "refitting" not in capsys.readouterr().out
    assert scale_to_export(experiment_of(configured(options, tmp_path, "suite.images=32"))).logit_scale == scale


def test_using_c4_the_table_is_followed_by_what_the_refit_changed(
    evaluated: Evaluated, capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluated("suite.images=32", "format=csv")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "the temperature refit changed" in line]
    rows = {(row["stage"], row["dataset"], row["score"]): row for row in run.rows()}
    before, after = (rows[stage, "id", "zero_shot"] for stage in ("fp32", "temperature"))
    change = after["refit"]["ece"]
    assert change["value"] == pytest.approx(after["metrics"]["ece"] - before["metrics"]["ece"])
    told = [f"{100 * change[key]:+.1f}" for key in ("value", "low", "high")]
    assert line.startswith(f"id: the temperature refit changed ECE by {told[0]} points [{told[1]}, {told[2]}], ")
    frame = pl.read_csv(run.folder / "table.csv", infer_schema_length=None)
    assert frame["ece_refit"].drop_nulls().len() == 2  # of id and noise
    assert change["low"] in frame["ece_refit_low"].to_list()


def test_using_a5_the_table_shows_the_refit_of_the_suite_that_is_asked_for(
    evaluated: Evaluated, options: list[str], tmp_path: Path, small_fit: Evaluated
) -> None:
    """A run scored after a refit on another split, and then on the first suite again."""
    fitted = small_fit("ptq", tmp_path, "callbacks.temperature=null")
    first = (f"checkpoint={fitted.folder}", "suite.images=32", "suite.sets.calibration.path=embedded:calibration")
    run = evaluated(*first)
    evaluated(first[0], "suite.images=32", "suite.sets.calibration.path=embedded:gray")
    fits = {row["definition"]: row["logit_scale"] for row in run.rows() if row["score"] == FIT}
    assert len(fits) == 2
    shown = [
        row for row in asked_rows(experiment_of(configured(options, tmp_path, *first))) if row["stage"] == "temperature"
    ]
    assert {row["logit_scale"] for row in shown} == {next(iter(fits.values()))}
    assert set(read(run.folder).filter(pl.col("stage") == "temperature", pl.col("score") != FIT)["logit_scale"]) == {
        list(fits.values())[-1]
    }


def test_using_a5_the_last_evaluation_of_a_set_is_the_one_that_is_read(
    evaluated: Evaluated, tmp_path: Path, small_fit: Evaluated
) -> None:
    run = small_fit("ptq", tmp_path, "suite.images=32", "callbacks.temperature=null", "callbacks.refits=null")
    evaluated(f"checkpoint={run.folder}", "suite.images=16", "callbacks.temperature=null")
    assert set(read(run.folder)["n"]) == {16}
    every = read(run.folder, every=True)
    assert set(every["n"]) == {16, 32}
    assert len(every) == 2 * len(read(run.folder))
