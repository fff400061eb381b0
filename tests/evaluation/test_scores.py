"""What OOD scores are given besides an image's features: which of it a model and a suite have, and that it is made once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from qatlab.config import SetConfig, compose
from qatlab.core.errors import UserError
from qatlab.evaluation import score_inputs as scores
from qatlab.evaluation.evaluation import ALWAYS
from qatlab.evaluation.negatives import GENERIC, load_words, negative_labels, word_features
from qatlab.evaluation.score_inputs import ESTIMATED, TEXTS, ScoreInputs, needs
from qatlab.metrics.features import fit_knn, fit_mahalanobis, fit_vim
from qatlab.metrics.ood import ALL_SCORES
from qatlab.models import clip as clips
from qatlab.models.clip import Clip
from qatlab.models.zeroshot import text_features
from qatlab.suites.suite import EvaluationSet, Indexed, Suite, build_suite

EVERY = list(ALL_SCORES)
EXTRA = ESTIMATED | TEXTS | {"local"}
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("cold")


@pytest.fixture(scope="module")
def loaded() -> Clip:
    return clips.load(compose().model)


@pytest.fixture
def clip(loaded: Clip) -> Clip:
    return replace(loaded, text_calls=0)


@pytest.fixture(scope="module")
def suite(loaded: Clip) -> Suite:
    """The embedded suite: one reference, a calibration set of 48 images."""
    return build_suite(compose("suite.images=48").suite, loaded)


@pytest.fixture(scope="module")
def several(loaded: Clip) -> Suite:
    """Three references of 48 images: the first has two calibration sets, the second one, the third none."""
    config = compose("suite.images=48").suite
    config.sets = {
        "id": SetConfig("embedded:id", "id"),
        "foggy": SetConfig("embedded:fog", "id"),
        "blurred": SetConfig("embedded:blur", "id"),
        "fit_a": SetConfig("embedded:calibration", "calibration"),
        "fit_b": SetConfig("embedded:gray", "calibration"),
        "fit_foggy": SetConfig("embedded:calibration", "calibration", reference="foggy"),
        "near": SetConfig("embedded:near_ood", "near_ood"),
        "far": SetConfig("embedded:far_ood", "far_ood", reference="blurred"),
    }
    return build_suite(config, loaded)


def thin(suite: Suite, images: int) -> Suite:
    """The suite with the first ``images`` of every set."""
    sets = [replace(entry, images=Indexed(entry.images.images, range(images))) for entry in suite.sets]
    return replace(suite, sets=sets)


def unit(entry: EvaluationSet) -> Tensor:
    """Features of a set, told by its name, which use each direction less than the one before."""
    seed = sum(map(ord, entry.source.name))
    values = torch.randn(len(entry.images), 64, generator=torch.Generator().manual_seed(seed))
    return normalize(values * torch.linspace(1, 0.01, 64), dim=-1)


def inputs(clip: Clip, suite: Suite, words: str = "embedded", cache: bool = False) -> ScoreInputs:
    return ScoreInputs(clip, suite.heads, suite, words, unit, cache)


# -- which of it is there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "extra"),
    [
        ([], set()),
        (EVERY, EXTRA),
        (["msp", "entropy", "mcm"], set()),
        (["neglabel", "vim"], {"negatives", "subspace"}),
        (["gl_mcm", "generic_negative", "mahalanobis"], {"local", "generic", "gaussian"}),
    ],
)
def test_a_whole_model_and_a_calibration_set_give_what_is_asked_for(
    clip: Clip, suite: Suite, asked: list[str], extra: set[str]
) -> None:
    found = needs(asked, clip, suite)
    assert found.available == {"id": ALWAYS | extra}
    assert found.lacking == []


def test_without_a_text_tower_no_score_compares_with_texts(clip: Clip, suite: Suite) -> None:
    found = needs(EVERY, replace(clip, model=None), suite)
    assert found.available == {"id": ALWAYS | EXTRA - TEXTS}
    why = "there is no text tower to encode negative texts with"
    assert found.lacking == [f"neglabel is left out: {why}", f"generic_negative is left out: {why}"]
    assert needs(["msp", "vim"], replace(clip, model=None), suite).lacking == []


def test_without_a_calibration_set_no_score_is_fitted(clip: Clip, suite: Suite) -> None:
    found = needs(EVERY, clip, suite.only(roles={"id", "near_ood"}))
    assert found.available == {"id": ALWAYS | EXTRA - ESTIMATED}
    assert found.lacking == [
        f"{score} is left out for id: no calibration set has that reference" for score in ("mahalanobis", "knn", "vim")
    ]


def test_a_reference_without_a_calibration_set_is_named(clip: Clip, several: Suite) -> None:
    found = needs(["max_logit", "knn", "neglabel"], clip, several)
    some = ALWAYS | {"negatives"}
    assert found.available == {"id": some | {"neighbours"}, "foggy": some | {"neighbours"}, "blurred": some}
    assert found.lacking == ["knn is left out for blurred: no calibration set has that reference"]
    assert needs(["knn"], clip, several).available["id"] == ALWAYS | {"neighbours"}  # one reference is enough
    fewer = replace(several, sets=[entry for entry in several.sets if entry.source.name not in ("fit_a", "fit_b")])
    assert needs(["knn", "msp"], clip, fewer).lacking == [
        "knn is left out for blurred, id: no calibration set has that reference"
    ]


def test_a_tower_without_patches_has_no_gl_mcm(clip: Clip, suite: Suite) -> None:
    found = needs(EVERY, replace(clip, visual=nn.Linear(4, 4)), suite)
    assert found.available == {"id": ALWAYS | EXTRA - {"local"}}
    (sentence,) = found.lacking
    assert sentence.startswith("gl_mcm is left out: ")
    assert sentence.endswith("it is a Linear")


def test_all_reasons_are_given_in_the_order_of_the_scores(clip: Clip, suite: Suite) -> None:
    poor = replace(clip, model=None, visual=nn.Linear(4, 4))
    found = needs(EVERY, poor, suite.only(roles={"id", "far_ood"}))
    assert found.available == {"id": ALWAYS}
    assert [sentence.split()[0] for sentence in found.lacking] == [
        "gl_mcm", "neglabel", "generic_negative", "mahalanobis", "knn", "vim",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (["neglabel"], r"neglabel is left out: there is no text tower to encode negative texts with\."),
        (["vim", "gl_mcm"], r"vim is left out for id: no calibration .* reference; gl_mcm is left out: .*a Linear\."),
    ],
)
def test_nothing_left_to_compute_is_a_mistake(clip: Clip, suite: Suite, asked: list[str], reason: str) -> None:
    poor, sets = replace(clip, model=None, visual=nn.Linear(4, 4)), suite.only(roles={"id", "far_ood"})
    with pytest.raises(UserError, match=rf"^none of the scores can be computed\. {reason}$"):
        needs(asked, poor, sets)
    assert needs([*asked, "msp"], poor, sets).available == {"id": ALWAYS}


# -- making it ---------------------------------------------------------------------------------------------------------


def test_fits_are_those_of_the_references_calibration_images(clip: Clip, several: Suite) -> None:
    made = inputs(clip, several)
    entries = {entry.source.name: entry for entry in several.sets}
    for reference, names in (("id", ("fit_a", "fit_b")), ("foggy", ("fit_foggy",))):
        found = made.of(ESTIMATED, reference, CPU)
        features = torch.cat([unit(entries[name]) for name in names])
        labels = torch.cat([entries[name].labels for name in names])
        wanted = {
            "gaussian": fit_mahalanobis(features, labels),
            "neighbours": fit_knn(features, 10),
            "subspace": fit_vim(features, several.heads[reference].classes.features),
        }
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert type(found[name]) is type(value)
            torch.testing.assert_close(tuple(found[name]), tuple(value), rtol=0, atol=0)


def test_texts_are_those_of_the_suites_negatives(clip: Clip, suite: Suite) -> None:
    found = inputs(clip, suite).of(TEXTS, "id", CPU)
    words = load_words("embedded")
    wanted = negative_labels(
        clip, suite.heads["id"].classes.names, words, word_features(clip, words, False), cache=False
    )
    assert torch.equal(found["negatives"].inside, wanted.inside)
    assert torch.equal(found["negatives"].groups, wanted.groups)
    assert torch.equal(found["generic"], text_features(clip, list(GENERIC["embedded"]), cache=False))


@pytest.mark.parametrize(("words", "listed"), [("embedded", "embedded"), ("imagenet1k", "generic"), ("/x", "generic")])
def test_generic_prompts_keep_to_the_models_language(
    clip: Clip, suite: Suite, monkeypatch: pytest.MonkeyPatch, words: str, listed: str
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(scores, "text_features", lambda _, texts, cache: (asked.append(texts), torch.zeros(1, 64))[1])
    inputs(clip, suite, words=words).of(frozenset({"generic"}), "id", CPU)
    assert asked == [list(GENERIC[listed])]


def test_every_input_is_made_once_for_a_reference(clip: Clip, several: Suite) -> None:
    reads: Counter[str] = Counter()

    def features(entry: EvaluationSet) -> Tensor:
        reads[entry.source.name] += 1
        return unit(entry)

    made = ScoreInputs(clip, several.heads, several, "embedded", features, cache=False)
    assert made.of(ALWAYS | {"local"}, "id", CPU) == {}
    assert not reads
    assert clip.text_calls == 0
    first = made.of(ALWAYS | EXTRA, "id", CPU)
    assert first.keys() == EXTRA - {"local"}
    assert reads == {"fit_a": 3, "fit_b": 3}  # once by each of three scores
    calls = clip.text_calls
    assert calls == 3  # classes in NegLabel's prompt, its words, the generic prompts
    for names in (ESTIMATED, TEXTS, ALWAYS | EXTRA):
        again = made.of(names, "id", CPU)
        assert all(again[name] is first[name] for name in names - ALWAYS - {"local"})
    assert (reads, clip.text_calls) == ({"fit_a": 3, "fit_b": 3}, calls)
    other = made.of(ESTIMATED, "foggy", CPU)
    assert reads == {"fit_a": 3, "fit_b": 3, "fit_foggy": 3}
    assert not any(other[name] is first[name] for name in ESTIMATED)
    made.of(frozenset({"negatives"}), "foggy", CPU)
    assert clip.text_calls == calls + 1  # its classes; the words are known


@pytest.mark.parametrize("cache", [True, False])
def test_texts_are_kept_on_disk_only_where_they_may_be(clip: Clip, suite: Suite, cold: Path, cache: bool) -> None:
    inputs(clip, suite, cache=cache).of(TEXTS, "id", CPU)
    assert clip.text_calls == 3
    assert any(cold.rglob("*.safetensors")) == cache
    inputs(clip, suite, cache=cache).of(TEXTS, "id", CPU)
    assert clip.text_calls == (3 if cache else 6)


def test_inputs_are_on_the_device_of_the_pass(clip: Clip, several: Suite) -> None:
    found = inputs(clip, several).of(EXTRA, "id", torch.device("meta"))
    parts = [part for value in found.values() for part in (value if isinstance(value, tuple) else [value])]
    assert {part.device.type for part in parts if isinstance(part, Tensor)} == {"meta"}
    assert found["neighbours"].k == 10
    assert isinstance(found["subspace"].alpha, float)


# -- too few calibration images ----------------------------------------------------------------------------------------


def test_the_neighbour_is_a_nearer_one_where_there_are_fewer_images(clip: Clip, suite: Suite) -> None:
    found = inputs(clip, thin(suite, 4)).of(frozenset({"neighbours"}), "id", CPU)
    assert (found["neighbours"].k, found["neighbours"].bank.shape) == (4, (4, 64))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "subspace",
            r"vim cannot .* calibration set calibration: 16 images span no more than 32 dimensions: give more images",
        ),
        (
            "gaussian",
            r"mahalanobis cannot .* set calibration: the 16 images of 16 classes hold no two different images of a",
        ),
    ],
)
def test_too_few_calibration_images_are_told(clip: Clip, suite: Suite, name: str, message: str) -> None:
    made = inputs(clip, thin(suite, 16))
    with pytest.raises(UserError, match=rf"{message}.*\. Leave the score out, or give the set more images\.$"):
        made.of(frozenset({name}), "id", CPU)
    made.of(frozenset({"neighbours"}), "id", CPU)  # the others are not lost


def test_too_few_calibration_images_are_told_before_anything_is_scored(clip: Clip, suite: Suite) -> None:
    found = needs(["vim", "mahalanobis", "knn"], clip, thin(suite, 16))
    assert found.available == {"id": ALWAYS | {"neighbours"}}
    assert found.lacking == [
        "vim is left out for id: its calibration set has 16 images, no more than the principal space's 32 dimensions",
        "mahalanobis is left out for id: no class has two images in its calibration set",
    ]
    with pytest.raises(UserError, match=r"none of the scores can be computed.*16 images"):
        needs(["vim"], clip, thin(suite, 16))
