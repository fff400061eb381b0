from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qatlab.callbacks import Spurious
from qatlab.evaluation.evaluation import Pass
from qatlab.evaluation.prediction import Prediction
from qatlab.metrics.paired import paired_bootstrap
from qatlab.metrics.resampling import percentile_interval, resampled_counts
from qatlab.suites.source import Source, View

COMMON, COUNTER = Source("usual", "common", "birds"), Source("unusual", "counter", "birds")
FP32, QUANTIZED, REFITTED = View("fp32", 100.0), View("quantized", 100.0), View("temperature", 31.25)
LABELS = {COMMON: torch.arange(90) % 7, COUNTER: torch.arange(60) % 8}  # the last class is before the counter alone

Cosines = dict[Source, torch.Tensor]


def encoder(seed: int, classes: int = 30, signal: float = 0.04) -> Cosines:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for source, labels in LABELS.items():
        cosines = 0.2 + 0.03 * torch.randn(len(labels), classes, generator=generator)
        cosines[torch.arange(len(labels)), labels] += signal if source.role == "common" else signal / 2
        found[source] = cosines
    return found


def drive(
    encoders: list[tuple[list[View], Cosines]],
    labels: dict[Source, torch.Tensor] = LABELS,
    batch: int = 7,
    shuffled: bool = False,
    shared: bool = False,
    rows: list[int] | None = None,
    evaluation: Spurious | None = None,
    resamples: int = 0,
) -> list[dict]:
    """The rows of a pass in which each encoder sees its sets, in the order of its dictionary."""
    evaluation = evaluation or Spurious()
    views = [view for of_encoder, _ in encoders for view in of_encoder]
    evaluation.start(Pass(views, list(encoders[0][1]), torch.device("cpu"), shared=shared, resamples=resamples))
    for of_encoder, cosines in encoders:
        for source, values in cosines.items():
            order = torch.arange(len(values))
            if shuffled:
                order = torch.randperm(len(values), generator=torch.Generator().manual_seed(len(of_encoder)))
            for index in order.split(batch):
                features = torch.empty(len(index), 2)
                truth = labels[source][index]
                evaluation.update(Prediction(source, features, values[index], truth, index, of_encoder, rows=rows))
    return evaluation.compute()


def metrics(rows: list[dict]) -> dict[tuple[str, str], dict[str, float]]:
    return {(row["stage"], row["score"]): row["metrics"] for row in rows}


# -- brute force -------------------------------------------------------------------------------------------------------


def brute_candidates(cosines: Cosines, scale: float, roles: tuple[str, ...] = ("common", "counter")) -> dict[int, list]:
    """Per class its own and the 19 of the others with the largest mean probability over its images."""
    of_class: dict[int, list[np.ndarray]] = {}
    for source, values in cosines.items():
        for row, label in zip(values.numpy().astype(np.float64), LABELS[source].tolist(), strict=True):
            powers = np.exp(scale * row)
            if source.role in roles:
                of_class.setdefault(label, []).append(powers / powers.sum())
    found = {}
    for label, probabilities in of_class.items():
        mean = sum(probabilities) / len(probabilities)
        others = sorted((k for k in range(len(mean)) if k != label), key=lambda k: -mean[k])
        found[label] = [label, *others[:19]]
    return found


def brute_accuracy(cosines: torch.Tensor, labels: torch.Tensor, candidates: dict[int, list] | None) -> float:
    hits = 0
    for row, label in zip(cosines.numpy().astype(np.float64), labels.tolist(), strict=True):
        among = candidates[label] if candidates else range(len(row))
        hits += all(row[k] < row[label] for k in among if k != label)
    return hits / len(labels)


def brute_accuracies(cosines: Cosines, candidates: dict[int, list] | None) -> tuple[float, float]:
    common, counter = (brute_accuracy(cosines[source], LABELS[source], candidates) for source in (COMMON, COUNTER))
    return common, counter


@pytest.mark.parametrize("classes", [21, 30])
def test_rows_match_brute_force(classes):
    of_view = {FP32: encoder(0, classes), QUANTIZED: encoder(1, classes, 0.03)}
    # these sets have images of eight of the classes, and are told from all of them
    rows = drive([([view], cosines) for view, cosines in of_view.items()], rows=list(range(8)))
    assert [(row["stage"], row["logit_scale"], row["score"]) for row in rows] == [
        (view.stage, view.logit_scale, score) for view in of_view for score in ("one_vs_all", "one_vs_20")
    ]
    for row in rows:
        assert (row["dataset"], row["role"], row["reference"], row["n"]) == ("unusual", "counter", "birds", 150)
    found = metrics(rows)
    candidates = brute_candidates(of_view[FP32], FP32.logit_scale)
    for score, among in (("one_vs_all", None), ("one_vs_20", candidates)):
        fp32_common, fp32_counter = brute_accuracies(of_view[FP32], among)
        for view, cosines in of_view.items():
            common, counter = brute_accuracies(cosines, among)
            wanted = {"common": common, "counter": counter, "drop": common - counter, "rsg": 1 - counter / common}
            if view == QUANTIZED:
                of_common, of_counter = (fp32_common - common) / fp32_common, (fp32_counter - counter) / fp32_counter
                wanted["vulnerability"] = of_counter - of_common
            assert found[view.stage, score] == pytest.approx(wanted, abs=1e-12)
    assert found["quantized", "one_vs_20"] != found["quantized", "one_vs_all"]
    assert abs(found["quantized", "one_vs_20"]["vulnerability"]) > 0.01


@pytest.mark.parametrize(
    ("of", "scale", "roles"),
    [
        ("quantized", 100.0, ("common", "counter")),
        ("fp32", 100.0, ("common",)),
        ("fp32", 100.0, ("counter",)),
        ("fp32", 1.0, ("common", "counter")),  # nearly the mean cosine
    ],
)
def test_candidates_of_another_kind_would_give_other_numbers(of, scale, roles):
    """What the brute force is worth: it tells FP32's mean softmax over both sets from all that it might be instead."""
    fp32, quantized = encoder(0), encoder(1, signal=0.0)
    right = brute_candidates(fp32, FP32.logit_scale)
    other = brute_candidates(fp32 if of == "fp32" else quantized, scale, roles)
    known = {label: other[label] for label in right if label in other} | {
        k: v for k, v in right.items() if k not in other
    }
    found = metrics(drive([([FP32], fp32), ([QUANTIZED], quantized)]))["quantized", "one_vs_20"]
    assert (found["common"], found["counter"]) == pytest.approx(brute_accuracies(quantized, right), abs=1e-12)
    assert (found["common"], found["counter"]) != pytest.approx(brute_accuracies(quantized, known), abs=1e-12)


def test_the_true_class_is_a_candidate_even_where_fp32_gives_it_least():
    fp32 = {source: values.clone() for source, values in encoder(0).items()}
    for source, labels in LABELS.items():
        fp32[source][torch.arange(len(labels)), labels] = 0.0
    right = {
        source: torch.zeros(len(labels), 30).index_put((torch.arange(len(labels)), labels), torch.tensor(0.3))
        for source, labels in LABELS.items()
    }
    found = metrics(drive([([FP32], fp32), ([QUANTIZED], right)]))
    assert (found["quantized", "one_vs_20"]["common"], found["quantized", "one_vs_20"]["counter"]) == (1, 1)
    assert (found["fp32", "one_vs_20"]["common"], found["fp32", "one_vs_20"]["counter"]) == (0, 0)
    # nothing to lose, nothing relative to it
    assert np.isnan([found["fp32", "one_vs_20"]["rsg"], found["quantized", "one_vs_20"]["vulnerability"]]).all()


@pytest.mark.parametrize("classes", [12, 20])
def test_with_at_most_20_classes_both_protocols_are_one(classes):
    found = metrics(drive([([FP32], encoder(0, classes)), ([QUANTIZED], encoder(1, classes))]))
    for stage in ("fp32", "quantized"):
        assert found[stage, "one_vs_20"] == found[stage, "one_vs_all"]


def test_of_equal_cosines_the_first_class_counts_in_both_protocols():
    """As in every other accuracy; two classes of one name have equal cosines everywhere."""
    cosines = {source: (values * 50).round() / 50 for source, values in encoder(0, 12).items()}
    found = metrics(drive([([FP32], cosines)]))
    first = [
        float(np.mean(cosines[source].numpy().argmax(1) == LABELS[source].numpy())) for source in (COMMON, COUNTER)
    ]
    for score in ("one_vs_all", "one_vs_20"):
        assert [found["fp32", score]["common"], found["fp32", score]["counter"]] == first, score


def test_without_fp32_candidates_come_from_the_first_view_and_nothing_is_paired():
    first, second = encoder(0), encoder(1)
    views = View("adapted", 100.0), QUANTIZED
    found = metrics(drive([([views[0]], first), ([views[1]], second)]))
    assert not any("vulnerability" in values for values in found.values())
    wanted = brute_accuracies(second, brute_candidates(first, 100.0))
    assert (found["quantized", "one_vs_20"]["common"], found["quantized", "one_vs_20"]["counter"]) == wanted


def test_views_of_one_encoder_have_rows_each_and_equal_ones():
    """A logit scale changes no prediction, and the candidates are FP32's at FP32's scale."""
    evaluation = Spurious()
    rows = drive([([FP32], encoder(0)), ([QUANTIZED, REFITTED], encoder(1))], evaluation=evaluation)
    assert [(row["stage"], row["logit_scale"]) for row in rows[::2]] == [
        (view.stage, view.logit_scale) for view in (FP32, QUANTIZED, REFITTED)
    ]
    found = metrics(rows)
    for score in ("one_vs_all", "one_vs_20"):
        assert found["quantized", score] == found["temperature", score] != found["fp32", score]
    kept = [evaluation.seen[view, COMMON][0][0] for view in (QUANTIZED, REFITTED)]
    assert kept[0] is kept[1]


def test_the_encoder_that_fp32_is_has_no_vulnerability():
    found = metrics(drive([([FP32, View("adapted", 50.0)], encoder(0))]))
    assert found["adapted", "one_vs_all"]["vulnerability"] == found["adapted", "one_vs_20"]["vulnerability"] == 0


def test_intervals_and_differences_are_those_of_resampled_images():
    """The two sets resampled apart, the models together."""
    of_view = {FP32: encoder(0), QUANTIZED: encoder(1, signal=0.03)}
    rows = drive([([view], cosines) for view, cosines in of_view.items()], resamples=300)
    drawn = [
        np.concatenate(list(resampled_counts(np.zeros(len(LABELS[source])), 300, 50, (0, side))))
        for side, source in enumerate((COMMON, COUNTER), 1)
    ]
    replicates = {}
    for view, cosines in of_view.items():
        hits = [(cosines[source].argmax(1) == LABELS[source]).numpy() for source in (COMMON, COUNTER)]
        common, counter = ((counts * right).sum(1) / len(right) for counts, right in zip(drawn, hits, strict=True))
        replicates[view.stage] = {"common": common, "counter": counter, "drop": common - counter}
        replicates[view.stage]["rsg"] = 1 - counter / common
    losses = [1 - replicates["quantized"][side] / replicates["fp32"][side] for side in ("common", "counter")]
    replicates["quantized"]["vulnerability"] = losses[1] - losses[0]
    found = {row["stage"]: row for row in rows if row["score"] == "one_vs_all"}
    for stage, wanted in replicates.items():
        assert found[stage]["intervals"].keys() == wanted.keys() == found[stage]["metrics"].keys()
        for name, values in wanted.items():
            assert found[stage]["intervals"][name] == pytest.approx(list(percentile_interval(values)), abs=1e-12), name
    assert found["fp32"]["paired"] == {}
    for name in ("drop", "rsg"):
        value = found["quantized"]["metrics"][name] - found["fp32"]["metrics"][name]
        wanted = paired_bootstrap(value, replicates["fp32"][name], replicates["quantized"][name])._asdict()
        assert found["quantized"]["paired"][name] == pytest.approx(wanted, abs=1e-12)
    assert found["quantized"]["paired"].keys() == {"drop", "rsg"}


def test_batches_and_order_do_not_matter():
    encoders = [([FP32], encoder(0)), ([QUANTIZED, REFITTED], encoder(1))]
    first = drive(encoders, batch=1, resamples=20)
    assert first == drive(encoders, batch=200, resamples=20) == drive(encoders, batch=13, shuffled=True, resamples=20)


def test_a_second_pass_forgets_the_first():
    evaluation = Spurious()
    drive([([FP32], encoder(3))], evaluation=evaluation)
    assert drive([([QUANTIZED], encoder(0))], evaluation=evaluation) == drive([([QUANTIZED], encoder(0))])


@pytest.mark.parametrize("side", [COMMON, COUNTER])
def test_one_side_alone_has_no_rows(side):
    assert drive([([FP32], {side: encoder(0)[side]})]) == []


def test_sides_are_paired_within_their_reference():
    others = {replace(source, reference="tools"): values for source, values in encoder(5, 40).items()}
    labels = LABELS | {replace(source, reference="tools"): values for source, values in LABELS.items()}
    rows = drive([([FP32], encoder(0) | others)], labels)
    assert [row["reference"] for row in rows] == ["birds", "birds", "tools", "tools"]
    assert rows[:2] == drive([([FP32], encoder(0))])
    lonely = {COMMON: encoder(0)[COMMON], replace(COUNTER, reference="tools"): encoder(0)[COUNTER]}
    assert drive([([FP32], lonely)], labels) == []


def test_other_sets_and_a_probe_have_no_rows(world):
    assert world.drive(Spurious()) == []
    assert drive([([FP32], encoder(0))], shared=True) == []
