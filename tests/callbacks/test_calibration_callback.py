from __future__ import annotations

import json

import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from qatlab.callbacks import Calibration


def expected(world, source, scale: float) -> dict[str, float]:
    """The four figures from a plain float64 softmax."""
    logits, labels = scale * world.cosines[source].double(), world.labels[source]
    confidence, prediction = logits.softmax(1).max(1)
    correct = prediction == labels
    return {
        "top1": float(correct.double().mean()),
        "ece": float(binary_calibration_error(confidence, correct.long(), n_bins=15)),
        "nll": float(torch.nn.functional.cross_entropy(logits, labels)),
        "confidence_gap": float(confidence.mean() - correct.double().mean()),
    }


def test_rows_match_brute_force(world):
    rows = world.drive(Calibration())
    labelled = [source for source in world.cosines if source.role in ("id", "shifted")]
    assert [(row["stage"], row["logit_scale"], row["dataset"], row["role"], row["reference"]) for row in rows] == [
        (view.stage, view.logit_scale, source.name, source.role, source.reference)
        for view in world.views
        for source in labelled
    ]
    for row, source in zip(rows, labelled * 2, strict=True):
        assert row["score"] == "zero_shot"
        assert row["n"] == len(world.labels[source])
        assert row["metrics"] == pytest.approx(expected(world, source, row["logit_scale"]), abs=1e-12)


def test_batches_and_order_do_not_matter(world):
    assert world.drive(Calibration(), batch=1) == world.drive(Calibration(), batch=50)


def test_a_second_pass_forgets_the_first(world):
    calibration = Calibration()
    assert world.drive(calibration) == world.drive(calibration)


def test_two_processes_give_the_same_rows_to_the_last_bit(world, two_ranks):
    for rank in (0, 1):
        assert json.loads((two_ranks / f"rank{rank}.json").read_text())["calibration"] == world.drive(Calibration())


def test_an_image_without_label_in_a_labelled_set_is_an_error(world):
    source = next(source for source in world.cosines if source.role == "shifted")
    world.labels[source][3] = -1
    with pytest.raises(ValueError, match=r"label -1 is outside 0\.\.11"):
        world.drive(Calibration())
