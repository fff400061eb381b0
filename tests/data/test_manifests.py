"""Lists of images: CSV manifests, OpenOOD's imglists and Tiny ImageNet's annotations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, read_image

from qatlab.data.classlists import load_class_list
from qatlab.data.imglists import ImgList
from qatlab.data.manifests import Manifest, TinyAnnotations
from qatlab.data.sets import ImageSet
from qatlab.data.transforms import Preprocess
from qatlab.errors import UserError

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
