"""The arrays of CIFAR-C, against numpy."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qatlab.core.errors import UserError
from qatlab.data.images.arrays import PER_SEVERITY, CorruptionArray
from qatlab.data.images.imageset import ImageSet
from qatlab.data.preprocess import Preprocess

PREPROCESS = Preprocess(32, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``fog.npy`` of the released shape, sparse on disk, and ``small.npy`` of another number of images."""
    folder = tmp_path_factory.mktemp("CIFAR-10-C")
    fog = np.lib.format.open_memmap(folder / "fog.npy", "w+", np.uint8, (5 * PER_SEVERITY, 32, 32, 3))
    fog[20_001] = np.arange(3072, dtype=np.uint16).reshape(32, 32, 3) % 251
    fog.flush()
    np.save(folder / "labels.npy", np.tile(np.arange(PER_SEVERITY, dtype=np.uint8) % 10, 5))
    return folder


def test_an_array_of_cifar_c_is_severity_by_severity(corrupted: Path) -> None:
    layout = CorruptionArray(corrupted / "fog.npy")
    items = ImageSet(layout, PREPROCESS, {n: n for n in range(10)}, pick="20000:30000")
    assert len(items) == 10_000
    assert {*items.groups} == {"3"}
    witness = np.load(corrupted / "fog.npy", mmap_mode="r")[20_001]
    image, label = items[1]
    assert label == 1
    assert torch.equal(image, torch.from_numpy(np.array(witness)).permute(2, 0, 1))


def test_an_array_travels_to_other_processes_without_its_pixels(corrupted: Path) -> None:
    items = ImageSet(CorruptionArray(corrupted / "fog.npy"), PREPROCESS, None)
    sent = pickle.dumps(items)
    assert len(sent) < 3_000_000  # of 153.6 MB
    assert torch.equal(pickle.loads(sent)[20_001][0], items[20_001][0])


def test_other_pixels_are_another_array(tmp_path: Path) -> None:
    def print_of(images: np.ndarray) -> str:
        np.save(tmp_path / "fog.npy", images)
        return ImageSet(CorruptionArray(tmp_path / "fog.npy"), PREPROCESS, None).fingerprint()

    np.save(tmp_path / "labels.npy", np.zeros(6, np.int64))
    images = np.zeros((6, 32, 32, 3), np.uint8)
    first = print_of(images)
    images[5, 31, 31, 2] = 1
    assert print_of(images) != first


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((6, 3, 32, 32), np.uint8), np.zeros(6), r"fog\.npy holds uint8 of shape \(6, 3, 32, 32\), expected"),
        (np.zeros((6, 32, 32, 3), np.float32), np.zeros(6), r"fog\.npy holds float32 of shape"),
        (
            np.zeros((6, 32, 32, 3), np.uint8),
            np.zeros(5),
            r"labels\.npy has the shape \(5,\), but fog\.npy \(6, 32, 32, 3\)",
        ),
        (np.zeros((6, 32, 32, 3), np.uint8), None, r"labels\.npy is not there"),
    ],
)
def test_mistakes_in_an_array(tmp_path: Path, images: np.ndarray, labels: np.ndarray | None, message: str) -> None:
    np.save(tmp_path / "fog.npy", images)
    if labels is not None:
        np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(UserError, match=message):
        CorruptionArray(tmp_path / "fog.npy")


def test_an_array_cut_short_is_told(tmp_path: Path) -> None:
    np.save(tmp_path / "fog.npy", np.zeros((6, 32, 32, 3), np.uint8))
    whole = (tmp_path / "fog.npy").read_bytes()
    (tmp_path / "fog.npy").write_bytes(whole[:5000])
    with pytest.raises(UserError, match=r"fog\.npy cannot be read as a numpy array"):
        CorruptionArray(tmp_path / "fog.npy")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, np.nan], r"labels\.npy labels image 1 with nan, expected a whole number \(1 such labels\)"),
        ([0.5, 1.5], r"labels\.npy labels image 0 with 0\.5, expected a whole number \(2 such labels\)"),
        ([0, np.inf], r"labels\.npy labels image 1 with inf"),
        (["cat", "dog"], r"labels\.npy holds <U3 \(first \['cat'\]\), expected a whole number for each image"),
        ([True, False], r"labels\.npy holds bool"),
        ([0, 1j], r"labels\.npy holds complex128"),
        (np.array([0, None]), r"labels\.npy cannot be read as a numpy array"),
    ],
)
def test_data_t4_labels_that_are_no_whole_numbers_are_told(tmp_path: Path, labels: Any, message: str) -> None:
    np.save(tmp_path / "fog.npy", np.zeros((2, 8, 8, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.array([0.0, 3.0]))
    assert CorruptionArray(tmp_path / "fog.npy").keys == [0, 3]
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(UserError, match=message):
        CorruptionArray(tmp_path / "fog.npy")
