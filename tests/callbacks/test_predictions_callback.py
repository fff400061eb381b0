from __future__ import annotations

import polars
import pytest
import torch

from qatlab.callbacks import OOD, Calibration, Predictions
from qatlab.core.errors import UserError
from qatlab.metrics.detection import auroc


def rows_of(frame: polars.DataFrame, source) -> polars.DataFrame:
    return frame.filter(polars.col("dataset") == source.name, polars.col("reference") == source.reference)


def test_one_file_per_stage_with_every_image(world, tmp_path):
    assert world.drive(Predictions(), folder=tmp_path) == []
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["adapted.parquet", "temperature.parquet"]
    for view in world.views:
        frame = polars.read_parquet(tmp_path / "predictions" / f"{view.stage}.parquet")
        scored = [source for source in world.cosines if source.role != "calibration"]
        assert len(frame) == sum(len(world.labels[source]) for source in scored)
        assert frame["logit_scale"].unique().to_list() == [view.logit_scale]
        for source in scored:
            mine, cosines, labels = rows_of(frame, source), world.cosines[source].double(), world.labels[source]
            assert mine["role"].unique().to_list() == [source.role]
            assert mine["index"].to_list() == list(range(len(labels)))
            assert mine["label"].to_list() == labels.tolist()
            assert mine["prediction"].to_list() == cosines.argmax(1).tolist()
            confidence = (view.logit_scale * cosines).softmax(1).amax(1)
            torch.testing.assert_close(mine["confidence"].to_torch(), confidence, rtol=1e-12, atol=0)
            if source.role in ("id", "shifted"):
                assert mine["correct"].to_list() == (cosines.argmax(1) == labels).tolist()
            else:
                assert mine["correct"].null_count() == mine["nll"].null_count() == len(mine)


def test_the_files_hold_what_the_rows_are_made_of(world, tmp_path):
    world.drive(Predictions(), folder=tmp_path)
    frame = polars.read_parquet(tmp_path / "predictions" / "adapted.parquet")
    for row in world.drive(Calibration()):
        if row["stage"] == "adapted":
            mine = frame.filter(polars.col("dataset") == row["dataset"])
            assert row["metrics"]["top1"] == mine["correct"].mean()
            assert row["metrics"]["nll"] == mine["nll"].to_numpy().mean()
    for row in world.drive(OOD()):
        if row["stage"] == "adapted":
            of_reference = frame.filter(polars.col("reference") == row["reference"])
            inside, outside = (
                of_reference.filter(polars.col("dataset") == name)[row["score"]].to_numpy()
                for name in (row["reference"], row["dataset"])
            )
            assert row["metrics"]["auroc"] == auroc(inside, outside)


def test_a_probe_writes_nothing(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert world.drive(Predictions(), folder=None) == []
    assert list(tmp_path.iterdir()) == []


def test_another_suite_adds_its_sets_and_replaces_its_own(world, tmp_path):
    path = tmp_path / "predictions" / "adapted.parquet"
    world.drive(Predictions(scores=["msp"]), folder=tmp_path)
    before = polars.read_parquet(path)
    for source in [source for source in world.cosines if source.name != "insects"]:
        del world.cosines[source]
    (insects,) = world.cosines
    world.cosines[insects] -= 0.1
    world.drive(Predictions(scores=["msp", "max_logit"]), folder=tmp_path)
    after = polars.read_parquet(path)
    assert len(after) == len(before)
    others = polars.col("dataset") != "insects"
    assert after.filter(others).drop("max_logit").equals(before.filter(others))
    assert rows_of(after, insects)["max_logit"].to_list() == world.cosines[insects].double().amax(1).tolist()


def test_options_are_checked():
    with pytest.raises(UserError, match=r"scores=.*did you mean 'msp'"):
        Predictions(scores=["mps"])
