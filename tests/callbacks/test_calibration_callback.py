from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from qatlab.callbacks import Calibration
from qatlab.metrics.resampling import resampled_counts
from qatlab.suites.source import View

INTERVALS = {"top1", "top5", "mean_per_class", "ece", "ece_equal_mass", "mce", "smooth_ece", "nll", "brier"}
INTERVALS |= {"confidence_gap", "aurc"}


def expected(world, source, scale: float) -> dict[str, float]:
    """The figures from a plain float64 softmax."""
    logits, labels = scale * world.cosines[source].double(), world.labels[source]
    probabilities = logits.softmax(1)
    confidence, prediction = probabilities.max(1)
    correct = prediction == labels
    classes = probabilities.shape[1]
    classwise = [
        binary_calibration_error(probabilities[:, k], (labels == k).long(), n_bins=15).item() for k in range(classes)
    ]
    first = logits.sort(dim=1, descending=True, stable=True).indices[:, :5]  # of equal ones the first class
    risk = [1 - correct[confidence >= threshold].double().mean() for threshold in confidence.sort(descending=True)[0]]
    return {
        "top1": float(correct.double().mean()),
        "top5": float((first == labels[:, None]).any(1).double().mean()),
        "mean_per_class": float(balanced_accuracy_score(labels, prediction)),
        "ece": float(binary_calibration_error(confidence, correct.long(), n_bins=15)),
        "mce": float(multiclass_calibration_error(probabilities, labels, classes, 15, norm="max")),
        "nll": float(torch.nn.functional.cross_entropy(logits, labels)),
        "brier": float((probabilities - torch.eye(classes)[labels]).square().sum(1).mean()),
        "confidence_gap": float(confidence.mean() - correct.double().mean()),
        "aurc": float(np.mean(risk)) if confidence.unique().numel() == len(confidence) else float("nan"),
        "ece_classwise": float(np.mean(classwise)),
    }


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
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
        wanted = expected(world, source, row["logit_scale"])
        assert set(row["metrics"]) == {*wanted, "ece_equal_mass", "smooth_ece"}
        for name, value in wanted.items():
            if not np.isnan(value):
                assert row["metrics"][name] == pytest.approx(value, abs=1e-6 if name == "mce" else 1e-9), name
        assert row["intervals"] == row["paired"] == {}


def test_every_metric_has_an_interval_and_a_difference_from_fp32_where_there_is_one(world):
    world.views = [View("fp32", 100.0), View("quantized", 30.0)]
    rows = world.drive(Calibration(), resamples=200)
    assert {frozenset(row["intervals"]) for row in rows} == {frozenset(INTERVALS)}
    for row in rows:
        low, high = row["intervals"]["top1"]
        assert low <= row["metrics"]["top1"] <= high
        assert set(row["paired"]) == ({"top1", "ece", "nll"} if row["stage"] == "quantized" else set())
    by_stage = {(row["stage"], row["dataset"]): row for row in rows}
    for row in rows:
        for name, found in row["paired"].items():
            before = by_stage["fp32", row["dataset"]]["metrics"][name]
            assert found["value"] == pytest.approx(row["metrics"][name] - before, abs=1e-12)
            assert found["low"] <= found["high"]


def test_accuracy_is_paired_by_mcnemars_test(world):
    """Two encoders: the same images, other cosines."""
    before = View("fp32", 100.0)
    after = View("quantized", 100.0)
    other = {source: cosines.roll(1, 0) for source, cosines in world.cosines.items()}
    rows = world.drive(Calibration(), resamples=20, of_views={before: world.cosines, after: other})
    for row in rows:
        if row["stage"] == "quantized":
            source = next(s for s in world.cosines if (s.name, s.reference) == (row["dataset"], row["reference"]))
            first, second = (c[source].argmax(1) == world.labels[source] for c in (world.cosines, other))
            losses, gains = int((first & ~second).sum()), int((~first & second).sum())
            assert losses + gains > 0
            assert row["paired"]["top1"]["p_value"] == pytest.approx(binomtest(gains, losses + gains).pvalue)


def test_batches_and_order_do_not_matter(world):
    assert world.drive(Calibration(), batch=1) == world.drive(Calibration(), batch=50)


def test_a_second_pass_forgets_the_first(world):
    calibration = Calibration()
    assert world.drive(calibration) == world.drive(calibration)


def test_two_processes_give_the_same_rows_to_the_last_bit(world, two_ranks):
    alone = world.drive(Calibration())
    for row in alone:
        del row["metrics"]["ece_classwise"]  # a probe has none
    for rank in (0, 1):
        assert json.loads((two_ranks / f"rank{rank}.json").read_text())["calibration"] == alone


def test_an_image_without_label_in_a_labelled_set_is_an_error(world):
    source = next(source for source in world.cosines if source.role == "shifted")
    world.labels[source][3] = -1
    with pytest.raises(ValueError, match=r"label -1 is outside 0\.\.11"):
        world.drive(Calibration())


def ece(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Fifteen bins, image by image."""
    gaps = [0.0] * 15
    for sure, right in zip(confidence, correct, strict=True):
        gaps[min(int(sure * 15), 14)] += right - sure
    return sum(map(abs, gaps)) / len(correct)


def test_using_c4_what_a_refit_changed_is_a_paired_bootstrap_over_the_same_images(world):
    before, after = View("adapted", 100.0), View("temperature", 31.25, "split", "adapted")
    world.views = [before, after]
    rows = {(row["stage"], row["dataset"]): row for row in world.drive(Calibration(), resamples=60)}
    for source in (source for source in world.cosines if source.role in ("id", "shifted")):
        assert "refit" not in rows["adapted", source.name]
        labels = world.labels[source].numpy()
        sides = []
        for view in world.views:
            chances = (view.logit_scale * world.cosines[source].double()).softmax(1).numpy()
            correct = world.cosines[source].argmax(1).numpy() == labels
            sides.append((chances.max(1), correct, -np.log(chances[np.arange(len(labels)), labels])))
        strata = labels if np.unique(labels, return_counts=True)[1].min() >= 10 else np.zeros(len(labels))
        (counts,) = resampled_counts(strata, 60, 60, (0, 0))
        drawn = {"ece": [], "nll": []}
        for count in counts:
            images = np.repeat(np.arange(len(labels)), count)
            old, new = ([column[images] for column in side] for side in sides)
            drawn["ece"].append(ece(*new[:2]) - ece(*old[:2]))
            drawn["nll"].append(new[2].mean() - old[2].mean())
        found = rows["temperature", source.name]["refit"]
        assert set(found) == {"ece", "nll"}
        for name, values in drawn.items():
            metrics = [rows[stage, source.name]["metrics"][name] for stage in ("adapted", "temperature")]
            assert found[name]["value"] == pytest.approx(metrics[1] - metrics[0], abs=1e-12)
            ends = np.quantile(values, [0.025, 0.975])
            assert [found[name]["low"], found[name]["high"]] == pytest.approx(ends, abs=1e-9), (name, source.name)


def test_using_c4_the_unquantized_models_refit_is_compared_with_its_own_scale(world):
    """There the stage before is FP32 itself."""
    world.views = [View("fp32", 100.0), View("temperature", 31.25, "split", "fp32")]
    for row in world.drive(Calibration(), resamples=20):
        if row["stage"] == "temperature":
            assert row["refit"] == {name: row["paired"][name] for name in ("ece", "nll")}
    assert not any("refit" in row for row in world.drive(Calibration()))  # without resamples there is no interval
