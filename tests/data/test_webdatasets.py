"""CLIP_benchmark's WebDatasets, written and read by webdataset itself."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from qatlab.data.sets import ImageSet
from qatlab.data.transforms import Preprocess, read_rgb
from qatlab.data.webdatasets import WebDatasetFolder
from qatlab.errors import UserError

PREPROCESS = Preprocess(8, (0.5,) * 3, (0.5,) * 3)
ROWS = {0: 0, 1: 1, 2: 2}


def encoded(value: int, form: str) -> bytes:
    picture = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(
        picture, form, **({"lossless": True} if form == "WEBP" else {})
    )
    return picture.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tars of four and three samples, webp and png, classes 0, 1, 2, 0, ..."""
    (tmp_path / "test").mkdir()
    for shard, samples in ((0, range(4)), (1, range(4, 7))):
        with webdataset.TarWriter(str(tmp_path / "test" / f"{shard}.tar")) as tar:
            for i in samples:
                image = {"webp": encoded(i, "WEBP")} if i % 2 else {"png": encoded(i, "PNG")}
                tar.write({"__key__": f"s{i:07d}", **image, "cls": i % 3})
    (tmp_path / "test" / "nshards.txt").write_text("2\n")
    (tmp_path / "classnames.txt").write_text("tench\ngreat white shark\nhen\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nthe {c}\n")
    return tmp_path


def test_the_samples_are_those_that_webdataset_reads(folder: Path) -> None:
    layout = WebDatasetFolder(folder)
    urls = [str(folder / "test" / f"{shard}.tar") for shard in range(2)]
    witness = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [layout.name(i).split(":")[1] for i in range(len(layout))] == [sample["__key__"] for sample in witness]
    assert layout.keys == [int(sample["cls"]) for sample in witness]
    for i, sample in enumerate(witness):
        data = sample.get("webp") or sample["png"]
        assert torch.equal(layout.pixels(i), read_rgb(data))
    assert layout.class_names == ["tench", "great white shark", "hen"]
    assert layout.templates == ["a photo of a {}.", "the {}"]


def test_the_split_folder_does_too_and_other_processes_read_it(folder: Path) -> None:
    items = ImageSet(WebDatasetFolder(folder / "test"), PREPROCESS, ROWS, exclude=["hen"], pick="1:")
    alone = [(int(image[0, 0, 0]), label) for image, label in (items[i] for i in range(len(items)))]
    assert alone == [(1, 1), (3, 0), (4, 1), (6, 0)]
    helped = DataLoader(items, batch_size=2, num_workers=1)
    assert [
        (int(i[0, 0, 0]), int(y)) for images, labels in helped for i, y in zip(images, labels, strict=True)
    ] == alone
    assert torch.equal(pickle.loads(pickle.dumps(items))[3][0], items[3][0])


def test_another_image_is_another_set(folder: Path) -> None:
    first = ImageSet(WebDatasetFolder(folder), PREPROCESS, ROWS)
    with webdataset.TarWriter(str(folder / "test" / "1.tar")) as tar:
        tar.write({"__key__": "s0000004", "png": encoded(4, "PNG") + b"more", "cls": 1})
    assert ImageSet(WebDatasetFolder(folder), PREPROCESS, ROWS).fingerprint() != first.fingerprint()


def test_mistakes(folder: Path) -> None:
    tar = folder / "test" / "1.tar"
    tar.write_bytes(tar.read_bytes()[:540])
    with pytest.raises(UserError, match=r"1\.tar is damaged \(.+\); download it again"):
        WebDatasetFolder(folder)
    tar.unlink()
    with pytest.raises(UserError, match=r"1\.tar is not there, and .*nshards\.txt counts it"):
        WebDatasetFolder(folder)
    for content, message in (
        ({"txt": "x"}, "the sample s1 has txt, expected an image"),
        ({"png": encoded(1, "PNG")}, "the sample s1 has png, expected an image .* and cls"),
        ({"png": encoded(1, "PNG"), "cls": b"cat"}, "cls says 'b'cat'', expected the number of a class"),
    ):
        with webdataset.TarWriter(str(tar), encoder="txt" in content) as writer:
            writer.write({"__key__": "s1", **content})
        with pytest.raises(UserError, match=message):
            WebDatasetFolder(folder)
    (folder / "test" / "nshards.txt").write_text("two")
    with pytest.raises(UserError, match="says 'two', expected the number of tars"):
        WebDatasetFolder(folder)


def test_an_image_cut_short_is_named(folder: Path) -> None:
    with webdataset.TarWriter(str(folder / "test" / "1.tar"), encoder=False) as tar:
        tar.write({"__key__": "s4", "png": encoded(4, "PNG")[:45], "cls": b"1"})
    items = ImageSet(WebDatasetFolder(folder), PREPROCESS, ROWS)
    with pytest.raises(UserError, match=r"test/1\.tar:s4 cannot be read as an image"):
        items[4]
