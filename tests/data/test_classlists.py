"""Class lists: what each holds, how a folder or number finds its class, and how one list lies in another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qatlab.core.errors import UserError
from qatlab.data.images.classlists import class_list_names, load_class_list, named_classes, restricted, rows_in

IMAGENET = load_class_list("imagenet1k")
SIZES = {
    "cifar10": 10,
    "cifar100": 100,
    "counteranimal": 45,
    "dtd": 47,
    "dtd_clean": 43,
    "imagenet10": 10,
    "imagenet100": 100,
    "imagenet1k": 1000,
    "imagenet20": 20,
    "imagenet_a": 200,
    "imagenet_r": 200,
    "imagenet_x_id": 500,
    "imagenet_x_ood": 500,
    "sun397": 397,
    "tinyimagenet": 200,
}


def test_every_list_is_whole() -> None:
    assert class_list_names() == sorted(SIZES)
    for name, size in SIZES.items():
        classes = load_class_list(name)
        assert len(classes) == len(classes.names) == len(classes.folders) == len(set(classes.folders)) == size
        assert [classes.find(folder) for folder in classes.folders] == list(range(size))
        if classes.of is not None:
            assert len(set(classes.rows)) == size
            assert [classes.of.folders[row] for row in classes.rows] == classes.folders


def test_the_lists_are_the_released_ones(shared_data: Path) -> None:
    lists = shared_data / "lists"
    wnids = json.loads((lists / "imagenet_wnids.json").read_text())
    assert IMAGENET.folders == wnids == sorted(wnids)
    assert IMAGENET.names == json.loads((lists / "imagenet_classnames_openclip.json").read_text())
    for size in (10, 20, 100):
        released = (lists / f"mcm_imagenet{size}" / "class_list.txt").read_text().split()
        assert load_class_list(f"imagenet{size}").folders == sorted(released)
    for half in ("id", "ood"):
        released = (lists / "oodx_class_splits" / "imagenet" / "x" / f"{half}_data.txt").read_text().split()
        assert load_class_list(f"imagenet_x_{half}").rows == sorted(map(int, released))
    kept = {line.split("/")[0] for line in (lists / "vim_texture.txt").read_text().split()}
    assert set(load_class_list("dtd_clean").folders) == kept
    rows = [line.split(",") for line in (lists / "counteranimal_classes.csv").read_text().splitlines()[1:]]
    animals = load_class_list("counteranimal")
    assert animals.rows == [int(row[1]) for row in rows]
    assert animals.backgrounds == {"common": [row[4] for row in rows], "counter": [row[5] for row in rows]}
    assert load_class_list("cifar100").folders == (shared_data / "cifar100" / "classes.txt").read_text().split()


def test_the_subsets_of_200_classes_are_in_the_order_of_imagenet() -> None:
    a, r = (load_class_list(f"imagenet_{letter}") for letter in "ar")
    assert a.rows == sorted(a.rows)
    assert r.rows == sorted(r.rows)
    assert a.names[:3] == ["stingray", "goldfinch", "junco"]
    assert r.names[:3] == ["goldfish", "great white shark", "hammerhead shark"]


@pytest.mark.parametrize(
    ("name", "key", "label"),
    [
        ("imagenet1k", "n01440764", 0),
        ("imagenet1k", "Great_White-shark", 2),
        ("imagenet1k", "cock", 7),  # as torchvision and Keras call the rooster
        ("imagenet1k", "cardigan", 474),  # a name goes before another class's alias
        ("imagenet1k", "Cardigan", 264),  # as torchvision and Keras call the Welsh corgi
        ("imagenet_r", "n01443537", 0),
        ("imagenet_r", "n01440764", None),
        ("imagenet10", "antelope", 5),
        ("imagenet10", "n02422699", 5),
        ("counteranimal", "polar bear", 38),
        ("cifar100", "aquarium fish", 1),
        ("cifar100", "aquarium_fish", 1),
        ("dtd_clean", "bubbly", None),
    ],
)
def test_a_key_finds_its_class(name: str, key: str, label: int | None) -> None:
    assert load_class_list(name).find(key) == label


@pytest.mark.parametrize("key", ["missile", "unicorn", "n99999999", "999", "9 ostrich"])
def test_what_is_no_class_or_two_finds_none(key: str) -> None:
    with pytest.raises(KeyError):
        IMAGENET.find(key)


def test_data_w4_a_name_of_a_part_that_the_larger_list_gives_to_another_class_is_none() -> None:
    """ImageNet-20 calls the schooner (780) sailboat, as ImageNet-1k's names call the yawl (914)."""
    twenty = load_class_list("imagenet20")
    assert IMAGENET.find("sailboat") == 914
    assert twenty.meant("sailboat") == [780, 914]
    with pytest.raises(KeyError):
        twenty.find("sailboat")
    assert twenty.find("schooner") == twenty.rows.index(780)
    assert load_class_list("imagenet_r").meant("missile") == [657, 744]


def test_a_list_lies_in_its_reference() -> None:
    animals = load_class_list("counteranimal")
    assert rows_in(animals, IMAGENET, "x") == animals.rows
    assert rows_in(IMAGENET, IMAGENET, "x") == list(range(1000))
    # by folder and by name, where the reference is another list
    ten = load_class_list("imagenet10")
    assert [IMAGENET.folders[row] for row in rows_in(ten, named_classes(IMAGENET.folders), "x")] == ten.folders
    assert rows_in(load_class_list("cifar10"), named_classes(["lorry", *load_class_list("cifar10").names]), "x")[0] == 1
    # the schooner, ImageNet-20's sailboat, beside a sailboat that is another class
    schooner = restricted(load_class_list("imagenet20"), ["sailboat"], "x")
    turned = named_classes(IMAGENET.names[::-1])
    assert [999 - row for row in rows_in(schooner, turned, "x")] == [780]
    with pytest.raises(UserError, match=r"suite\.sets\.x: 9 of the 10 classes of cifar10 are not among .*imagenet10"):
        rows_in(load_class_list("cifar10"), ten, "suite.sets.x")


def test_an_unknown_list_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no class list 'imagenet-r' \(did you mean 'imagenet_r'\?\)"):
        load_class_list("imagenet-r")
