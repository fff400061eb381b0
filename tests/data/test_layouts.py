"""Which reader is chosen for what lies on disk, and what a folder tree says of its images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from qatlab.core.errors import UserError
from qatlab.data.images.folders import Folders
from qatlab.data.images.imageset import ImageSet
from qatlab.data.images.layouts import READERS, open_layout, probe
from qatlab.data.preprocess import Preprocess

PREPROCESS = Preprocess(8, (0.5,) * 3, (0.5,) * 3)
TREES = {
    "folders": ["a/0.png"],
    "imglist": ["test.txt"],
    "manifest": ["test.csv"],
    "npy": ["fog.npy"],
    "webdataset": ["test/nshards.txt", "test/0.tar"],
    "cifar": ["cifar-10-batches-py/test_batch", "cifar-10-batches-py/batches.meta"],
    "tiny_imagenet": ["val_annotations.txt", "images/val_0.JPEG"],
}


@pytest.mark.parametrize("kind", TREES)
def test_a_layout_is_told_by_what_is_there(tmp_path: Path, kind: str) -> None:
    for name in TREES[kind]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    place = tmp_path / TREES[kind][0] if kind in ("imglist", "manifest", "npy") else tmp_path
    assert probe(place).kind == kind
    if kind == "webdataset":
        assert probe(tmp_path / "test").kind == kind
    if kind == "cifar":
        assert probe(tmp_path / "cifar-10-batches-py" / "test_batch").kind == kind


def test_every_kind_has_a_reader() -> None:
    assert set(READERS) == set(TREES)


def test_cifar_100_as_folders_is_no_pickle(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "apple").mkdir(parents=True)
    assert probe(tmp_path).kind == "folders"


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "data.h5").touch()
    with pytest.raises(UserError, match=r"data\.h5 is a file of no layout that is read"):
        probe(tmp_path / "data.h5")
    with pytest.raises(UserError, match=r"layout=imagefolder is unknown.*there are auto, folders"):
        open_layout(tmp_path, "imagefolder")
    with pytest.raises(UserError, match=r"cannot be read as layout webdataset: .*nshards\.txt"):
        open_layout(tmp_path, "webdataset")
    with pytest.raises(UserError, match="holds no image"):
        open_layout(tmp_path)


def grey(file: Path, value: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value,) * 3).save(file)


def test_trees_with_a_folder_images_are_the_trees_in_it(tmp_path: Path) -> None:
    """iNaturalist/images/*.jpg of MOS, dtd/images/<class>/*.jpg of DTD; GL-MCM's have no such folder."""
    for i in range(4):
        grey(tmp_path / "with" / "images" / f"{i // 2}" / f"{i}.png", i)
        grey(tmp_path / "without" / f"{i // 2}" / f"{i}.png", i)
    one, other = (ImageSet(Folders(tmp_path / name), PREPROCESS, {"0": 0, "1": 1}) for name in ("with", "without"))
    assert one.labels == [0, 0, 1, 1]
    assert one.fingerprint() == other.fingerprint()
    grey(tmp_path / "with" / "more" / "5.png", 5)
    assert Folders(tmp_path / "with").keys == ["images"] * 4 + ["more"]


def test_an_empty_class_folder_is_told(tmp_path: Path) -> None:
    grey(tmp_path / "cat" / "0.png", 1)
    (tmp_path / "dog").mkdir()
    index = {"cat": 0, "dog": 1}
    with pytest.raises(UserError, match=r"The class folder .*dog holds no image; put its images back"):
        ImageSet(Folders(tmp_path), PREPROCESS, index)
    assert len(ImageSet(Folders(tmp_path), PREPROCESS, index, exclude=["dog"])) == 1
    assert len(ImageSet(Folders(tmp_path), PREPROCESS, None)) == 1


def test_a_truncated_jpeg_is_named(tmp_path: Path, shared_data: Path) -> None:
    whole = next((shared_data / "imagenet1k" / "n01440764").iterdir()).read_bytes()
    (tmp_path / "tench").mkdir()
    (tmp_path / "tench" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    items = ImageSet(Folders(tmp_path), PREPROCESS, {"tench": 0})
    with pytest.raises(UserError, match=r"tench/0\.jpg cannot be read as an image: .*\. Replace it or delete it\."):
        items[0]


def test_the_original_is_neither_resized_nor_cropped(tmp_path: Path) -> None:
    grey(tmp_path / "a" / "0.png", 7)
    Image.new("RGB", (30, 20), (1, 2, 3)).save(tmp_path / "a" / "1.png")
    items = ImageSet(Folders(tmp_path), PREPROCESS, {"a": 0})
    assert items.raw(1).shape == (3, 20, 30)
    assert torch.equal(PREPROCESS.fit(items.raw(1)), items[1][0])
