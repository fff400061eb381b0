"""Suites: which images a set holds, who sees which of them, which of them are still to be scored, and every mistake."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qatlab import clip as clips
from qatlab.clip import Clip
from qatlab.config import ModelConfig, SetConfig, SuiteConfig
from qatlab.data import TextTable
from qatlab.data.embedded import CLASS_NAMES, EmbeddedSet
from qatlab.data.suites import ROLES, Suite, build_suite
from qatlab.errors import UserError

NAMES = ["circle", "square", "star"]
PER_CLASS = 5


@pytest.fixture(scope="module")
def clip() -> Clip:
    return clips.load(ModelConfig())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``shapes``: three class folders of five images; ``others``: the same and a folder more; ``flat``: four images."""
    folder = tmp_path_factory.mktemp("root")
    for tree, classes in (("shapes", NAMES), ("others", [*NAMES, "surprise"])):
        for name in classes:
            (folder / tree / name).mkdir(parents=True)
            for i in range(PER_CLASS):
                Image.new("RGB", (64, 64), (i, len(name), 0)).save(folder / tree / name / f"{i}.png")
    (folder / "flat").mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (i, 9, 9)).save(folder / "flat" / f"{i}.png")
    return folder


def suite(clip: Clip, sets: dict[str, SetConfig], **options: Any) -> Suite:
    return build_suite(SuiteConfig(sets=sets, **{"class_names": NAMES, "images": 20, **options}), clip)


def embedded(**roles: str) -> dict[str, SetConfig]:
    return {name: SetConfig(f"embedded:{name}", role) for name, role in roles.items()}


@pytest.fixture
def four(clip: Clip) -> Suite:
    sets = embedded(id="id", calibration="calibration", near_ood="near_ood", noise="shifted", far_ood="far_ood")
    return suite(clip, sets, class_names=None)


@pytest.fixture
def shapes(clip: Clip, root: Path) -> Suite:
    sets = {
        "even": SetConfig("shapes", "id", pick="0::2"),
        "odd": SetConfig("shapes", "calibration", pick="1::2"),
        "flat": SetConfig("flat", "far_ood"),
        "other": SetConfig("others", "shifted", exclude=["surprise"]),
    }
    return suite(clip, sets, root=str(root))


def seen(built: Suite, rank: int = 0, world: int = 1) -> dict[str, list[tuple[int, int, tuple[int, ...]]]]:
    """(index, label, first pixel) of every image of every set, as this rank's loaders give them."""
    found = {}
    for entry, loader in zip(built.sets, built.loaders(4, 0, rank, world), strict=True):
        found[entry.source.name] = [
            (int(i), int(label), tuple(image[:, 0, 0].tolist()))
            for images, labels, index in loader
            for image, label, i in zip(images, labels, index, strict=True)
        ]
    return found


# -- images ----------------------------------------------------------------------------------------------------------


def test_an_embedded_suite_holds_the_worlds_images(four: Suite) -> None:
    assert four.images == 5 * 20
    assert four.classes["id"].names == CLASS_NAMES
    for name, items in seen(four).items():
        world = EmbeddedSet(name, 20)
        expected = [(i, world[i][1], tuple(world[i][0][:, 0, 0].tolist())) for i in range(20)]
        assert items == expected
    assert {entry.source.name: entry.source.role for entry in four.sets}["noise"] == "shifted"


def test_folders_hold_their_images_with_the_classes_labels(shapes: Suite) -> None:
    found = seen(shapes)
    assert {name: len(items) for name, items in found.items()} == {"even": 8, "odd": 7, "flat": 4, "other": 15}
    for name in ("even", "odd", "other"):
        assert all(pixel[1] == len(NAMES[label]) for _, label, pixel in found[name])
    assert [label for _, label, _ in found["flat"]] == [-1] * 4
    assert all(items == sorted(items) for items in found.values())


def test_two_slices_cover_each_image_once(shapes: Suite, root: Path) -> None:
    files = Counter(file for entry in shapes.sets[:2] for file in entry.images.images.files)
    assert files == Counter(path.relative_to(root / "shapes") for path in (root / "shapes").rglob("*.png"))


def test_a_set_is_measured_against_its_own_or_the_first_id_set(clip: Clip, root: Path) -> None:
    sets = {
        "first": SetConfig("shapes", "id"),
        "second": SetConfig("shapes", "id"),
        "flat": SetConfig("flat", "far_ood"),
        "again": SetConfig("flat", "near_ood", reference="second"),
    }
    built = suite(clip, sets, root=str(root))
    assert [entry.source.reference for entry in built.sets] == ["first", "second", "first", "second"]
    assert set(built.classes) == {"first", "second"}


# -- who sees what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_the_ranks_share_every_image_once(shapes: Suite, world: int) -> None:
    alone = seen(shapes)
    shares = [seen(shapes, rank, world) for rank in range(world)]
    for name, items in alone.items():
        assert sorted(item for share in shares for item in share[name]) == items
        sizes = [len(share[name]) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_loader_processes_change_nothing(shapes: Suite) -> None:
    alone, helped = (shapes.only(names={"even"}).loaders(3, workers)[0] for workers in (0, 2))
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- probe -----------------------------------------------------------------------------------------------------------


def test_a_probe_is_a_part_of_the_suite_with_the_references(four: Suite) -> None:
    probe = four.probe(["near_ood"], 8)
    assert [entry.source.name for entry in probe.sets] == ["id", "near_ood"]
    whole, part = seen(four), seen(probe)
    for name, items in part.items():
        assert [i for i, _, _ in items] == list(range(8))
        known = [(label, pixel) for _, label, pixel in whole[name]]
        assert all((label, pixel) in known for _, label, pixel in items)
        assert len(set(items)) == 8


def test_a_probe_of_all_sets_leaves_the_calibration_split_alone(four: Suite) -> None:
    assert [entry.source.name for entry in four.probe(None, 8).sets] == ["id", "near_ood", "noise", "far_ood"]
    assert four.probe(None, 10_000).images == 4 * 20


def test_a_probe_shows_more_than_some_of_the_classes(clip: Clip) -> None:
    """Where classes take turns, every 4th image of 512 would be of the same 4 of 16 classes."""
    built = suite(clip, embedded(id="id"), class_names=None, images=512)
    labels = [EmbeddedSet("id", 512).kind.shapes.index(CLASS_NAMES[place % 16]) for place in range(512)]
    places = built.probe(None, 128).sets[0].images.places
    counts = Counter(labels[place] for place in places)
    assert sum(counts.values()) == 128
    assert len(counts) == 16
    assert max(counts.values()) <= 16


def test_a_probe_of_an_unknown_set_is_refused(four: Suite) -> None:
    with pytest.raises(UserError, match=r"suite\.probe_sets names 'nois'.*did you mean 'noise'"):
        four.probe(["nois"], 8)
    with pytest.raises(UserError, match=r"'calibration', which is no scored set"):
        four.probe(["calibration"], 8)


# -- what is left to do ----------------------------------------------------------------------------------------------


def done(built: Suite, *names: str) -> set[tuple[str, str]]:
    return {(entry.source.name, entry.source.definition) for entry in built.sets if entry.source.name in names}


def missing(built: Suite, stored: set[tuple[str, str]], roles: set[str] | None = None) -> Suite:
    return built.missing(lambda source: (source.name, source.definition) in stored, roles or {*ROLES} - {"calibration"})


def test_sets_that_nothing_scores_are_not_missing(four: Suite) -> None:
    scored = missing(four, set(), {"id", "shifted"})
    assert [entry.source.name for entry in scored.sets] == ["id", "noise"]
    assert [entry.source.name for entry in missing(four, set(), {"near_ood"}).sets] == ["id", "near_ood"]
    assert missing(four, done(four, "near_ood"), {"near_ood"}).sets == []


def test_what_is_missing_comes_with_its_reference(four: Suite) -> None:
    def names(*stored: str) -> list[str]:
        return [entry.source.name for entry in missing(four, done(four, *stored)).sets]

    assert names() == ["id", "near_ood", "noise", "far_ood"]
    assert names("id", "near_ood", "far_ood") == ["id", "noise"]
    assert names("near_ood", "noise", "far_ood") == ["id"]
    assert names("id", "near_ood", "noise", "far_ood") == []


@pytest.mark.parametrize(
    "change",
    [{"images": 21}, {"seed": 1}, {"templates": ["a {}"]}, {"class_names": CLASS_NAMES[::-1]}],
)
def test_a_set_that_became_another_is_missing(clip: Clip, four: Suite, change: dict[str, Any]) -> None:
    sets = embedded(id="id", calibration="calibration", near_ood="near_ood", noise="shifted", far_ood="far_ood")
    everything = done(four, *(entry.source.name for entry in four.sets))
    assert missing(suite(clip, sets, **{"class_names": None}), everything).sets == []
    changed = suite(clip, sets, **{"class_names": None, **change})
    assert [entry.source.name for entry in missing(changed, everything).sets] == ["id", "near_ood", "noise", "far_ood"]


def test_other_images_under_the_same_names_are_another_set(clip: Clip, root: Path) -> None:
    def definition() -> str:
        return suite(clip, {"shapes": SetConfig("shapes", "id")}, root=str(root)).sets[0].source.definition

    first = definition()
    assert definition() == first
    image = sorted((root / "shapes").rglob("*.png"))[0]
    content = image.read_bytes()
    image.write_bytes(content + b"more")
    assert definition() != first
    image.write_bytes(content)
    assert definition() == first
    image.rename(image.with_name("another.png"))
    assert definition() != first


def test_other_evaluations_make_other_results(clip: Clip) -> None:
    config = SuiteConfig(sets=embedded(id="id"), images=20)
    one, other = (build_suite(config, clip, {"ood": {"scores": scores}}) for scores in (["msp"], ["msp", "mcm"]))
    assert missing(other, done(one, "id")).images == 20


def test_folders_do_not_care_how_many_images_are_rendered(clip: Clip, root: Path) -> None:
    sets = {"shapes": SetConfig("shapes", "id")}
    one, other = (suite(clip, sets, root=str(root), images=n) for n in (20, 30))
    assert missing(other, done(one, "shapes")).sets == []


def test_rendered_sets_beside_folders_do(clip: Clip, root: Path) -> None:
    sets = {"shapes": SetConfig("shapes", "id"), "near": SetConfig("embedded:near_ood", "near_ood")}
    one, other = (suite(clip, sets, root=str(root), seed=seed) for seed in (0, 1))
    assert [entry.source.name for entry in missing(other, done(one, "shapes", "near")).sets] == ["shapes", "near"]


# -- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["names.txt", "names.json", "records.json"])
def test_class_names_come_from_a_file(clip: Clip, root: Path, tmp_path: Path, file: str) -> None:
    content = {
        "names.txt": "\n".join(NAMES) + "\n",
        "names.json": json.dumps(NAMES),
        "records.json": json.dumps([{"index": i, "name": NAMES[i]} for i in (2, 0, 1)]),
    }[file]
    (tmp_path / file).write_text(content)
    built = suite(clip, {"shapes": SetConfig("shapes", "id")}, root=str(root), class_names=str(tmp_path / file))
    assert built.classes["shapes"].names == NAMES


def test_class_names_come_with_the_text_features(root: Path) -> None:
    clip = clips.load(ModelConfig())
    clip.text_table = TextTable(torch.eye(3, 64), NAMES, "test")
    built = suite(clip, {"shapes": SetConfig("shapes", "id")}, root=str(root), class_names=None)
    assert built.classes["shapes"].names == NAMES
    assert {label for _, label, _ in seen(built)["shapes"]} == {0, 1, 2}


def test_a_home_folder_is_found(clip: Clip, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    assert suite(clip, {"shapes": SetConfig("shapes", "id")}, root=f"~/{root.name}").images == 15


# -- mistakes --------------------------------------------------------------------------------------------------------

ID = SetConfig("shapes", "id")


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        ({}, {}, r"suite\.sets is empty"),
        ({"flat": SetConfig("flat", "far_ood")}, {}, r"no set of the suite has role: id \(found flat: far_ood\)"),
        (
            {"id": ID, "x": SetConfig("flat", "faraway_ood")},
            {},
            r"suite\.sets\.x\.role=faraway_ood is unknown \(did you mean 'far_ood'\?\)",
        ),
        (
            {"shapes": ID, "x": SetConfig("flat", "far_ood", reference="shape")},
            {},
            r"suite\.sets\.x\.reference=shape is no id set of the suite \(did you mean 'shapes'\?\)",
        ),
        ({"id": SetConfig("nowhere", "id")}, {}, r"nowhere is not there; suite\.root="),
        ({"id": SetConfig("others", "id")}, {}, r"1 of 4 class folders .*'surprise'.*exclude"),
        ({"id": ID}, {"class_names": ["circle", "square"]}, r"1 of 3 class folders .*'star'"),
        ({"id": ID}, {"class_names": None}, r"names no classes: give suite\.class_names"),
        ({"id": ID}, {"class_names": "nowhere.txt"}, r"suite\.class_names=nowhere\.txt: there is no file"),
        ({"id": SetConfig("embedded:idd", "id")}, {}, r"embedded world has no set 'idd'"),
        ({"id": SetConfig("shapes", "id", pick="50:")}, {}, r"pick='50:' leaves none of the 15 images"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(
    clip: Clip, root: Path, sets: dict[str, SetConfig], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        suite(clip, sets, root=str(root), **options)
