"""Which class an image is: by names first, by numbers only where their list is certain, never against a word that disagrees."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torchvision
from PIL import Image

from qatlab.config import SetConfig, SuiteConfig
from qatlab.core.errors import UserError
from qatlab.data.images.classlists import load_class_list, named_classes
from qatlab.data.images.folders import class_index_for
from qatlab.data.images.imageset import Layout
from qatlab.data.images.labels import find_labels
from qatlab.data.preprocess import Preprocess
from qatlab.suites.set_files import SetFiles

PREPROCESS = Preprocess(8, (0.5,) * 3, (0.5,) * 3)
IMAGENET, R, TEN = (load_class_list(name) for name in ("imagenet1k", "imagenet_r", "cifar10"))
# torchvision's and Keras's names of two classes each: no folder called so can be told.
SHARED = {"crane", "maillot", "maillot tank suit", "missile", "sunglasses"}

Labels = Callable[..., dict[str, str]]


@pytest.fixture
def img(tmp_path: Path) -> Callable[[str], None]:
    def write(name: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)

    return write


@pytest.fixture
def labels(tmp_path: Path) -> Labels:
    """{image: name of its class} of a set of the suite."""

    def read(path: str, role: str = "id", class_names: Any = None, **options: Any) -> dict[str, str]:
        sets = {"x": SetConfig(path, role, **options)}
        files = SetFiles(SuiteConfig(root=str(tmp_path), sets=sets, class_names=class_names))
        head = files.head("x", None)
        images = files.open("x", head, PREPROCESS).images
        return {name: head.names[label] for name, label in zip(images.names, images.labels, strict=True)}

    return read


def listed(*keys: Any, named: list[str] | None = None, paths: list[str] | None = None, kind: str = "imglist") -> Layout:
    """Images with these keys, in no file."""

    class Told(Layout):
        def name(self, place: int) -> str:
            return paths[place] if paths else f"{keys[place]}/{place}.png" if kind == "folders" else f"{place}.png"

    layout = Told()
    layout.kind = kind  # type: ignore[misc]
    layout.keys, layout.groups, layout.class_names, layout.path = keys, [""] * len(keys), named, Path("x")
    return layout


# -- numbers of a list -----------------------------------------------------------------------------------------------


def test_data_w2_numbers_count_in_the_list_that_the_folders_say(img: Any, labels: Labels, tmp_path: Path) -> None:
    """OpenOOD's ImageNet-200: 0 to 199 in a part of ImageNet-1k, its paths by WordNet id."""
    for label, wnid in enumerate(R.folders):
        img(f"im/{wnid}/{label}.png")
    own = "".join(f"{wnid}/{label}.png {label}\n" for label, wnid in enumerate(R.folders))
    (tmp_path / "own.txt").write_text(own)
    found = labels("own.txt", folder="im", classes="imagenet_r")
    assert len(found) == 200
    assert found["n01484850/1.png"] == "great white shark"
    assert found == {f"{wnid}/{label}.png": R.names[label] for label, wnid in enumerate(R.folders)}
    larger = "".join(f"{wnid}/{label}.png {R.rows[label]}\n" for label, wnid in enumerate(R.folders))
    (tmp_path / "larger.txt").write_text(larger)
    assert labels("larger.txt", folder="im", classes="imagenet_r") == found


def test_data_w2_numbers_that_no_list_agrees_with_are_refused(img: Any, labels: Labels, tmp_path: Path) -> None:
    for folder in ("n01484850", "n01494475"):
        img(f"{folder}/0.png")
    (tmp_path / "x.txt").write_text("n01484850/0.png 7\nn01494475/0.png 8\n")
    with pytest.raises(
        UserError, match=r"label 7 is '.*' in imagenet_r and 'rooster' in imagenet1k, yet the path .* says 'great"
    ):
        labels("x.txt", classes="imagenet_r")
    with pytest.raises(
        UserError, match=r"label 7 is 'rooster' in imagenet1k, yet the path n01484850/0.png says 'great white"
    ):
        labels("x.txt", classes="imagenet1k")
    assert labels("x.txt", classes="imagenet1k", numbers="own") == {
        "n01484850/0.png": "rooster",
        "n01494475/0.png": "hen",
    }


def test_data_w2_numbers_that_may_be_of_two_lists_are_asked_for(img: Any, labels: Labels, tmp_path: Path) -> None:
    for label in range(10):
        img(f"{label}.png")
    (tmp_path / "m.csv").write_text("path,label\n" + "".join(f"{label}.png,{label}\n" for label in range(10)))
    with pytest.raises(
        UserError, match=r"labels 0 to 9 may count in the 10 classes of imagenet10 or in the 1000 of imagenet1k"
    ):
        labels("m.csv", classes="imagenet10")
    ten = load_class_list("imagenet10")
    assert [*labels("m.csv", classes="imagenet10", numbers="own").values()] == ten.names
    with pytest.raises(UserError, match=r"None of the 10 images of .* is of the set"):
        labels("m.csv", classes="imagenet10", numbers="larger")


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ([1, 2, 999], None),  # 999 is beyond imagenet_r and is no class of it
        ([2, 988], {2: 1, 988: 199}),  # rows of it all, 988 beyond it
        (range(1000), {row: label for label, row in enumerate(R.rows)}),  # the whole of the larger list
    ],
)
def test_data_w2_numbers_beyond_a_part_are_the_larger_lists_where_all_are_meant(
    keys: Any, found: dict[int, int] | None
) -> None:
    if found is None:
        with pytest.raises(UserError, match=r"labels 1 to 999 may count in"):
            find_labels(listed(*keys), R, "x")
    else:
        read = find_labels(listed(*keys), R, "x")
        assert {key: label for key, label in read.items() if label is not None} == found


def test_data_w2_lists_that_agree_need_no_word() -> None:
    """The first three classes of DTD are the first three of its clean part."""
    assert find_labels(listed(0, 1, 2), load_class_list("dtd_clean"), "x") == {0: 0, 1: 1, 2: 2}
    with pytest.raises(UserError, match=r"\(3 is 'bumpy' or 'bubbly'\)"):
        find_labels(listed(0, 1, 2, 3), load_class_list("dtd_clean"), "x")


def test_data_w2_a_folder_that_is_one_class_for_all_says_nothing() -> None:
    hundred = load_class_list("cifar100")
    assert find_labels(listed(0, 5, paths=["train/a.png", "train/b.png"]), hundred, "x") == {0: 0, 5: 5}
    with pytest.raises(UserError, match=r"label 5 is 'bed' in cifar100, yet the path train/b\.png says 'train'"):
        find_labels(listed(0, 5, paths=["train/apple/a.png", "train/b.png"]), hundred, "x")


def test_data_w2_a_wordnet_id_in_the_file_name_says_the_class() -> None:
    paths = [f"val/ILSVRC2012_val_0000000{i}_{R.folders[i]}.JPEG" for i in range(3)]
    assert find_labels(listed(0, 1, 2, paths=paths), R, "x") == {0: 0, 1: 1, 2: 2}


def test_numbers_go_by_the_names_that_a_dataset_gives_them() -> None:
    backwards = TEN.names[::-1]
    assert find_labels(listed(*range(10), named=backwards), TEN, "x") == {number: 9 - number for number in range(10)}
    # two names twice, and one of another spelling: by position, in a subset by that of the whole list
    spelled = ["tenche", *IMAGENET.names[1:]]
    assert find_labels(listed(0, 657, 999, named=spelled), IMAGENET, "x") == {0: 0, 657: 657, 999: 999}
    assert find_labels(listed(0, 1, 744, named=spelled), R, "x") == {0: None, 1: 0, 744: None}
    # ImageNet-20 calls the schooner (780) sailboat, and the whole list the yawl (914)
    assert find_labels(listed(780, 914, named=IMAGENET.names), load_class_list("imagenet20"), "x") == {
        780: 15,
        914: None,
    }
    # a name that is known goes before its position
    turned = ["tenche", IMAGENET.names[2], IMAGENET.names[1], *IMAGENET.names[3:]]
    assert find_labels(listed(0, 1, 2, named=turned), IMAGENET, "x") == {0: 0, 1: 2, 2: 1}
    with pytest.raises(UserError, match=r"x names a class 'lorry' .*cifar10 does not have"):
        find_labels(listed(0, named=["lorry", "car"]), TEN, "x")
    with pytest.raises(UserError, match=r"classes 0 \('n01440764'\) and 1 \('tench'\) are both 'tench'"):
        find_labels(listed(0, named=["n01440764", "tench"]), IMAGENET, "x")
    with pytest.raises(UserError, match=r"label 10, outside the 10 class names that come with it"):
        find_labels(listed(10, named=backwards), TEN, "x")


def test_labels_and_folders_without_a_class_are_told() -> None:
    with pytest.raises(UserError, match=r"x has the label 10, outside the 10 classes of cifar10"):
        find_labels(listed(3, 10), TEN, "x")
    with pytest.raises(UserError, match=r"label -1, outside .*-1 stands for no label"):
        find_labels(listed(3, -1), TEN, "x")
    with pytest.raises(UserError, match=r"1 of 2 class folders under x have no .* in cifar10: 'catt' \(did you"):
        find_labels(listed("dog", "catt", kind="folders"), TEN, "x")
    with pytest.raises(
        UserError, match=r"numbers=ovn is unknown \(did you mean 'own'\?\); there are auto, own, larger"
    ):
        find_labels(listed(3), TEN, "x", numbers="ovn")
    with pytest.raises(UserError, match=r"numbers=larger, but cifar10 is a part of no larger list"):
        find_labels(listed(3), TEN, "x", numbers="larger")


# -- folders that are numbers ----------------------------------------------------------------------------------------


def test_data_w3_folders_of_severities_are_no_classes(img: Any, labels: Labels) -> None:
    for severity in (1, 2, 3):
        img(f"fog/{severity}/n01530575/{severity}.png")
    with pytest.raises(
        UserError, match=r"bare numbers, and below them .*1/n01530575/1\.png.*Did the path forget a folder\?"
    ):
        labels("fog", classes="imagenet1k")
    assert labels("fog/1", classes="imagenet1k") == {"n01530575/1.png": "brambling"}


@pytest.mark.parametrize("options", [{"classes": "cifar10"}, {"class_names": ["cat", "automobile"]}])
def test_data_w3_folders_of_folds_are_no_classes(img: Any, labels: Labels, options: dict[str, Any]) -> None:
    """A class list and class names agree on it."""
    for fold in (0, 1):
        for name in ("cat", "automobile"):
            img(f"{fold}/{name}/0.png")
    with pytest.raises(UserError, match="bare numbers, and below them lie folders that are classes"):
        labels(".", **options)


def test_data_w3_numbers_are_classes_where_each_is_there(img: Any, labels: Labels, tmp_path: Path) -> None:
    for number in range(10):
        img(f"all/{number}/0.png")
        img(f"some/{number + 1}/0.png")
    names = [f"digit {number}" for number in range(10)]
    assert labels("all", class_names=names) == {f"{n}/0.png": names[n] for n in range(10)}
    assert [*labels("all", classes="cifar10").values()] == TEN.names
    assert len(labels("all", classes="cifar10", exclude=["3"])) == 9
    img("all/10/dog/0.png")
    assert [*labels("all", classes="cifar10", exclude=["10"]).values()] == TEN.names
    shutil.rmtree(tmp_path / "all/10")
    for options in ({"classes": "cifar10"}, {"class_names": names}):
        with pytest.raises(
            UserError, match=r"10 of 10 classes are bare numbers \(1, 10, 2\), which label classes only where"
        ):
            labels("some", **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"labels 0 to 9 may count in the 10 classes of imagenet10 or"):
        labels("all", classes="imagenet10")
    assert [*labels("all", classes="imagenet10", numbers="own").values()] == load_class_list("imagenet10").names
    img("mixed/0/0.png")
    img("mixed/dog/0.png")
    with pytest.raises(UserError, match=r"1 of 2 classes are bare numbers \(0\)"):
        labels("mixed", classes="cifar10")


def test_data_w3_folders_below_numbers_may_say_the_same(img: Any, labels: Labels) -> None:
    for label in (0, 1):
        img(f"{label}/{R.folders[label]}/0.png")
    assert [*labels(".", classes="imagenet_r").values()] == ["goldfish", "great white shark"]
    animals = load_class_list("counteranimal")
    rows = {str(row): label for label, row in enumerate(animals.rows)}
    assert find_labels(listed(*rows, kind="folders"), animals, "x") == rows


# -- numbers before names, and names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["1_kitty", "1-cat-food", "2 puppies", "7. zebra"])
def test_data_w4_a_number_before_an_unknown_name_is_no_label(img: Any, labels: Labels, folder: str) -> None:
    img(f"{folder}/0.png")
    for options in ({"classes": "cifar10"}, {"class_names": TEN.names}):
        with pytest.raises(UserError, match=f"1 of 1 class folders under .* have no counterpart in .*'{folder}'"):
            labels(".", **options)  # type: ignore[arg-type]


def test_data_w4_a_number_before_a_name_is_the_names() -> None:
    animals = load_class_list("counteranimal")
    folders = {"9 ostrich": 0, "296_ice bear": 38}
    assert find_labels(listed(*folders, kind="folders"), animals, "x") == folders  # rows of ImageNet-1k
    assert find_labels(listed("0 ostrich", "38-ice-bear", kind="folders"), animals, "x") == {
        "0 ostrich": 0,
        "38-ice-bear": 38,
    }
    assert find_labels(listed("3 cat", "005_dog", kind="folders"), TEN, "x") == {"3 cat": 3, "005_dog": 5}
    with pytest.raises(UserError, match=r"'2 dog' is 'dog' by its name and 'bird' by its number"):
        find_labels(listed("1 automobile", "2 dog", kind="folders"), TEN, "x")
    with pytest.raises(UserError, match=r"'10 truck' is 'truck' by its name and no class by its number"):
        find_labels(listed("10 truck", kind="folders"), TEN, "x")
    assert find_labels(listed("7 up", kind="folders"), named_classes(["up", "7-Up"]), "x") == {"7 up": 1}


@pytest.mark.parametrize("source", ["torchvision", "keras"])
def test_data_w4_names_of_torchvision_and_keras_are_their_classes(source: str, request: pytest.FixtureRequest) -> None:
    if source == "torchvision":
        names = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    else:
        shared: Path = request.getfixturevalue("shared_data")
        index = json.loads((shared / "lists" / "imagenet_class_index.json").read_text())
        names = [index[str(row)][1].replace("_", " ") for row in range(1000)]
    told = [(row, name) for row, name in enumerate(names) if name not in SHARED]
    assert len(told) >= 993
    found = find_labels(listed(*(name for _, name in told), kind="folders"), IMAGENET, "x")
    assert [*found.values()] == [row for row, _ in told]
    for name in {*names} & SHARED - {"maillot tank suit"}:
        with pytest.raises(UserError, match=f"'{name}' \\(two classes are called so: n[0-9]+ and n[0-9]+\\)"):
            find_labels(listed(name, kind="folders"), IMAGENET, "x")


def test_data_w4_folders_that_differ_in_case_are_not_merged(img: Any, labels: Labels) -> None:
    img("c/Cardigan/0.png")
    assert labels("c", classes="imagenet1k") == {"Cardigan/0.png": "Cardigan Welsh Corgi"}
    img("c/cardigan/0.png")
    assert labels("c", classes="imagenet1k")["cardigan/0.png"] == "cardigan"
    for folders in (("great white shark", "great_white_shark"), ("n01440764", "tench"), ("3", "003")):
        with pytest.raises(UserError, match=f"folders '{folders[0]}' and '{folders[1]}' are both"):
            find_labels(listed(*folders, kind="folders"), IMAGENET, "x", numbers="own")


def test_data_w4_a_manifests_two_columns_must_agree(img: Any, labels: Labels, tmp_path: Path) -> None:
    img("0.png")
    img("1.png")

    def read(text: str, classes: str = "cifar10") -> list[str]:
        (tmp_path / "m.csv").write_text(text)
        return [*labels("m.csv", classes=classes).values()]

    assert read("path,label,class\n0.png,3,cat\n1.png,5,dog\n") == ["cat", "dog"]
    assert read("path,label,class\n0.png,3,no class of the list\n") == ["cat"]
    with pytest.raises(UserError, match=r"label 3 is 'cat' in cifar10, yet the class column of 1\.png says 'dog'"):
        read("path,label,class\n0.png,3,cat\n1.png,3,dog\n")
    with pytest.raises(UserError, match=r"label 'cat' is 'cat', yet the class column of 0\.png says 'dog'"):
        read("path,label,class\n0.png,cat,dog\n")
    # and the column tells which list the labels count in
    assert read("path,label,class\n0.png,0,goldfish\n1.png,1,great white shark\n", "imagenet_r") == R.names[:2]
    assert read("path,label,class\n0.png,1,goldfish\n1.png,2,great white shark\n", "imagenet_r") == R.names[:2]


def test_data_w4_sorted_wordnet_ids_go_by_names_in_another_order_no_more(tmp_path: Path) -> None:
    """Names in the order of the alphabet beside folders in that of WordNet."""
    for wnid in IMAGENET.folders[:20]:
        (tmp_path / wnid).mkdir()
    names = IMAGENET.names[:20]
    assert class_index_for(tmp_path, names) == {wnid: row for row, wnid in enumerate(IMAGENET.folders[:20])}
    with pytest.raises(
        UserError,
        match=r"the 20 class names are not in the order of the folders' WordNet ids: 'American robin' is name 0",
    ):
        class_index_for(tmp_path, sorted(names))


# -- lists of names --------------------------------------------------------------------------------------------------


def test_data_w5_a_blank_line_keeps_its_number(labels: Labels, tmp_path: Path) -> None:
    """CLIP_benchmark's own names of clevr_closest_object_distance, the fourth of which is empty."""
    (tmp_path / "w/test").mkdir(parents=True)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(tmp_path / "w/test/0.tar", "w") as tar:
        for key in range(6):
            for name, data in ((f"{key}.cls", str(key).encode()), (f"{key}.png", picture.getvalue())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (tmp_path / "w/test/nshards.txt").write_text("1")
    names = ["very nearby", "nearby", "near", "", "distant", "very distant"]
    (tmp_path / "w/classnames.txt").write_text("\n".join(names) + "\n")
    assert labels("w") == {f"0.tar:{key}": name for key, name in enumerate(names)}


def test_data_w6_an_index_against_equal_names_is_refused(img: Any, labels: Labels, tmp_path: Path) -> None:
    for name in ("cat", "dog", "bird"):
        img(f"p/{name}/0.png")
    (tmp_path / "idx.json").write_text(json.dumps({"bird": 0, "cat": 1, "dog": 2}))  # torchvision's class_to_idx
    with pytest.raises(
        UserError, match=r"3 of 3 equal names have another index, such as 'bird', 0 in the file and 2 among"
    ):
        labels("p", classes="idx.json", class_names=["cat", "dog", "bird"])
    assert labels("p", classes="idx.json", class_names=["bird", "cat", "dog"])["cat/0.png"] == "cat"
    # two of three folders turned, the third of another name
    (tmp_path / "idx.json").write_text(json.dumps({"bird": 1, "cat": 0, "dog": 2}))
    with pytest.raises(UserError, match=r"2 of 2 equal names have another index, such as 'bird', 1 in the file and 0"):
        labels("p", classes="idx.json", class_names=["bird", "cat", "hound"])
    (tmp_path / "idx.json").write_text(json.dumps({"bird": 0, "cat": 1, "dog": 2}))
    assert labels("p", classes="idx.json", class_names=["bird", "cat", "hound"])["dog/0.png"] == "hound"


# -- images that a list does not label -------------------------------------------------------------------------------


def test_data_part4_an_ood_list_without_labels_is_restricted_by_its_folders(img: Any, tmp_path: Path) -> None:
    for name in ("bubbly", "dotted"):
        img(f"{name}/{name}_1.png")
    img("0.png")
    (tmp_path / "id.txt").write_text("0.png 3\n")
    sets = {"id": SetConfig("id.txt", "id", classes="cifar10"), "x": SetConfig("x.txt", "far_ood", classes="dtd_clean")}
    files = SetFiles(SuiteConfig(root=str(tmp_path), sets=sets))
    (tmp_path / "x.txt").write_text("bubbly/bubbly_1.png -1\ndotted/dotted_1.png -1\n")
    opened = files.open("x", TEN, PREPROCESS)
    assert opened.images.names == ["dotted/dotted_1.png"]  # type: ignore[union-attr]
    (tmp_path / "x.txt").write_text("0.png -1\n")
    with pytest.raises(
        UserError, match=r"0\.png has the label -1, which stands for none, and no folder of its path is a class"
    ):
        SetFiles(files.config).open("x", TEN, PREPROCESS)
