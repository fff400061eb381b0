"""A folder of images without captions, as calibration and training read it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qatlab.core.errors import UserError
from qatlab.data import ImageFolder
from qatlab.data.captions import uncaptioned
from qatlab.data.captions.batches import CaptionModule
from qatlab.data.preprocess import Preprocess

PREPROCESS = Preprocess(8, (0.5,) * 3, (0.5,) * 3)
CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images of each of three classes, each of one grey that no other has."""
    for i, name in enumerate(CLASSES):
        for j in range(10):
            file = tmp_path / "photos" / name / f"{j}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 10 * i + j, np.uint8)).save(file)
    return tmp_path / "photos"


def source(folder: Path) -> ImageFolder:
    return ImageFolder(str(folder), "photos")


def test_the_first_images_are_of_all_classes_and_always_the_same(folder: Path) -> None:
    found = source(folder).first(12, PREPROCESS)
    assert {key.split("/")[0] for key in found.keys} == set(CLASSES)
    assert len(set(found.keys)) == 12
    assert (found.captions, found.skipped) == ([], {})
    greys = [10 * CLASSES.index(key.split("/")[0]) + int(Path(key).stem) for key in found.keys]
    assert found.images.shape == (12, 3, 8, 8)
    assert found.images[:, 0, 0, 0].tolist() == greys
    again = source(folder).first(12, PREPROCESS, seed=7)
    assert again.keys == found.keys
    assert source(folder).first(5, PREPROCESS).keys == found.keys[:5]


def test_too_few_images_to_loop_over_are_told(folder: Path) -> None:
    held = sum(file.is_file() for file in folder.rglob("*"))
    source(folder).require(held)
    with pytest.raises(UserError, match=rf"fit\.unique_samples={held + 1}: data\.path=.* holds {held} images"):
        source(folder).require(held + 1)


def test_an_epoch_has_every_image_once_however_many_ranks_read_it(folder: Path) -> None:
    whole = [key for step in range(3) for key in source(folder).batch(step, 10, 0, 1, PREPROCESS, 3).keys]
    assert len(set(whole)) == 30
    shared = [source(folder).batch(1, 10, rank, 2, PREPROCESS, 3).keys for rank in (0, 1)]
    assert [key for pair in zip(*shared, strict=True) for key in pair] == whole[10:20]
    assert source(folder).batch(0, 10, 0, 1, PREPROCESS, 4).keys != whole[:10]


def test_an_image_that_cannot_be_read_is_replaced_and_counted(folder: Path) -> None:
    damaged = source(folder).first(3, PREPROCESS).keys[1]
    (folder / damaged).write_bytes(b"no image")
    found = source(folder).first(3, PREPROCESS)
    assert damaged not in found.keys
    assert found.skipped == {"corrupt image": 1}
    batches = [source(folder).batch(step, 10, 0, 1, PREPROCESS, 3) for step in range(3)]
    assert sum(batch.skipped.get("corrupt image", 0) for batch in batches) == 1
    assert all(damaged not in batch.keys for batch in batches)


def test_a_folder_of_damaged_images_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncaptioned, "PATIENCE", 5)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"5 images in a row below .*photos cannot be read"):
        source(folder).batch(0, 10, 0, 1, PREPROCESS, 0)


def test_the_fingerprint_goes_by_contents(folder: Path, tmp_path: Path) -> None:
    before = source(folder).fingerprint()
    assert source(folder.rename(tmp_path / "elsewhere")).fingerprint() == before
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(tmp_path / "elsewhere" / "ant" / "0.png")
    assert source(tmp_path / "elsewhere").fingerprint() != before


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (None, r"data\.path is missing"),
        ("nowhere", r"data\.path=nowhere is no folder"),
    ],
)
def test_a_path_that_is_no_folder_is_refused(path: str | None, told: str) -> None:
    with pytest.raises(UserError, match=told):
        ImageFolder(path, "photos").prepare()


def test_too_few_images_are_refused_with_the_options_that_ask_for_fewer(folder: Path) -> None:
    with pytest.raises(UserError, match=r"holds 30 readable images, 64 are needed .*quant\.calibration_images"):
        source(folder).first(64, PREPROCESS)


@pytest.mark.parametrize("unique", [None, 4])
def test_batches_of_a_training_have_no_captions(folder: Path, unique: int | None) -> None:
    def tokenize(texts: list[str]) -> torch.Tensor:
        raise AssertionError("there are no texts")

    module = CaptionModule(source(folder), PREPROCESS, tokenize, 4, unique, 0, 0, 2)
    first, _ = module.train_dataloader()
    assert first["images"].shape == (4, 3, 8, 8)
    assert not {"caption_ids", "tokens"} & first.keys()
