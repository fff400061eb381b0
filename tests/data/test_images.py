"""Labelled sets: order, slices, the map from folders to text rows, and each mistake's sentence."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qatlab.data.images import ImageFolderSet, class_index_for
from qatlab.data.transforms import Preprocess
from qatlab.errors import UserError

DATA = Path(os.environ.get("QATLAB_TEST_DATA") or Path(__file__).parents[2] / "../shared/data")
PREPROCESS = Preprocess(8, (0.5,) * 3, (0.5,) * 3)
INDEX = {"ant": 0, "bee fly": 1, "cat": 2}


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, dtype="uint8")).save(path)


@pytest.fixture
def tree(tmp_path):
    for label, folder in enumerate(INDEX):
        for number in range(4):
            save(tmp_path / folder / f"{number}.PNG", 10 * label + number)
    (tmp_path / "labels.csv").write_text("not an image")
    (tmp_path / "ant" / "._0.png").write_text("what macOS leaves behind")
    return tmp_path


def values(images):
    return [int(image[0, 0, 0]) for image, _ in (images[i] for i in range(len(images)))]


def test_sorted_order_and_labels(tree):
    images = ImageFolderSet(tree, PREPROCESS, INDEX)
    assert values(images) == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert [images[i][1] for i in (0, 4, 11)] == [0, 1, 2]


def test_strides_cover_each_image_once_after_exclusion(tree):
    first, second = (ImageFolderSet(tree, PREPROCESS, INDEX, pick, ["bee fly"]) for pick in ("0::2", "1::2"))
    assert values(first) == [0, 2, 20, 22]
    assert sorted(values(first) + values(second)) == [0, 1, 2, 3, 20, 21, 22, 23]
    assert len(ImageFolderSet(tree, PREPROCESS, INDEX, ":5")) == 5


def test_unlabelled_trees_of_any_shape(tree):
    save(tree / "flat.png", 99)
    save(tree / "x" / "y" / "deep.png", 98)
    images = ImageFolderSet(tree, PREPROCESS, None, exclude=["ant", "cat"])
    assert values(images) == [10, 11, 12, 13, 99, 98]
    assert {images[i][1] for i in range(6)} == {-1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pick": "every second"}, "no slice"),
        ({"pick": "::0"}, "no slice"),
        ({"pick": "3"}, "no slice"),
        ({"pick": "100:"}, "leaves none of the 12"),
        ({"exclude": ["cta"]}, r"'cta'.*did you mean 'cat'"),
        ({"class_index": {"ant": 0, "bee fly": 1, "cats": 2}}, r"cat matches no class name \(did you mean 'cats'"),
        ({"path": "labels"}, "does not exist"),
        ({"path": "empty"}, "holds no image"),
        ({"path": "ant"}, "lies in no class folder"),
    ],
)
def test_mistakes(tree, options, message):
    (tree / "empty").mkdir()
    options = {"class_index": INDEX, **options}
    with pytest.raises(UserError, match=message):
        ImageFolderSet(tree / options.pop("path", ""), PREPROCESS, **options)


def test_a_corrupt_image_is_named(tree):
    (tree / "cat" / "0.PNG").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cat/0\.PNG cannot be read as an image: unknown image format"):
        ImageFolderSet(tree, PREPROCESS, INDEX)[8]


def test_folders_find_their_row_by_name(tmp_path):
    for folder in ("Ice_Cream", "tench", "great white shark"):
        (tmp_path / folder).mkdir()
    names = ["Tench", "goldfish", "great_white_shark", "ice cream"]
    assert class_index_for(tmp_path, names) == {"Ice_Cream": 3, "tench": 0, "great white shark": 2}
    with pytest.raises(UserError, match=r"1 of 3 class folders .*4 class names: 'tench' \(did you mean 'trench'\?\)"):
        class_index_for(tmp_path, ["trench", *names[1:]])
    assert class_index_for(tmp_path, names[2:], exclude=["tench"]) == {"Ice_Cream": 1, "great white shark": 0}


@pytest.fixture
def wnids(tmp_path):
    for folder in ("n00000003", "n00000001", "n00000002"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    return tmp_path / "set"


def test_wordnet_ids_in_sorted_order_only_when_all_are_there(wnids):
    assert class_index_for(wnids, ["a", "b", "c"]) == {"n00000001": 0, "n00000002": 1, "n00000003": 2}
    with pytest.raises(UserError, match="3 of 3 class folders"):
        class_index_for(wnids, ["a", "b", "c", "d"])


FORMS = {
    "records.json": json.dumps(
        [{"index": i, "wnid": f"n0000000{i + 1}", "name": name} for i, name in enumerate("cab")]
    ),
    "names.json": json.dumps({"n00000001": "c", "n00000002": "a", "n00000003": "b"}),
    "rows.json": json.dumps({"n00000001": 0, "n00000002": 1, "n00000003": 2}),
    "keras.json": json.dumps({"0": ["n00000001", "c"], "1": ["n00000002", "a"], "2": ["n00000003", "b"]}),
    "list.json": json.dumps(["n00000001", "n00000002", "n00000003"]),
    "table.csv": "index,wnid,name\n0,n00000001,c\n1,n00000002,a\n2,n00000003,b\n",
    "plain.txt": "n00000001\nn00000002\nn00000003\n",
    "synsets.txt": "n00000001 c\nn00000002 a\nn00000003 b\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_classes_files(wnids, form):
    file = wnids.parent / form
    file.write_text(FORMS[form])
    expected = {"n00000001": 0, "n00000002": 1, "n00000003": 2}
    assert class_index_for(wnids, ["c", "a", "b"], file) == expected
    if "c" in FORMS[form].replace("c,name", "").replace("list", "") and form not in ("list.json", "plain.txt"):
        # names beat positions: the text features may be in another order, or hold more classes
        assert class_index_for(wnids, ["a", "x", "b", "c"], file) == {"n00000001": 3, "n00000002": 0, "n00000003": 2}


def test_classes_file_mistakes(wnids):
    file = wnids.parent / "classes.json"
    file.write_text(FORMS["rows.json"])
    with pytest.raises(UserError, match="has 3 classes and the text features 2"):
        class_index_for(wnids, ["a", "b"], file)
    file.write_text("[{]")
    with pytest.raises(UserError, match="is not understood"):
        class_index_for(wnids, ["a", "b"], file)
    file.write_text('[{"id": 3}]')
    with pytest.raises(UserError, match="is not understood"):
        class_index_for(wnids, ["a", "b"], file)
    with pytest.raises(UserError, match="cannot be read"):
        class_index_for(wnids, ["a", "b"], wnids.parent / "none.json")
    # equal names in another order, one of them twice so that names alone do not decide
    file.write_text(
        json.dumps([{"index": i, "wnid": f"n0000000{i + 1}", "name": name} for i, name in enumerate("abb")])
    )
    with pytest.raises(UserError, match="in another order"):
        class_index_for(wnids, ["c", "a", "d"], file)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real images at {DATA} (QATLAB_TEST_DATA)")
def test_real_imagenet():
    records = json.loads((DATA / "imagenet1k/classes.json").read_text())
    names = [record["name"] for record in records]
    expected = {record["wnid"]: record["index"] for record in records}
    assert class_index_for(DATA / "imagenet1k", names) == expected
    assert class_index_for(DATA / "imagenet1k", names, DATA / "imagenet1k/classes.json") == expected
    images = ImageFolderSet(DATA / "imagenet1k", PREPROCESS, expected, "0::2")
    assert [images[i][1] for i in range(3)] == [0, 2, 4]
    assert len(images) == 500
    textures = ImageFolderSet(DATA / "dtd10", PREPROCESS, None, exclude=["bubbly", "cobwebbed"])
    assert len(textures) == 400
