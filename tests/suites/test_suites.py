"""Suites: which images a set holds, who sees which of them, which of them are still to be scored, and every mistake."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from PIL import Image

from qatlab.config import ModelConfig, SetConfig, SuiteConfig, compose, recipe_files
from qatlab.config.options import ROLES
from qatlab.core.errors import UserError
from qatlab.data import TextTable
from qatlab.data.corruptions import Corrupt
from qatlab.data.embedded.sets import CLASS_NAMES, EmbeddedSet
from qatlab.data.images.classlists import load_class_list, named_classes
from qatlab.models import clip as clips
from qatlab.models.clip import Clip
from qatlab.models.prompts import prompts
from qatlab.suites.check import check_suite
from qatlab.suites.set_files import SetFiles
from qatlab.suites.set_options import reference_of
from qatlab.suites.suite import Suite, build_suite

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
    assert four.heads["id"].classes.names == CLASS_NAMES
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
    files = Counter(name for entry in shapes.sets[:2] for name in entry.images.images.names)
    assert files == Counter(path.relative_to(root / "shapes").as_posix() for path in (root / "shapes").rglob("*.png"))


def test_a_set_is_measured_against_its_own_or_the_first_id_set(clip: Clip, root: Path) -> None:
    sets = {
        "first": SetConfig("shapes", "id"),
        "second": SetConfig("shapes", "id", pick="0::2"),
        "flat": SetConfig("flat", "far_ood"),
        "again": SetConfig("flat", "near_ood", reference="second"),
    }
    built = suite(clip, sets, root=str(root))
    assert [entry.source.reference for entry in built.sets] == ["first", "second", "first", "second"]
    assert set(built.heads) == {"first", "second"}


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
    scored = roles or {*ROLES}
    return built.missing(lambda source: (source.name, source.definition) in stored or source.role not in scored)


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
    assert built.heads["shapes"].classes.names == NAMES


def test_class_names_come_with_the_text_features(root: Path) -> None:
    clip = clips.load(ModelConfig())
    clip.text_table = TextTable(torch.eye(3, 64), NAMES, "test")
    built = suite(clip, {"shapes": SetConfig("shapes", "id")}, root=str(root), class_names=None)
    assert built.heads["shapes"].classes.names == NAMES
    assert {label for _, label, _ in seen(built)["shapes"]} == {0, 1, 2}


def test_models_d9_the_embedded_world_is_for_the_embedded_model(clip: Clip) -> None:
    other = dataclasses.replace(clip, facts={**clip.facts, "model": "ViT-B-16"})
    with pytest.raises(UserError, match=r"suite=embedded .* model\.name=ViT-B-16 cannot be scored on it: name a suite"):
        suite(other, embedded(id="id"), class_names=None)


def test_using_folders_are_called_as_their_classes(clip: Clip, root: Path) -> None:
    sets = {
        "shapes": SetConfig("shapes", "id", exclude=["star"]),
        "x": SetConfig("shapes", "shifted", exclude=["star"]),
    }
    built = suite(clip, sets, root=str(root), class_names=None)
    assert built.heads["shapes"].classes.names == ["circle", "square"]
    assert built["x"].labels.tolist() == [0] * PER_CLASS + [1] * PER_CLASS


@pytest.mark.parametrize(("folder", "told"), [("7", "7 is a number"), ("n01440764", "n01440764 is a WordNet id")])
def test_using_folders_that_are_no_names_are_asked_about(clip: Clip, tmp_path: Path, folder: str, told: str) -> None:
    for name in ("circle", folder):
        grey(tmp_path / "x" / name / "0.png", 1)
    with pytest.raises(UserError, match=rf"suite\.sets\.x: its folder {told}.*classes="):
        suite(clip, {"x": SetConfig("x", "id")}, root=str(tmp_path), class_names=None)


def test_using_an_underscore_in_a_folders_name_is_a_space(clip: Clip, tmp_path: Path) -> None:
    for name in ("red_star", "t-shirt"):
        grey(tmp_path / "x" / name / "0.png", 1)
    listed = SetFiles(SuiteConfig(root=str(tmp_path), sets={"x": SetConfig("x", "id")})).head("x", None)
    assert listed.names == ["red star", "t-shirt"]
    assert listed.row("red_star") == 0


@pytest.mark.parametrize(("word", "classes"), [("folders", 3), ("all", 4)])
def test_using_some_of_the_suites_classes_are_scored_as_it_says(
    clip: Clip, root: Path, word: str, classes: int
) -> None:
    names = ["heart", *NAMES]
    built = suite(clip, {"x": SetConfig("shapes", "id", class_names=word)}, root=str(root), class_names=names)
    assert len(built.heads["x"].classes.names) == classes
    labels = built["x"].labels.tolist()
    assert {built.heads["x"].classes.names[label] for label in labels} == set(NAMES)


def test_a_home_folder_is_found(clip: Clip, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    assert suite(clip, {"shapes": SetConfig("shapes", "id")}, root=f"~/{root.name}").images == 15


def test_data_w6_rendered_images_go_by_the_names_of_their_classes(clip: Clip) -> None:
    """In another order, among more classes, or under other words in the same order."""
    sets = embedded(id="id", noise="shifted")
    files = SetFiles(SuiteConfig(sets=sets, images=20))
    shown = [CLASS_NAMES[i % 16] for i in range(20)]
    for names in (CLASS_NAMES[::-1], ["dog", *CLASS_NAMES], [f"a {name}" for name in CLASS_NAMES]):
        labels = files.open("noise", named_classes(names), clip.preprocess).images.labels
        assert [names[label].removeprefix("a ") for label in labels] == shown
    turned = suite(clip, sets, class_names=CLASS_NAMES[::-1])
    assert [turned.heads["id"].classes.names[label] for label in turned.sets[1].labels] == shown


# -- mistakes --------------------------------------------------------------------------------------------------------

ID = SetConfig("shapes", "id")


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        ({}, {}, r"suite\.sets is empty"),
        ({"flat": SetConfig("flat", "far_ood")}, {}, r"no set of the suite has role: id \(found flat: far_ood\)"),
        (
            {"shapes": ID, "x": SetConfig("flat", "far_ood", reference="shape")},
            {},
            r"suite\.sets\.x\.reference=shape is no id set of the suite \(did you mean 'shapes'\?\)",
        ),
        ({"id": SetConfig("nowhere", "id")}, {}, r"nowhere is not there; suite\.root="),
        ({"id": SetConfig("others", "id")}, {}, r"1 of 4 class folders .*'surprise'.*exclude"),
        ({"id": ID}, {"class_names": ["circle", "square"]}, r"1 of 3 class folders .*'star'"),
        ({"id": SetConfig("flat", "id")}, {"class_names": None}, r"names no classes, and has no class folders"),
        (
            {"id": ID},
            {"class_names": [*NAMES, "heart"]},
            r"id has 3 class folders, and .* name 4 classes: say .*id\.class_names=folders .*id\.class_names=all among all 4",
        ),
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


# -- class lists and subsets -----------------------------------------------------------------------------------------

IMAGENET = load_class_list("imagenet1k")
TEN = load_class_list("imagenet10")


def grey(file: Path, value: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (value % 256, value // 256, 0)).save(file)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``val``: an image for each of ImageNet's first 400 classes, red and green telling which; ``v2``: as numbers."""
    folder = tmp_path_factory.mktemp("imagenet")
    for row, wnid in enumerate(IMAGENET.folders[:400]):
        grey(folder / "val" / wnid / "0.png", row)
        if row < 30:
            grey(folder / "v2" / str(row) / "0.png", row)
    for row in load_class_list("imagenet_r").rows[:20]:
        grey(folder / "r" / IMAGENET.folders[row] / "art.png", row)
    return folder


@pytest.fixture
def table_clip() -> Clip:
    """Without a text tower: ImageNet's 1000 rows."""
    clip = clips.load(ModelConfig())
    clip.text_table = TextTable(torch.nn.functional.normalize(torch.randn(1000, 64)), IMAGENET.names, "table")
    return clip


def shown(built: Suite) -> dict[str, list[tuple[int, int]]]:
    """(class that the pixels show, label) of every image."""
    return {name: [(p[0] + 256 * p[1], label) for _, label, p in items] for name, items in seen(built).items()}


def test_subsets_are_read_out_of_the_whole_and_labelled_by_their_reference(table_clip: Clip, imagenet: Path) -> None:
    sets = {
        "all": SetConfig("val", "id", classes="imagenet1k"),
        "v2": SetConfig("v2", "shifted", numbers="own"),
        "r": SetConfig("r", "shifted", classes="imagenet_r"),
        "ten": SetConfig("val", "id", classes="imagenet10"),
        "ten_fit": SetConfig("val", "calibration", reference="ten"),
        "twenty": SetConfig("val", "near_ood", reference="ten", classes="imagenet20"),
        "x": SetConfig("val", "id", classes="imagenet_x_id"),
        "x_ood": SetConfig("val", "near_ood", reference="x", classes="imagenet_x_ood"),
    }
    built = suite(table_clip, sets, root=str(imagenet), class_names=None)
    images = shown(built)
    assert images["all"] == [(row, row) for row in range(400)]
    # "10" lies before "2" on disk
    assert sorted(images["v2"]) == [(row, row) for row in range(30)]
    released = load_class_list("imagenet_r").rows
    assert images["r"] == [(row, row) for row in released[:20]]
    assert {e.source.name: e.rows for e in built.sets if e.rows} == {"r": released}
    inside = [(row, label) for label, row in enumerate(TEN.rows) if row < 400]
    assert images["ten"] == images["ten_fit"] == inside
    assert images["twenty"] == [(row, -1) for row in load_class_list("imagenet20").rows if row < 400]
    halves = [row for row, _ in images["x"]] + [row for row, _ in images["x_ood"]]
    assert sorted(halves) == list(range(400))
    # a table's rows, by number: its names differ from ImageNet-10's, and two of ImageNet's are one
    assert torch.equal(built.heads["ten"].classes.features, table_clip.text_table.features[TEN.rows])  # type: ignore[union-attr]
    assert built.heads["ten"].classes.names == [IMAGENET.names[row] for row in TEN.rows]
    assert {name: len(head.classes.names) for name, head in built.heads.items()} == {"all": 1000, "ten": 10, "x": 500}


def test_shared_data_is_read_as_its_suites_say(table_clip: Clip, shared_data: Path) -> None:
    """With the lists' own classes every class folder of the real images finds its label."""
    sets = {
        "imagenet": SetConfig(["nowhere", "imagenet1k"], "id", classes="imagenet1k"),
        "x": SetConfig("imagenet1k", "id", classes="imagenet_x_id"),
        "x_ood": SetConfig("imagenet1k", "near_ood", reference="x", classes="imagenet_x_ood"),
        "tiny": SetConfig("tinyimagenet", "shifted", classes="tinyimagenet"),
        "dtd": SetConfig("dtd10", "far_ood"),
        "dtd_clean": SetConfig("dtd10", "far_ood", classes="dtd_clean"),
    }
    built = suite(table_clip, sets, root=str(shared_data), class_names=None)
    assert {e.source.name: len(e.images) for e in built.sets} == {
        "imagenet": 1000, "x": 500, "x_ood": 500, "tiny": 2000, "dtd": 500, "dtd_clean": 400,
    }  # fmt: skip
    entries = {entry.source.name: entry for entry in built.sets}
    assert entries["imagenet"].images.images.labels == list(range(1000))
    assert [*dict.fromkeys(entries["tiny"].images.images.labels)] == entries["tiny"].rows
    assert len({entry.source.definition for entry in built.sets}) == len(sets)


@pytest.mark.parametrize("form", ["release", "backgrounds", "sides", "manifest"])
def test_common_and_counter_images_of_every_layout(table_clip: Clip, tmp_path: Path, form: str) -> None:
    """Row 9 is the ostrich (ground, water), row 296 the ice bear (snow, grass)."""
    classes = {9: ("ostrich", "ground", "water"), 296: ("ice bear", "snow", "grass")}
    lines = ["path,class,group"]
    for row, (name, common, counter) in classes.items():
        for side, background in (("common", common), ("counter", counter)):
            folder = {
                "release": f"{row} {name}/{side}-{background}",
                "backgrounds": f"{name.replace(' ', '_')}/{background}",
                "sides": f"{side}/{IMAGENET.folders[row]}",
                "manifest": "all",
            }[form]
            for i in range(1 + (side == "common")):
                file = f"{folder}/{side}{row}_{i}.png"
                grey(tmp_path / "animals" / file, row)
                lines.append(f"{file},{name},{side}")
    grey(tmp_path / "val" / "n01440764" / "0.png", 0)
    (tmp_path / "animals" / "list.csv").write_text("\n".join(lines))
    path = "animals/list.csv" if form == "manifest" else "animals"
    sets = {
        "val": SetConfig("val", "id", classes="imagenet1k"),
        "common": SetConfig(path, "common", classes="counteranimal"),
        "counter": SetConfig(path, "counter", classes="counteranimal"),
    }
    images = shown(suite(table_clip, sets, root=str(tmp_path), class_names=None))
    # 1 vs 1000: labels and head are the reference's
    assert sorted(images["common"]) == [(9, 9), (9, 9), (296, 296), (296, 296)]
    assert sorted(images["counter"]) == [(9, 9), (296, 296)]
    if form == "backgrounds":
        sets["common"] = SetConfig(path, "common")
        with pytest.raises(UserError, match=r"no image's group is called common \(found grass, ground, snow, water\)"):
            suite(table_clip, sets, root=str(tmp_path), class_names=None)


def webdataset_folder(folder: Path, names: list[str]) -> None:
    (folder / "test").mkdir(parents=True)
    with webdataset.TarWriter(str(folder / "test" / "0.tar")) as tar:
        for i, _ in enumerate(names):
            picture = io.BytesIO()
            Image.new("RGB", (64, 64), (i, 0, 0)).save(picture, "PNG")
            tar.write({"__key__": str(i), "png": picture.getvalue(), "cls": i})
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("\n".join(names))
    (folder / "zeroshot_classification_templates.txt").write_text("a picture of a {c}\n")


def test_a_webdataset_brings_its_classes_and_prompts(clip: Clip, tmp_path: Path) -> None:
    webdataset_folder(tmp_path / "wds", NAMES)
    config = {"root": str(tmp_path), "class_names": None}
    own = suite(clip, {"wds": SetConfig("wds", "id", prompts="own")}, **config)
    assert own.heads["wds"].classes.names == NAMES
    assert own.heads["wds"].classes.prompts == "a picture of a {}"
    assert [label for _, label, _ in seen(own)["wds"]] == [0, 1, 2]
    plain = suite(clip, {"wds": SetConfig("wds", "id")}, **config)
    expected = suite(clip, {"wds": SetConfig("wds", "id")}, **config, templates=["a picture of a {}"])
    assert not torch.equal(plain.heads["wds"].classes.features, own.heads["wds"].classes.features)
    assert torch.equal(expected.heads["wds"].classes.features, own.heads["wds"].classes.features)
    turned = suite(clip, {"wds": SetConfig("wds", "id")}, **{**config, "class_names": NAMES[::-1]})
    assert [label for _, label, _ in seen(turned)["wds"]] == [2, 1, 0]


def test_accuracy_and_ood_scores_may_have_their_own_prompts(clip: Clip, root: Path, tmp_path: Path) -> None:
    def built(**options: Any) -> Suite:
        return suite(clip, {"shapes": SetConfig("shapes", "id", **options)}, root=str(root))

    webdataset_folder(tmp_path / "wds", NAMES)
    one, two = built(), built(ood_prompts="single")
    assert one.ood_heads == {}
    assert two.heads["shapes"].classes.prompts == "a photo of a {}"
    assert two.ood_heads["shapes"].classes.prompts == "single"
    assert two.ood_heads["shapes"].classes.names == NAMES
    assert two.sets[0].source.definition != one.sets[0].source.definition
    with pytest.raises(
        UserError, match=r"^suite\.sets\.shapes\.prompts=imagnet80 is neither a template .*did you mean 'imagenet80'"
    ):
        built(prompts="imagnet80")
    with pytest.raises(UserError, match=r"suite\.sets\.shapes\.ood_prompts=own, but no templates lie beside the set"):
        built(ood_prompts="own")


def test_a_set_may_be_corrupted_as_it_is_read(clip: Clip, root: Path) -> None:
    fog = {"name": "fog", "severity": 3}
    sets = {
        "shapes": SetConfig("shapes", "id"),
        "fog": SetConfig("shapes", "shifted", corruption=fog),
        "again": SetConfig("shapes", "shifted", corruption={**fog, "seed": 1}),
    }
    built = suite(clip, sets, root=str(root))
    clean, foggy, again = (entry.images.images for entry in built.sets)
    assert foggy.labels == clean.labels
    assert len({clean.content(), foggy.content(), again.content()}) == 3
    expected = Corrupt("fog", 3).fit(clip.preprocess, clean.raw(2), clean.names[2])
    assert torch.equal(foggy[2][0], expected)
    assert not torch.equal(foggy[2][0], clean[2][0])
    assert not torch.equal(foggy[2][0], again[2][0])
    for corruption, message in (
        ({"name": "fog"}, r"suite\.sets\.fog\.corruption has no severity"),
        ({**fog, "sed": 1}, r"suite\.sets\.fog\.corruption\.sed is not an option \(did you mean 'seed'\?\)"),
        ({**fog, "name": "frog"}, r"The corruption 'frog' is unknown"),
    ):
        with pytest.raises(UserError, match=message):
            suite(clip, {**sets, "fog": SetConfig("shapes", "shifted", corruption=corruption)}, root=str(root))


# -- twins, and sets that are not there --------------------------------------------------------------------------------


def test_the_same_images_may_have_two_roles_but_not_one_twice(clip: Clip, root: Path) -> None:
    twice = {
        "a": SetConfig("shapes", "id"),
        "far": SetConfig("flat", "far_ood"),
        "near": SetConfig("flat", "near_ood"),
        "b": SetConfig("shapes", "id", pick="::2"),
        "other": SetConfig("flat", "far_ood", reference="b"),
    }
    built = suite(clip, twice, root=str(root))
    contents = {entry.source.name: entry.images.images.content() for entry in built.sets}
    assert contents["far"] == contents["near"] == contents["other"] != contents["a"]
    with pytest.raises(UserError, match=r"sets\.far and suite\.sets\.again are the same images in the same role"):
        suite(clip, {**twice, "again": SetConfig(["nowhere", "flat"], "far_ood")}, root=str(root))
    with pytest.raises(UserError, match=r"sets\.a and suite\.sets\.again are the same images in the same role \(id\)"):
        suite(clip, {**twice, "again": SetConfig("shapes", "id")}, root=str(root))


def test_sets_that_are_not_there_are_left_out_only_when_asked(clip: Clip, root: Path) -> None:
    sets = {
        "shapes": SetConfig("shapes", "id"),
        "gone": SetConfig(["gone", "lost/gone"], "far_ood"),
        "other": SetConfig("vanished", "id"),
        "hanging": SetConfig("flat", "far_ood", reference="other"),
    }
    with pytest.raises(
        UserError, match=r"sets\.gone: gone is not there \(nor lost/gone\); .*skip_missing=true leaves it"
    ):
        suite(clip, sets, root=str(root))
    built = suite(clip, sets, root=str(root), skip_missing=True)
    assert [entry.source.name for entry in built.sets] == ["shapes"]
    assert built.skipped == {
        "gone": f"looked for gone, lost/gone below {root}",
        "other": f"looked for vanished below {root}",
        "hanging": "its reference other is not there",
    }
    assert [entry.source.name for entry in built.probe(["shapes", "gone"], 4).sets] == ["shapes"]
    with pytest.raises(UserError, match=r"None of the suite's id sets is there"):
        suite(clip, {"other": sets["other"]}, root=str(root), skip_missing=True)


def test_an_absent_default_reference_gives_no_other_one(clip: Clip, root: Path) -> None:
    """What a set is measured against must not depend on what is on the disk."""
    sets = {"first": SetConfig("gone", "id"), "second": SetConfig("shapes", "id"), "flat": SetConfig("flat", "far_ood")}
    built = suite(clip, sets, root=str(root), skip_missing=True)
    assert [entry.source.name for entry in built.sets] == ["second"]


@pytest.mark.parametrize("name", [name for name in recipe_files("suite") if name not in ("folders", "embedded")])
def test_a_packaged_suite_has_roles_references_and_lists_that_are_there(name: str) -> None:
    config = compose(f"suite={name}").suite
    choose = SetFiles(config)
    for entry, options in config.sets.items():
        assert config.sets[reference_of(entry, config)].role == "id"
        assert choose.tried(entry)
        listed = choose.listed(options)
        assert listed is not None or options.role != "id"
        for chosen in filter(None, (options.prompts, options.ood_prompts)):
            assert prompts(chosen).templates
    assert {*(config.probe_sets or [])} <= {*config.sets}
    assert not check_suite(config).complete


def test_data_t1_what_may_have_been_an_image_is_said_when_a_suite_is_scored(clip: Clip, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / "x" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "x" / name / "0.png")
    (tmp_path / "x/star/1.png").symlink_to("gone.png")
    (tmp_path / "x/star/README.txt").touch()
    built = suite(clip, {"x": SetConfig("x", "id"), "e": SetConfig("embedded:noise", "far_ood")}, root=str(tmp_path))
    assert built.images == 23
    assert built.left_out == {"x": "1 dangling link"}


# -- sets with classes of their own ----------------------------------------------------------------------------------


def test_using_c3_a_set_may_have_some_of_the_classes_beside_one_with_all(
    clip: Clip, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "two.txt").write_text("star\ncircle\n")
    sets = {
        "all": SetConfig("shapes", "id"),
        "two": SetConfig("shapes", "id", class_names=str(tmp_path / "two.txt")),
        "rest": SetConfig("shapes", "near_ood", reference="two", class_names=["square"]),
        "again": SetConfig("shapes", "shifted", reference="two", pick="::2"),
        "stars": SetConfig("shapes", "shifted", class_names=["star"]),
    }
    built = suite(clip, sets, root=str(root))
    images = {name: [(label, red, green) for _, label, (red, green, _) in items] for name, items in seen(built).items()}
    circles, squares, stars = ([(i, len(name)) for i in range(PER_CLASS)] for name in NAMES)
    assert images["again"] == images["two"][::2]
    images = {name: sorted(items) for name, items in images.items()}
    assert images["all"] == [(label, *of) for label, items in enumerate((circles, squares, stars)) for of in items]
    assert images["two"] == [(0, *of) for of in stars] + [(1, *of) for of in circles]
    assert images["rest"] == [(-1, *of) for of in squares]
    assert images["stars"] == [(2, *of) for of in stars]
    assert {entry.source.name: entry.rows for entry in built.sets if entry.rows} == {"stars": [2]}
    assert built.heads["two"].classes.names == ["star", "circle"]
    every = built.heads["all"].classes.features
    assert torch.equal(built.heads["two"].classes.features, every[[2, 0]])
    # alone in a suite it is the same set: its definition rests on its own classes and images
    alone = suite(clip, {"two": sets["two"]}, root=str(root))
    definitions = {entry.source.name: entry.source.definition for entry in built.sets}
    assert alone.sets[0].source.definition == definitions["two"]
    assert len({*definitions.values()}) == len(sets)


def test_using_c3_classes_of_ones_own_need_no_suites_names(clip: Clip, root: Path) -> None:
    built = suite(clip, {"x": SetConfig("shapes", "id", class_names=NAMES[::-1])}, root=str(root), class_names=None)
    assert built.heads["x"].classes.names == NAMES[::-1]
    assert [label for _, label, _ in seen(built)["x"]] == [2] * 5 + [1] * 5 + [0] * 5
    # and may be of another dataset than the suite's
    other = suite(
        clip, {"x": SetConfig("shapes", "id", class_names=NAMES)}, root=str(root), class_names=["ring", "heart"]
    )
    assert other.heads["x"].classes.names == NAMES


def test_using_c3_a_part_of_a_list_that_comes_with_qatlab(table_clip: Clip, imagenet: Path) -> None:
    wanted = ["goldfish", "n01484850"]
    sets = {
        "all": SetConfig("val", "id", classes="imagenet1k"),
        "two": SetConfig("val", "id", classes="imagenet_r", class_names=wanted),
    }
    built = suite(table_clip, sets, root=str(imagenet), class_names=None)
    assert shown(built)["two"] == [(1, 0), (2, 1)]
    assert built.heads["two"].classes.names == ["goldfish", "great white shark"]
    assert torch.equal(built.heads["two"].classes.features, table_clip.text_table.features[[1, 2]])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        (
            {"id": SetConfig("shapes", "id", class_names=["circle", "circle"])},
            {},
            r"id\.class_names names the class 'circle' 2 times",
        ),
        (
            {"id": SetConfig("shapes", "id", classes="dtd", class_names=["circle"])},
            {},
            r"id\.class_names names 'circle'.*, which is no class of dtd",
        ),
        (
            {"id": SetConfig("shapes", "id", class_names=["circle", True])},
            {},
            r"id\.class_names: the name of class 1 is True",
        ),
        (
            {"id": ID, "x": SetConfig("shapes", "shifted", class_names=["heart"])},
            {},
            r"sets\.x: 1 of the 1 classes of the 1 class names are not among those of its reference",
        ),
        ({"id": SetConfig("embedded:id", "id", class_names=["circle"])}, {}, r"id\.class_names needs images on disk"),
        ({"id": SetConfig("embedded:id", "id", numbers="own")}, {}, r"id\.numbers needs images on disk"),
        (
            {"id": SetConfig("embedded:id", "id")},
            {},
            r"embedded:id shows the class 'triangle', which its reference's 3 classes lack",
        ),
        (
            {"id": ID, "x": SetConfig("shapes", "near_ood", classes="x.json")},
            {},
            r"x\.classes=x\.json maps folders to the reference's classes, of which a set with role near_ood shows none",
        ),
        (
            {"id": ID, "noise": SetConfig("flat", "far_ood"), "x": SetConfig("flat", "far_ood", reference="noise")},
            {},
            r"reference=noise is no id set of the suite; there are id\.",
        ),
        ({"id": ID}, {"class_names": []}, r"suite\.class_names holds no class names"),
        ({"id": ID}, {"class_names": [1, 2]}, r"3 of 3 class folders .* have no counterpart in the 2 class names"),
        (
            {"id": ID},
            {"class_names": ["star", "star"]},
            r"'star' \(two classes are called so: star \(row 0\) and star \(row 1\)\)",
        ),
    ],
)
def test_data_t2_mistakes_in_classes_are_told_in_a_sentence(
    clip: Clip, root: Path, sets: dict[str, SetConfig], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        suite(clip, sets, root=str(root), **options)
