from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from qatlab.callbacks import OOD
from qatlab.core.errors import UserError
from qatlab.suites.source import Source, View


def plain_scores(cosines, scale: float, temperature: float) -> dict[str, np.ndarray]:
    """The four scores straight from their definitions."""
    values = cosines.double()
    return {
        "msp": (scale * values).softmax(1).amax(1).numpy(),
        "energy": ((scale * values).logsumexp(1) / scale).numpy(),
        "max_logit": values.amax(1).numpy(),
        "mcm": (values / temperature).softmax(1).amax(1).numpy(),
    }


def sklearn_metrics(inside, outside) -> dict[str, float]:
    # scores that are equal on paper come out a rounding apart in another order of summation
    inside, outside = np.round(inside, 10), np.round(outside, 10)

    def fpr95(positive, negative) -> float:
        truth = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
        fpr, tpr, _ = roc_curve(truth, np.r_[positive, negative], drop_intermediate=False)
        return float(fpr[np.argmax(tpr >= 0.95)])

    return {
        "auroc": float(roc_auc_score(np.r_[np.ones(len(inside)), np.zeros(len(outside))], np.r_[inside, outside])),
        "aupr_in": float(
            average_precision_score(np.r_[np.ones(len(inside)), np.zeros(len(outside))], np.r_[inside, outside])
        ),
        "aupr_out": float(
            average_precision_score(np.r_[np.zeros(len(inside)), np.ones(len(outside))], -np.r_[inside, outside])
        ),
        "fpr95_id_pos": fpr95(inside, outside),
        "fpr95_ood_pos": fpr95(-outside, -inside),
    }


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_rows_match_brute_force(world, temperature):
    rows = world.drive(OOD(mcm_temperature=temperature))
    outside = [source for source in world.cosines if source.role in ("near_ood", "far_ood", "shifted")]
    keys = [(view, source, score) for view in world.views for source in outside for score in OOD().scores]
    assert len(rows) == len(keys) == 2 * 5 * 4
    for row, (view, source, score) in zip(rows, keys, strict=True):
        assert (row["stage"], row["logit_scale"]) == (view.stage, view.logit_scale)
        assert (row["dataset"], row["role"], row["reference"]) == (source.name, source.role, source.reference)
        assert (row["score"], row["n"]) == (score, len(world.labels[source]))
        reference = Source(source.reference, "id", source.reference)
        scores = [
            plain_scores(world.cosines[which], view.logit_scale, temperature)[score] for which in (reference, source)
        ]
        assert row["metrics"] == pytest.approx(sklearn_metrics(*scores), abs=1e-12)
        assert row["temperature"] == (temperature if score == "mcm" else None)


def test_scores_without_a_logit_scale_are_equal_under_every_view(world):
    rows = world.drive(OOD(scores=["max_logit", "mcm", "msp"]))
    by_stage = {
        stage: {(r["dataset"], r["reference"], r["score"]): r["metrics"] for r in rows if r["stage"] == stage}
        for stage in ("adapted", "temperature")
    }
    differs = {key[2] for key, metrics in by_stage["adapted"].items() if by_stage["temperature"][key] != metrics}
    assert differs == {"msp"}


def test_batches_and_order_do_not_matter(world):
    assert world.drive(OOD(), batch=1) == world.drive(OOD(), batch=50)


def test_two_processes_give_the_same_rows_to_the_last_bit(world, two_ranks):
    for rank in (0, 1):
        assert json.loads((two_ranks / f"rank{rank}.json").read_text())["ood"] == world.drive(OOD())


def test_intervals_and_differences_from_fp32(world):
    other = {source: cosines.roll(1, 0) for source, cosines in world.cosines.items()}
    views = {View("fp32", 100.0): world.cosines, View("quantized", 100.0): other}
    rows = world.drive(OOD(scores=["max_logit"]), resamples=100, of_views=views)
    for row in rows:
        assert set(row["intervals"]) == set(row["metrics"])
        assert row["intervals"]["auroc"][0] <= row["metrics"]["auroc"] <= row["intervals"]["auroc"][1]
    before = {(row["dataset"], row["reference"]): row["metrics"] for row in rows if row["stage"] == "fp32"}
    for row in [row for row in rows if row["stage"] == "quantized"]:
        for name, found in row["paired"].items():
            assert found["value"] == pytest.approx(
                row["metrics"][name] - before[row["dataset"], row["reference"]][name]
            )
        # the same scores in another order of the images are another model, not another set
        assert row["paired"]["auroc"]["value"] == pytest.approx(0, abs=1e-12)
    assert not any(row["paired"] for row in rows if row["stage"] == "fp32")


def test_a_score_whose_inputs_are_not_there_has_no_row(world):
    assert {row["score"] for row in world.drive(OOD(scores="all"))} == {*OOD().scores, "entropy"}


def test_a_pass_without_ood_sets_has_no_rows(world):
    for source in [source for source in world.cosines if source.role.endswith(("ood", "shifted"))]:
        del world.cosines[source]
    assert world.drive(OOD()) == []


def test_a_missing_reference_is_named(world):
    del world.cosines[Source("tools", "id", "tools")]
    with pytest.raises(UserError, match=r"The far_ood set 'textures' has the ID reference 'tools'.*birds"):
        world.drive(OOD())


def test_options_are_checked():
    with pytest.raises(UserError, match=r"scores=.*did you mean 'energy'"):
        OOD(scores=["msp", "energie"])
    with pytest.raises(UserError, match=r"mcm_temperature=0"):
        OOD(mcm_temperature=0)


@pytest.mark.parametrize("scores", [None, 3, {"msp": 1}])
def test_faults_5_scores_that_are_no_list_are_told(scores):
    with pytest.raises(UserError, match=r"scores=.*: it takes all | msp"):
        OOD(scores=scores)
