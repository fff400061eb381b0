from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from sklearn.isotonic import IsotonicRegression

from qatlab.callbacks import Calibration, Refits
from qatlab.callbacks.refits import KINDS
from qatlab.core.errors import UserError
from qatlab.evaluation.evaluation import Pass
from qatlab.evaluation.prediction import Prediction
from qatlab.metrics.refits import folds
from qatlab.suites.source import Source, View

REFITS = ["refit_none", "refit_temperature", "refit_vector", "refit_isotonic"]
SETS = {name: Source(name, "id", name) for name in ("birds", "tools")}
ID = SETS["birds"]


def labelled(n: int = 90, classes: int = 4, seed: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and labels; one class's cosines are too large and spread too far, which only vector scaling undoes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    cosines = 0.2 + 0.03 * torch.randn(n, classes, generator=generator)
    cosines[:, 0] = 2 * cosines[:, 0] - 0.16
    cosines[torch.arange(n), labels] += 0.03
    return cosines, labels


@pytest.fixture
def small(world):
    """The world without its larger ID set, some of whose classes lack images: there a vector fit takes all its steps."""
    world.cosines = {source: cosines for source, cosines in world.cosines.items() if source.reference == "tools"}
    return world


def drive(
    cosines: torch.Tensor, labels: torch.Tensor, scale: float = 100.0, batch: int = 32, **options
) -> dict[str, dict]:
    """{score: row} of one set under one view, the images in their order."""
    refits, view = Refits(KINDS, **options), View("quantized", scale)
    refits.start(Pass([view], [ID], torch.device("cpu")))
    for index in torch.arange(len(labels)).split(batch):
        refits.update(Prediction(ID, torch.empty(len(index), 2), cosines[index], labels[index], index, [view]))
    return {row["score"]: row for row in refits.compute()}


# -- brute force, in float64 -------------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(softmax(logits)[np.arange(len(labels)), labels]).mean())


def ece(confidence: np.ndarray, correct: np.ndarray) -> float:
    place = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((correct[place == b] - confidence[place == b]).sum()) for b in range(15)]
    return float(sum(gaps)) / len(correct)


def measured(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    return {
        "top1": float(correct.mean()),
        "ece": ece(confidence, correct),
        "nll": float(-np.log(probabilities[np.arange(len(labels)), labels]).mean()),
        "brier": float(((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(axis=1).mean()),
        "confidence_gap": float(confidence.mean() - correct.mean()),
    }


def held_out(n: int):
    """(images of a fold, images of the others) for each."""
    fold = folds(n)
    return [([i for i in range(n) if fold[i] == f], [i for i in range(n) if fold[i] != f]) for f in range(5)]


def test_temperature_is_fitted_on_the_other_folds_alone():
    cosines, labels = labelled()
    values, truth = cosines.numpy().astype(np.float64), labels.numpy()
    probabilities = np.empty_like(values)
    scales = []
    for inside, others in held_out(len(truth)):
        found = minimize_scalar(
            lambda log_scale, rest=others: cross_entropy(np.exp(log_scale) * values[rest], truth[rest]),
            bounds=(0.0, np.log(1000.0)),
            method="bounded",
            options={"xatol": 1e-10},
        )
        scales.append(np.exp(found.x))
        probabilities[inside] = softmax(scales[-1] * values[inside])
    row = drive(cosines, labels)["refit_temperature"]
    wanted = measured(probabilities, truth)
    assert {name: row["metrics"][name] for name in wanted} == pytest.approx(wanted, abs=1e-7)
    # the same images, fitted and scored: the number that must not come out
    everything = minimize_scalar(
        lambda scale: cross_entropy(scale * values, truth), bounds=(1, 1000), method="bounded", options={"xatol": 1e-8}
    )
    assert row["metrics"]["nll"] > everything.fun + 1e-4
    assert len({round(scale, 3) for scale in scales}) == 5


def test_vector_scaling_is_fitted_on_the_other_folds_alone():
    cosines, labels = labelled()
    values, truth = cosines.numpy().astype(np.float64), labels.numpy()
    centre, classes = values.mean(), values.shape[1]
    probabilities = np.empty_like(values)

    def logits(parameters: np.ndarray, images: list[int]) -> np.ndarray:
        return 100 * parameters[:classes] * (values[images] - centre) + parameters[classes:]

    for inside, others in held_out(len(truth)):
        found = minimize(
            lambda parameters, rest=others: cross_entropy(logits(parameters, rest), truth[rest]),
            np.r_[np.ones(classes), np.zeros(classes)],
            method="BFGS",
            options={"gtol": 1e-7},
        )
        probabilities[inside] = softmax(logits(found.x, inside))
    rows = drive(cosines, labels)
    wanted = measured(probabilities, truth)
    assert {name: rows["refit_vector"]["metrics"][name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
    assert rows["refit_vector"]["metrics"]["nll"] < rows["refit_temperature"]["metrics"]["nll"] - 0.05


def test_isotonic_regression_is_sklearns_of_the_other_folds():
    cosines, labels = labelled()
    probabilities = softmax(100 * cosines.numpy().astype(np.float64))
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels.numpy()
    mapped = np.empty_like(confidence)
    for inside, others in held_out(len(correct)):
        regression = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
        mapped[inside] = regression.fit(confidence[others], correct[others]).predict(confidence[inside])
    edges = mapped[(mapped > 0) & (mapped < 1)] * 15
    assert abs(edges - edges.round()).min() > 1e-6, "a rounding would decide between two bins"
    row = drive(cosines, labels)["refit_isotonic"]
    assert row["metrics"] == pytest.approx({"top1": float(correct.mean()), "ece": ece(mapped, correct)}, abs=1e-9)


def test_rows_are_those_of_id_sets_under_views_whose_scale_is_not_fitted(world):
    rows = world.drive(Refits(KINDS))
    assert [
        (row["stage"], row["logit_scale"], row["dataset"], row["role"], row["score"], row["n"]) for row in rows
    ] == [("adapted", 100.0, name, "id", score, n) for name, n in (("birds", 41), ("tools", 15)) for score in REFITS]
    for row in rows:
        assert row["reference"] == row["dataset"]
        assert row["intervals"] == row["paired"] == {}
        expected = {"top1", "ece"} if row["score"] == "refit_isotonic" else set(rows[0]["metrics"])
        assert set(row["metrics"]) == expected | ({"at_bound"} if row["score"] == "refit_temperature" else set())


@pytest.mark.parametrize("stage", ["temperature", "temperature_soft"])
def test_a_refit_view_has_no_rows(world, stage):
    world.views = [View(stage, 31.25)]
    assert world.drive(Refits(KINDS)) == []


def test_no_refit_is_the_zero_shot_row(small):
    small.views = [View("fp32", 100.0), View("quantized", 30.0)]
    plain = {(row["stage"], row["dataset"]): row["metrics"] for row in small.drive(Calibration())}
    found = [row for row in small.drive(Refits(KINDS)) if row["score"] == "refit_none"]
    assert len(found) == 2
    for row in found:
        wanted = plain[row["stage"], row["dataset"]]
        assert set(row["metrics"]) == set(wanted) - {"ece_classwise"}
        for name, value in row["metrics"].items():
            assert value == pytest.approx(wanted[name], abs=1e-12), name


def test_every_encoder_is_refitted_by_itself(small):
    before, after = View("fp32", 100.0), View("quantized", 100.0)
    other = {source: cosines.roll(1, 1) for source, cosines in small.cosines.items()}
    rows = small.drive(Refits(KINDS), of_views={before: small.cosines, after: other})
    for view, cosines in ((before, small.cosines), (after, other)):
        small.views, small.cosines = [view], cosines
        assert [row for row in rows if row["stage"] == view.stage] == small.drive(Refits(KINDS))
    metrics = [[row["metrics"] for row in rows if row["stage"] == view.stage] for view in (before, after)]
    assert metrics[0] != metrics[1]


def test_refits_have_intervals_and_are_compared_with_fp32_under_the_same_refit(small):
    before, after = View("fp32", 100.0), View("quantized", 100.0)
    other = {source: cosines.roll(1, 1) for source, cosines in small.cosines.items()}
    rows = small.drive(Refits(KINDS), resamples=50, of_views={before: small.cosines, after: other})
    by_stage = {(row["stage"], row["score"]): row for row in rows}
    small.views = [before]
    plain = {row["dataset"]: row["intervals"] for row in small.drive(Calibration(), resamples=50)}
    assert by_stage["fp32", "refit_none"]["intervals"] == plain["tools"]
    for name in REFITS:
        first, second = by_stage["fp32", name], by_stage["quantized", name]
        assert set(first["intervals"]) == set(second["intervals"]) == set(first["metrics"]) - {"at_bound"}
        assert first["paired"] == {}
        assert set(second["paired"]) == {"top1", "ece", *(["nll"] if name != "refit_isotonic" else [])}
        for metric, found in second["paired"].items():
            assert found["value"] == pytest.approx(second["metrics"][metric] - first["metrics"][metric], abs=1e-12)
            assert found["low"] <= found["high"]


def test_batches_do_not_matter_and_a_second_pass_forgets_the_first(small):
    refits = Refits(KINDS)
    first = small.drive(refits, batch=1)
    assert first == small.drive(refits, batch=50)


def test_the_scale_a_view_starts_from_matters_to_no_temperature_refit():
    cosines, labels = labelled()
    rows, others = drive(cosines, labels), drive(cosines, labels, scale=20.0)
    assert rows["refit_temperature"]["metrics"] == others["refit_temperature"]["metrics"]
    vectors = [found["refit_vector"]["metrics"] for found in (rows, others)]
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-4)
    assert rows["refit_none"]["metrics"]["nll"] != others["refit_none"]["metrics"]["nll"]


def test_at_most_so_many_images_of_a_set_the_same_for_every_view(small):
    small.views = [View("fp32", 100.0), View("quantized", 30.0)]
    rows = small.drive(Refits(KINDS, images=10))
    assert [row["n"] for row in rows] == [10] * 8
    top1 = [row["metrics"]["top1"] for row in rows if row["score"] == "refit_none"]
    assert top1[0] == top1[1]
    cosines, labels = labelled()
    assert drive(cosines, labels, images=90) == drive(cosines, labels) != drive(cosines, labels, images=89)


def test_the_images_are_drawn_from_all_of_the_set():
    """The first half of these images is right and the second is wrong."""
    labels = torch.arange(200) % 4
    cosines = torch.eye(4)[(labels + (torch.arange(200) >= 100)) % 4] * 0.1
    top1 = drive(cosines, labels, images=60)["refit_none"]["metrics"]["top1"]
    assert 0.3 < top1 < 0.7
    assert drive(cosines, labels, images=60, batch=7)["refit_none"]["metrics"]["top1"] == top1


@pytest.mark.parametrize(("images", "sets"), [(4, {"birds"}), (5, {"birds", "tools"})])
def test_a_set_of_fewer_than_five_images_has_no_rows(world, images, sets):
    tools = SETS["tools"]
    world.cosines[tools], world.labels[tools] = world.cosines[tools][:images], world.labels[tools][:images]
    rows = world.drive(Refits(KINDS))
    assert {row["dataset"] for row in rows} == sets
    assert {row["n"] for row in rows if row["dataset"] == "tools"} <= {5}


@pytest.mark.parametrize("images", [4, 0, -1])
def test_fewer_images_than_folds_cannot_be_asked_for(images):
    with pytest.raises(UserError, match=rf"images={images}: it takes a whole number from 5 on"):
        Refits(images=images)


def test_a_probe_has_no_rows(world):
    assert world.drive(Refits(KINDS), rank=0, ranks=2) == []


def test_vector_scaling_is_left_out_unless_it_is_asked_for(world) -> None:
    assert {row["score"] for row in world.drive(Refits())} == {"refit_none", "refit_temperature", "refit_isotonic"}


def test_an_unknown_refit_is_named() -> None:
    with pytest.raises(UserError, match=r"kinds=.*did you mean 'vector'"):
        Refits(["vektor"])


def test_using_a6_images_that_do_not_tell_the_temperature_keep_it() -> None:
    """Every image is right by far: no scale is too large for any of the folds."""
    labels = torch.arange(40) % 4
    rows = drive(torch.eye(4)[labels] * 0.1, labels, scale=20.0)
    refitted, before = rows["refit_temperature"]["metrics"], rows["refit_none"]["metrics"]
    assert refitted == before | {"at_bound": 1.0}
    assert before["ece"] == pytest.approx(1 - 1 / (1 + 3 * np.exp(-2)))
