"""Which images lie below a folder: each once, none lost without a word."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from qatlab.config import SetConfig, SuiteConfig
from qatlab.core.errors import UserError
from qatlab.data.images.folders import Folders
from qatlab.data.images.imageset import ImageSet
from qatlab.data.images.walk import LOSSES, images_below, told
from qatlab.data.preprocess import Preprocess
from qatlab.suites.check import check_suite

PREPROCESS = Preprocess(8, (0.5,) * 3, (0.5,) * 3)
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(name: str, **options: str) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file, **options)
        return file

    return save


def names(root: Path) -> list[str]:
    return [file.as_posix() for file in images_below(root)[0]]


def left_out(root: Path) -> str:
    return told(images_below(root)[1])


def test_data_w7_a_link_to_its_own_folder_multiplies_nothing(tmp_path: Path, save: Save) -> None:
    save("l/cat/0.png")
    (tmp_path / "l/cat/again").symlink_to(".")
    assert names(tmp_path / "l") == ["cat/0.png"]
    assert left_out(tmp_path / "l") == "1 link leads to a folder that counts already (again 1)"


def test_data_w7_a_link_upwards_takes_no_other_tree_in(tmp_path: Path, save: Save) -> None:
    save("trees/mine/cat/0.png")
    save("trees/other/dog/0.png")
    (tmp_path / "trees/mine/all").symlink_to("..")
    (tmp_path / "trees/mine/cat/root").symlink_to("/")
    assert names(tmp_path / "trees/mine") == ["cat/0.png"]


@pytest.mark.parametrize("first", ["a", "z"])
def test_data_w7_links_to_other_folders_are_followed_and_the_folders_themselves_come_first(
    tmp_path: Path, save: Save, first: str
) -> None:
    """A farm of links is a dataset; a link into the tree itself is none, whatever it is called."""
    save("store/cats/0.png")
    save("farm/dog/1.png")
    (tmp_path / "farm/cat").symlink_to(tmp_path / "store/cats")
    (tmp_path / "farm" / f"{first}_dog").symlink_to("dog")
    assert names(tmp_path / "farm") == ["cat/0.png", "dog/1.png"]
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path / "farm")  # the root may be one
    assert names(linked) == ["cat/0.png", "dog/1.png"]


def test_data_w7_two_folders_that_lead_to_each_other(tmp_path: Path, save: Save) -> None:
    for here, there in (("a", "b"), ("b", "a")):
        save(f"l/{here}/{here}.png")
        (tmp_path / "l" / here / "to").symlink_to(f"../{there}")
    (tmp_path / "l/c").mkdir()
    (tmp_path / "l/c/d").symlink_to(tmp_path / "l/c")
    assert names(tmp_path / "l") == ["a/a.png", "b/b.png"]


def test_data_w7_a_folder_linked_under_two_classes_counts_for_the_first_and_the_second_is_an_error(
    tmp_path: Path, save: Save
) -> None:
    save("store/0.png")
    (tmp_path / "farm").mkdir()
    for name in ("cat", "kitten"):
        (tmp_path / "farm" / name).symlink_to(tmp_path / "store")
    assert names(tmp_path / "farm") == ["cat/0.png"]
    with pytest.raises(
        UserError, match=r"kitten holds no image of its own \(it leads to a folder that counts already\)"
    ):
        ImageSet(Folders(tmp_path / "farm"), PREPROCESS, {"cat": 0, "kitten": 1})


def test_data_w7_a_folder_that_may_not_be_listed_is_named(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        save(f"l/cat/{name}/0.png")
    listed = os.scandir

    def refusing(folder: Path) -> object:
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", refusing)  # root may list every folder
    with pytest.raises(UserError, match=r"l/cat/b cannot be listed \(Permission denied\)"):
        names(tmp_path / "l")


def test_data_w8_what_counts_and_what_is_counted_as_left_out(tmp_path: Path, save: Save) -> None:
    for name, kind in (
        ("0.png", "PNG"),
        ("1.jfif", "JPEG"),
        ("2.JPE", "JPEG"),
        ("3.avif", "AVIF"),
        ("4.jp2", "JPEG2000"),
    ):
        save(f"j/cat/{name}", format=kind)
    for name in ("@eaDir/0.png/SYNOPHOTO_THUMB_M.png", "__MACOSX/0.png", "#recycle/5.png", "._0.png"):
        save(f"j/cat/{name}")
    for name in ("a.txt", "b.txt", "c.mp4", "README", "d.heic", ".DS_Store", "Thumbs.db"):
        (tmp_path / "j/cat" / name).touch()
    images = ImageSet(Folders(tmp_path / "j"), PREPROCESS, {"cat": 0})
    assert [images.layout.name(place) for place in images.places] == [
        f"cat/{name}" for name in ("0.png", "1.jfif", "2.JPE", "3.avif", "4.jp2")
    ]
    assert [images[i][0].shape for i in range(5)] == [(3, 8, 8)] * 5
    assert told(images.layout.left_out) == (
        "4 leftovers of systems (#recycle 1, @eaDir 1, Thumbs.db 1, __MACOSX 1), 2 hidden entries, "
        "4 files are no image by their name (.txt 2, no suffix 1, .mp4 1), 1 picture is of a format that is not read (.heic 1)"
    )
    assert told(images.layout.left_out, LOSSES) == "1 picture is of a format that is not read (.heic 1)"


def test_data_w8_class_folders_are_not_those_of_a_network_disk(tmp_path: Path, save: Save) -> None:
    save("j/cat/0.png")
    (tmp_path / "j/@eaDir").mkdir()
    assert Folders(tmp_path / "j").empty == []


def test_data_t1_a_dangling_link_is_left_out_and_counted_by_the_check(tmp_path: Path, save: Save) -> None:
    save("broken/star/0.png")
    (tmp_path / "broken/star/zz.png").symlink_to("/nonexistent/x.png")
    (tmp_path / "broken/star/self.png").symlink_to("self.png")
    (tmp_path / "broken/star/a.txt").touch()
    sets = {"x": SetConfig("broken", "id")}
    said = check_suite(SuiteConfig(root=str(tmp_path), sets=sets, class_names=["star"]))
    assert said.complete
    assert "1 images" in said.text
    assert said.text.splitlines()[2] == "there and no image of a set:"
    assert {*said.text.splitlines()[3].removeprefix("  x: ").split(", ")} == {
        "1 file is no image by its name (.txt 1)",
        "2 dangling links",
    }


def test_data_t1_a_pipe_named_like_an_image_is_not_waited_for(tmp_path: Path, save: Save) -> None:
    save("l/cat/0.png")
    os.mkfifo(tmp_path / "l/cat/1.png")
    (tmp_path / "l/cat/2.png").symlink_to("1.png")
    assert names(tmp_path / "l") == ["cat/0.png"]
    assert left_out(tmp_path / "l") == "2 entries are named like images and are no files"


def test_data_t1_an_image_that_goes_after_the_check_is_a_sentence(tmp_path: Path, save: Save) -> None:
    file = save("l/cat/0.png")
    images = ImageSet(Folders(tmp_path / "l"), PREPROCESS, {"cat": 0})
    file.unlink()
    with pytest.raises(UserError, match=r"cat/0\.png"):
        images.fingerprint()
    with pytest.raises(UserError, match=r"cat/0\.png cannot be read as an image"):
        images[0]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["fog.npy", "labels.npy"], r"path: s/fog\.npy, with labels\.npy beside it"),
        (["train/nshards.txt", "train/0.tar"], r"no test/nshards\.txt, .* path: s/train reads"),
        (["0.tar"], r"where nshards\.txt beside them says"),
        (["a.txt"], r"holds no image \(.*\): 1 file is no image by its name \(\.txt 1\); check the set's path"),
    ],
)
def test_data_part4_a_folder_without_an_image_says_what_it_looks_like(
    tmp_path: Path, files: list[str], expected: str
) -> None:
    for name in files:
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).touch()
    with pytest.raises(UserError, match=expected):
        images_below(tmp_path / "s")
