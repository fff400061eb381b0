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

from qatlab.core.errors import UserError
from qatlab.core.limits import use_limits
from qatlab.data.images.imageset import ImageSet
from qatlab.data.images.webdatasets import WebDatasetFolder
from qatlab.data.preprocess import Preprocess, read_rgb

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
    first = ImageSet(WebDatasetFolder(folder), PREPROCESS, ROWS).fingerprint()
    with webdataset.TarWriter(str(folder / "test" / "1.tar")) as tar:
        tar.write({"__key__": "s0000004", "png": encoded(4, "PNG") + b"more", "cls": 1})
    assert ImageSet(WebDatasetFolder(folder), PREPROCESS, ROWS).fingerprint() != first


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


def test_data_d1_a_sample_that_stands_twice_is_told_properly(folder: Path) -> None:
    with webdataset.TarWriter(str(folder / "test" / "1.tar")) as tar:
        for key in ("s4", "s5", "s5"):
            tar.write({"__key__": key, "png": encoded(4, "PNG"), "cls": 1})
    with pytest.raises(UserError, match=r"1\.tar holds the sample s5 more than once .*: it was written to again"):
        WebDatasetFolder(folder)


def test_data_part4_tars_joined_by_cat_are_damage(folder: Path) -> None:
    tar = folder / "test" / "1.tar"
    tar.write_bytes((folder / "test" / "0.tar").read_bytes() + tar.read_bytes())
    with pytest.raises(UserError, match=r"1\.tar is damaged \(a second archive follows its end"):
        WebDatasetFolder(folder)


def test_faults_s7_a_part_above_the_limit_is_an_image_that_cannot_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = ImageSet(WebDatasetFolder(folder), PREPROCESS, ROWS)
    monkeypatch.setenv("QATLAB_LIMITS", "{}")
    use_limits(pixels=100, member_bytes=20, names=1)
    with pytest.raises(UserError, match=r"cannot be read as an image: \d+ bytes are above limits\.member_bytes=20"):
        items[0]
    use_limits(pixels=100, member_bytes=0, names=1)
    with pytest.raises(UserError, match=r"cls is no number of a class: \d+ bytes are above"):
        WebDatasetFolder(folder)


def test_an_image_cut_short_is_named(folder: Path) -> None:
    with webdataset.TarWriter(str(folder / "test" / "1.tar"), encoder=False) as tar:
        tar.write({"__key__": "s4", "png": encoded(4, "PNG")[:45], "cls": b"1"})
    items = ImageSet(WebDatasetFolder(folder), PREPROCESS, ROWS)
    with pytest.raises(UserError, match=r"test/1\.tar:s4 cannot be read as an image"):
        items[4]


@pytest.mark.parametrize("count", ["0", "-1", "\u00b2", "2.0", "", "9" * 40])
def test_faults_t4_a_count_of_tars_that_is_none_is_told(folder: Path, count: str) -> None:
    (folder / "test" / "nshards.txt").write_text(count, encoding="utf-8")
    with pytest.raises(UserError, match=f"nshards.txt says '{count}', expected the number of tars"):
        WebDatasetFolder(folder)


def test_data_t2_what_lies_beside_the_tars_is_read_in_any_marked_encoding(folder: Path) -> None:
    (folder / "test" / "nshards.txt").write_bytes("2\r\n".encode("utf-16"))
    (folder / "classnames.txt").write_bytes("tench\r\n\r\nhen\r\n".encode("utf-8-sig"))
    (folder / "zeroshot_classification_templates.txt").write_bytes("a {c}\n\nthe {c}\n".encode("utf-8-sig"))
    layout = WebDatasetFolder(folder)
    assert layout.class_names == ["tench", "", "hen"]
    assert layout.templates == ["a {}", "the {}"]
    (folder / "classnames.txt").write_bytes(b"tench\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"classnames\.txt, line 2: the byte 0xe9"):
        WebDatasetFolder(folder)


def test_data_part4_tars_without_a_sample_are_told(folder: Path) -> None:
    for tar in (folder / "test").glob("*.tar"):
        tar.write_bytes(bytes(10_240))
    with pytest.raises(UserError, match=r"test holds no image; check that all was downloaded and unpacked"):
        ImageSet(WebDatasetFolder(folder), PREPROCESS, ROWS)
