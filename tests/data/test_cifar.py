"""CIFAR pickles, against torchvision's reader of the same files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms.functional import pil_to_tensor

from qatlab.core.errors import UserError
from qatlab.data.images.cifar import Cifar
from qatlab.data.images.classlists import load_class_list
from qatlab.data.images.imageset import ImageSet
from qatlab.data.images.labels import find_labels
from qatlab.data.preprocess import Preprocess, read_rgb

PREPROCESS = Preprocess(32, (0.5,) * 3, (0.5,) * 3)


def batch(n: int, seed: int, labels: str, classes: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
    return {"batch_label": "x", labels: rng.integers(0, classes, n).tolist(), "data": data, "filenames": ["x"] * n}


def dump(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content, protocol=2))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's folder of both, with random pixels."""
    root = tmp_path_factory.mktemp("cifar")
    ten, hundred = root / "cifar-10-batches-py", root / "cifar-100-python"
    for i in range(1, 6):
        dump(ten / f"data_batch_{i}", batch(3, i, "labels", 10))
    dump(ten / "test_batch", batch(20, 0, "labels", 10))
    dump(ten / "batches.meta", {"label_names": load_class_list("cifar10").names})
    dump(hundred / "train", batch(4, 7, "fine_labels", 100))
    dump(hundred / "test", batch(30, 8, "fine_labels", 100))
    dump(hundred / "meta", {"fine_label_names": load_class_list("cifar100").folders, "coarse_label_names": ["x"]})
    return root


@pytest.mark.parametrize(("reader", "name"), [(CIFAR10, "cifar10"), (CIFAR100, "cifar100")])
def test_pickles_hold_what_torchvision_reads(
    monkeypatch: pytest.MonkeyPatch, root: Path, reader: type[CIFAR10], name: str
) -> None:
    monkeypatch.setattr(reader, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    witness = reader(str(root), train=False)
    layout = Cifar(root / reader.base_folder)
    classes = load_class_list(name)
    rows = find_labels(layout, classes, "x")
    items = ImageSet(layout, PREPROCESS, rows)
    assert len(items) == len(witness)
    for i in range(len(witness)):
        picture, label = witness[i]
        assert torch.equal(items[i][0], pil_to_tensor(picture))
        assert items[i][1] == label
    assert layout.class_names == witness.classes
    assert layout.parts(0) == (witness.classes[witness[0][1]],)


def test_a_batch_is_found_in_torchvisions_folder_or_named(root: Path) -> None:
    assert Cifar(root).path == root / "cifar-10-batches-py" / "test_batch"
    assert len(Cifar(root / "cifar-10-batches-py" / "data_batch_2")) == 3
    assert len(Cifar(root / "cifar-100-python" / "train")) == 4


def test_the_pixels_are_the_fingerprint(root: Path, tmp_path: Path) -> None:
    def print_of(content: dict[str, Any]) -> str:
        dump(tmp_path / "test_batch", content)
        return ImageSet(Cifar(tmp_path), PREPROCESS, None).fingerprint()

    content = batch(20, 0, "labels", 10)
    first = print_of(content)
    assert first == ImageSet(Cifar(root), PREPROCESS, None).fingerprint()
    content["data"][19, -1] ^= 1
    assert print_of(content) != first


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run by a pickle",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"data": Evil()}), r"test_batch cannot be read as a CIFAR pickle: it asks for builtins\.print"),
        (b"", r"test_batch cannot be read as a CIFAR pickle"),
        (pickle.dumps([1]), "it holds a list, expected a dict"),
        (
            pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
            r"is no CIFAR batch: it holds data, labels",
        ),
        (pickle.dumps({"label_names": []}), "is no CIFAR batch: it holds label_names, expected data of shape"),
    ],
)
def test_what_is_no_batch_is_told_and_never_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Cifar(tmp_path)
    assert capsys.readouterr().out == ""


def test_real_cifar_as_a_pickle_is_the_folder(tmp_path: Path, shared_data: Path) -> None:
    files = sorted((shared_data / "cifar10" / "test").rglob("*.png"))[::200]
    names = load_class_list("cifar10").names
    pixels = np.stack([read_rgb(file.read_bytes()).numpy().reshape(-1) for file in files])
    dump(tmp_path / "test_batch", {"labels": [names.index(file.parent.name) for file in files], "data": pixels})
    items = ImageSet(Cifar(tmp_path), PREPROCESS, {n: n for n in range(10)})
    assert [label for _, label in (items[i] for i in range(len(items)))] == list(range(10))
    assert torch.equal(items[4][0], read_rgb(files[4].read_bytes()))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("ab", "has ab for its labels, expected a list of numbers"),
        (None, "has None for its labels"),
        ([0, "abc"], r"test_batch labels image 1 with 'abc', expected a number"),
        ([0, None], r"labels image 1 with 'None'"),
        ([0, 0.5], r"labels image 1 with '0\.5'"),
        ([0, True], r"labels image 1 with 'True'"),
    ],
)
def test_faults_t4_labels_that_are_no_numbers_are_told(tmp_path: Path, labels: Any, message: str) -> None:
    dump(tmp_path / "test_batch", {"data": np.zeros((2, 3072), np.uint8), "labels": np.array([0, 1])})
    assert Cifar(tmp_path).keys == [0, 1]
    dump(tmp_path / "test_batch", {"data": np.zeros((2, 3072), np.uint8), "labels": labels})
    with pytest.raises(UserError, match=message):
        Cifar(tmp_path)


@pytest.mark.parametrize("names", [None, [], "cat", [b"cat", 3], {"cat": 0}])
def test_faults_t4_names_that_are_no_list_of_text_are_told(tmp_path: Path, names: Any) -> None:
    dump(tmp_path / "test_batch", {"data": np.zeros((1, 3072), np.uint8), "labels": [0]})
    dump(tmp_path / "batches.meta", {"label_names": names})
    with pytest.raises(UserError, match=r"batches\.meta names its classes .*, expected a list of text"):
        Cifar(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02h\x05.",  # a memo that was never made: KeyError
        b"\x80\x02X\xff\xff\xff\x7fa.",  # a text of 2 GiB: EOFError or UnpicklingError
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 2^63: OverflowError or MemoryError
        b"\x80\x02" + b"(" * 10 + b"0.",  # a stack that underflows
        b"\x80\x02cnumpy\nndarray\n)R.",  # a call without arguments
    ],
)
def test_faults_t4_a_damaged_pickle_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(UserError, match=r"test_batch (cannot be read as a|is no) CIFAR pickle"):
        Cifar(tmp_path)
