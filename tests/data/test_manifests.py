"""Lists of images: CSV manifests, OpenOOD's imglists and Tiny ImageNet's annotations."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, read_image

from qatlab.config import SetConfig, SuiteConfig
from qatlab.core.errors import UserError
from qatlab.data.images.classlists import load_class_list
from qatlab.data.images.imageset import ImageSet
from qatlab.data.images.imglists import ImgList
from qatlab.data.images.layouts import open_layout
from qatlab.data.images.manifests import Manifest, TinyAnnotations
from qatlab.data.images.walk import told
from qatlab.data.preprocess import Preprocess
from qatlab.suites.set_files import SetFiles

PREPROCESS = Preprocess(8, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """``images/a 0.png`` .. ``images/a 3.png``, each of its own grey."""
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 8), (i, i, i)).save(tmp_path / "images" / f"a {i}.png")
    return tmp_path


def write(folder: Path, name: str, text: str) -> Path:
    (folder / "lists").mkdir(exist_ok=True)
    file = folder / "lists" / name
    file.write_text(text)
    return file


def test_an_imglist_is_read_as_openood_writes_it(images: Path) -> None:
    text = "images/a 2.png 7\nimages/a 0.png -1\n\nimages/a 3.png {'label': 3, 'scene': [1, 2]}\n"
    listed = ImgList(write(images, "test.txt", text), images)
    assert listed.files == ["images/a 2.png", "images/a 0.png", "images/a 3.png"]
    assert listed.keys == [7, -1, 3]
    items = ImageSet(listed, PREPROCESS, None)
    assert [int(items[i][0][0, 0, 0]) for i in range(3)] == [2, 0, 3]
    assert items[0][0].shape == (3, 8, 8)
    assert items.raw(0).shape == (3, 8, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images/a 9.png 7\n", r"test\.txt names .*a 9\.png \(image 1 of the list\), which is not there"),
        ("images/a 0.png\n", r"test\.txt, line 1: 'images/a 0\.png' is no path followed by a label"),
        ("images/a 0.png {'lable': 2}\n", r"line 1: .* is no path followed by a label"),
        ("images/a 0.png {'label': __import__('os')}\n", r"line 1: .* is no path followed by a label"),
        ("\n", r"test\.txt lists no image"),
    ],
)
def test_mistakes_in_an_imglist(images: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImgList(write(images, "test.txt", text), images)


@pytest.mark.parametrize(
    ("name", "text", "keys", "groups"),
    [
        ("m.csv", "path,label\nimages/a 1.png,1\nimages/a 0.png,0\n", [1, 0], ["", ""]),
        ("m.csv", "path,label,name\nimages/a 1.png,n01440764,tench\n", ["n01440764"], [""]),
        (
            "m.csv",
            "path,class,group\nimages/a 1.png,cat,common\nimages/a 0.png,cat,counter\n",
            ["cat"] * 2,
            ["common", "counter"],
        ),
        ("m.tsv", "class\tpath\ndog\timages/a 1.png\n", ["dog"], [""]),
        ("m.csv", "\ufeffpath\nimages/a 1.png\n", [None], [""]),
    ],
)
def test_a_manifest_says_class_and_group(
    images: Path, name: str, text: str, keys: list[str | int | None], groups: list[str]
) -> None:
    read = Manifest(write(images, name, text), images)
    assert (read.keys, read.groups) == (keys, groups)
    assert int(read.pixels(0)[0, 0, 0]) == 1
    (images / name).write_text(text)
    assert Manifest(images / name).files == read.files  # its own folder is where paths start from


def test_mistakes_in_a_manifest(images: Path) -> None:
    with pytest.raises(UserError, match=r"m\.csv has the columns pfad, label and no 'path'"):
        Manifest(write(images, "m.csv", "pfad,label\nx,1\n"))
    with pytest.raises(UserError, match=r"m\.csv names .*b\.png \(image 1 of the list\), which is not there"):
        Manifest(write(images, "m.csv", "path,label\nb.png,1\n"), images)
    with pytest.raises(UserError, match="lists no image"):
        Manifest(write(images, "m.csv", "path,label\n"), images)


def test_the_order_and_the_size_of_listed_images_are_their_fingerprint(images: Path) -> None:
    def prints(text: str) -> tuple[str, str]:
        listed = ImgList(write(images, "test.txt", text), images)
        items = ImageSet(listed, PREPROCESS, {key: key for key in listed.keys})
        return items.fingerprint(), items.content()

    one, other = prints("images/a 0.png 0\nimages/a 1.png 1\n"), prints("images/a 0.png 1\nimages/a 1.png 0\n")
    assert one[0] != other[0]
    assert one[1] == other[1]
    assert prints("images/a 1.png 1\nimages/a 0.png 0\n")[1] != one[1]


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "images/../../secret.png"])
def test_faults_s8_a_list_opens_nothing_outside_its_folder(images: Path, path: str) -> None:
    Image.new("RGB", (8, 8)).save(images / "secret.png")
    folder = images / "images"
    listing, csv = (
        write(images, "test.txt", f"a 0.png 1\n{path} 2\n"),
        write(images, "m.csv", f"path,label\n{path},2\n"),
    )
    for opened in (lambda: ImgList(listing, folder), lambda: Manifest(csv, folder)):
        with pytest.raises(UserError, match=r"which is not below .*images: .*outside: true"):
            opened()


def test_faults_s8_unless_the_user_says_so(images: Path) -> None:
    Image.new("RGB", (8, 8), (7, 7, 7)).save(images / "secret.png")
    (images / "images/x").mkdir()
    listing = write(images, "test.txt", f"../secret.png 1\n{images}/images/a 2.png 2\nx/../a 1.png 0\n")
    layout = open_layout(listing, "auto", images / "images", outside=True)
    assert [int(layout.pixels(place)[0, 0, 0]) for place in range(2)] == [7, 2]
    sets = {"x": SetConfig("lists/test.txt", "id", folder="images", outside=True)}
    config = SuiteConfig(root=str(images), sets=sets, class_names=["a", "b", "c"])
    assert SetFiles(config).layout("x").files == layout.files
    inside = ImgList(write(images, "in.txt", "x/../a 1.png 0\n"), images / "images")  # it leads back in
    assert inside.name(0) == "x/../a 1.png"


def test_faults_s8_what_a_list_names_is_a_file(images: Path) -> None:
    os.mkfifo(images / "pipe.png")
    for name in ("pipe.png", "images"):
        with pytest.raises(UserError, match="is no regular file"):
            ImgList(write(images, "test.txt", f"{name} 1\n"), images)


def test_data_w8_an_image_listed_twice_counts_once_and_two_labels_are_an_error(images: Path) -> None:
    text = "images/a 1.png 1\nimages/a 0.png 0\nimages/./a 1.png 1\n"
    listed = ImgList(write(images, "test.txt", text), images)
    assert (listed.files, listed.keys) == (["images/a 1.png", "images/a 0.png"], [1, 0])
    assert told(listed.left_out) == "1 image is listed again"
    with pytest.raises(UserError, match=r"lists images/a 0\.png twice, as 0 and as 1: an image has one label"):
        ImgList(write(images, "test.txt", "images/a 0.png 0\nimages/a 0.png 1\n"), images)
    manifest = "path,class,group\nimages/a 1.png,cat,common\nimages/a 1.png,cat,counter\n"
    with pytest.raises(UserError, match="as cat common and as cat counter"):
        Manifest(write(images, "m.csv", manifest), images)


def test_tiny_imagenet_as_released(tmp_path: Path, shared_data: Path) -> None:
    rows = [line.split(",") for line in (shared_data / "tinyimagenet" / "labels.csv").read_text().splitlines()[1:40]]
    (tmp_path / "images").mkdir()
    lines = []
    for path, wnid, source in rows:
        name = Path(source).name
        (tmp_path / "images" / name).write_bytes((shared_data / "tinyimagenet" / path).read_bytes())
        lines.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
    (tmp_path / "val_annotations.txt").write_text("".join(lines))
    read = TinyAnnotations(tmp_path)
    assert read.keys == [wnid for _, wnid, _ in rows]
    folders = load_class_list("tinyimagenet").folders
    labels = {key: folders.index(key) for key in read.keys}
    items = ImageSet(read, PREPROCESS, labels)
    assert {*folders} == {folder.name for folder in (shared_data / "tinyimagenet").iterdir() if folder.is_dir()}
    assert torch.equal(items.raw(3), read_image(str(shared_data / "tinyimagenet" / rows[3][0]), mode=ImageReadMode.RGB))


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("path, label\nimages/a 0.png, 3\n", [3]),
        ("path,label\r\n images/a 0.png , 3 \r\n\r\n", [3]),
        ("path,label\nimages/a 0.png,3.0\nimages/a 1.png,5.\n", [3, 5]),  # as a table program writes numbers
        ("path,label\nimages/a 0.png,3\nimages/a 1.png,\n", [3, None]),
        ('path,label\n"images/a 0.png","great, white"\n', ["great, white"]),
    ],
)
def test_data_part4_a_manifest_is_read_as_it_is_meant(images: Path, text: str, keys: list[str | int | None]) -> None:
    for encoding in ("utf-8", "utf-16"):
        file = write(images, "m.csv", "")
        file.write_bytes(text.encode(encoding))
        assert Manifest(file, images).keys == keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path;label\nx;3\n", r"m\.csv separates its columns by ';', expected ','"),
        ("path\tlabel\nx\t3\n", r"m\.csv separates its columns by '\\t', expected ','"),
        ("path,label\nx,3.5\ny,4\n", r"m\.csv has the label 3\.5, expected whole numbers \(from 0 on\) or names"),
        ("path,label\nx,nan\ny,4\n", r"m\.csv has the label nan, expected whole numbers"),
        ("path,label\nx\n", r"m\.csv, line 2, has 1 fields, expected a path and 2 in all"),
        ("path,label\n\na,b.png,3\n", r"m\.csv, line 3, has 3 fields, .*put a path with a ',' in it into quotes"),
        ("path,label\n,3\n", r"m\.csv, line 2, has 2 fields, expected a path"),
        ("path,label\nx,\0\n", r"m\.csv, line 2, holds a NUL"),
        (
            "path,label\nx," + "3" * 200_000 + "\n",
            r"m\.csv, line 2, is no line of a table: field larger than field limit",
        ),
        ("path,label,path\n", r"m\.csv has the column 'path' twice"),
        ("", r"m\.csv lists no image"),
        ("path,label\nimages/a 0.png,1\nimages/a 0.png,2\n", r"m\.csv lists images/a 0\.png twice, as 1 and as 2"),
    ],
)
def test_faults_t4_mistakes_in_a_manifest_are_told_with_their_line(images: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Manifest(write(images, "m.csv", text), images)


def test_data_part4_an_image_without_a_label_is_no_matter_of_folders(images: Path) -> None:
    listed = Manifest(write(images, "m.csv", "path,label\nimages/a 0.png,3\nimages/a 1.png,\n"), images)
    with pytest.raises(
        UserError, match=r"m\.csv gives images/a 1\.png \(image 2 of the list\) no label, yet its set needs one"
    ):
        ImageSet(listed, PREPROCESS, {3: 3})


def test_data_t2_lists_in_other_encodings(images: Path) -> None:
    file = write(images, "test.txt", "")
    file.write_bytes("images/a 0.png 3\n".encode("utf-16"))
    assert ImgList(file, images).keys == [3]
    file.write_bytes(b"images/a 0.png 3\nimages/caf\xe9.png 3\n")
    with pytest.raises(UserError, match=r"test\.txt, line 2: the byte 0xe9 is no UTF-8"):
        ImgList(file, images)
    file.write_text("images/a 0.png {'label': " + "[" * 10_000)
    with pytest.raises(UserError, match=r"line 1: .* is no path followed by a label"):
        ImgList(file, images)


@pytest.mark.parametrize("line", ["a.png n01443537", "a.png\t", "\tn01443537"])
def test_faults_t4_annotations_without_a_tab_are_told(tmp_path: Path, line: str) -> None:
    (tmp_path / "val_annotations.txt").write_text(f"\n{line}\n")
    with pytest.raises(
        UserError, match=r"val_annotations\.txt, line 2: .* is no image and WordNet id with a tab between them"
    ):
        TinyAnnotations(tmp_path)
