"""Labelled sets: order, slices, the map from folders to text rows, and each mistake's sentence."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qatlab.core.errors import UserError
from qatlab.data.images.folders import Folders, class_index_for
from qatlab.data.images.imageset import ImageSet
from qatlab.data.preprocess import Preprocess

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
    images = ImageSet(Folders(tree), PREPROCESS, INDEX)
    assert values(images) == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert [images[i][1] for i in (0, 4, 11)] == [0, 1, 2]


def test_strides_cover_each_image_once_after_exclusion(tree):
    first, second = (ImageSet(Folders(tree), PREPROCESS, INDEX, pick, ["bee fly"]) for pick in ("0::2", "1::2"))
    assert values(first) == [0, 2, 20, 22]
    assert sorted(values(first) + values(second)) == [0, 1, 2, 3, 20, 21, 22, 23]
    assert len(ImageSet(Folders(tree), PREPROCESS, INDEX, ":5")) == 5


def test_unlabelled_trees_of_any_shape(tree):
    save(tree / "flat.png", 99)
    save(tree / "x" / "y" / "deep.png", 98)
    images = ImageSet(Folders(tree), PREPROCESS, None, exclude=["ant", "cat"])
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
        ({"rows": {"ant": 0, "bee fly": 1, "cats": 2}}, r"cat matches no class name \(did you mean 'cats'"),
        ({"path": "labels"}, "does not exist"),
        ({"path": "empty"}, "holds no image"),
        ({"path": "ant"}, "lies in no class folder"),
    ],
)
def test_mistakes(tree, options, message):
    (tree / "empty").mkdir()
    options = {"rows": INDEX, **options}
    with pytest.raises(UserError, match=message):
        ImageSet(Folders(tree / options.pop("path", "")), PREPROCESS, **options)


def test_a_corrupt_image_is_named(tree):
    (tree / "cat" / "0.PNG").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cat/0\.PNG cannot be read as an image: unknown image format"):
        ImageSet(Folders(tree), PREPROCESS, INDEX)[8]


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
    images = ImageSet(Folders(DATA / "imagenet1k"), PREPROCESS, expected, "0::2")
    assert [images[i][1] for i in range(3)] == [0, 2, 4]
    assert len(images) == 500
    textures = ImageSet(Folders(DATA / "dtd10"), PREPROCESS, None, exclude=["bubbly", "cobwebbed"])
    assert len(textures) == 400


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"3", r"is not understood \(it holds 3, neither a list nor a dict\)"),
        ("x.json", b'{"0":["n1"]}', r"is not understood \('\['n1'\]' is no index\)"),
        ("x.json", b"[0, 1]", r"the entry 0 is neither a name nor a record"),
        ("x.json", b"{}", "it is empty"),
        ("x.json", b'["cat", "cat"]', "'cat' is there twice"),
        ("x.json", b'{"cat": 0.5}', "'0.5' is no index"),
        ("x.json", b'{"cat": true}', "'True' is no index"),
        ("x.json", b"[" * 100_000, "nested too deeply"),
        ("x.json", b'[{"folder": "cat", "index": "first"}]', "'first' is no index"),
        ("x.json", b'{"cat": 0, "cat": 1}', "the key 'cat' is given twice"),
        ("x.csv", b"wnid;index\ncat;0\n", "an entry has neither wnid, folder, class nor name"),
        ("x.csv", b"wnid,index\ncat," + b"1" * 200_000, "field larger than field limit"),
        ("x.txt", b"cat\n\ndog\n", "line 2 is blank, and a class's line is its index"),
        ("x.txt", b"caf\xe9\n", r"x\.txt, line 1: the byte 0xe9 is no UTF-8"),
    ],
)
def test_data_t2_classes_files_that_are_not_understood(tmp_path, name, content, message):
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        class_index_for(tmp_path / "set", ["cat", "dog"], tmp_path / name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_data_t2_classes_files_in_other_encodings(wnids, form, encoding):
    (wnids.parent / form).write_bytes(FORMS[form].replace("\n", "\r\n").encode(encoding))
    expected = {"n00000001": 0, "n00000002": 1, "n00000003": 2}
    assert class_index_for(wnids, ["c", "a", "b"], wnids.parent / form) == expected


def test_data_w6_one_index_of_another_name_is_refused(wnids):
    """Names that are turned for two classes, while a third differs in spelling so that the indices decide."""
    records = [{"wnid": f"n0000000{i + 1}", "name": name, "index": i} for i, name in enumerate(["ant", "cat", "bee"])]
    file = wnids.parent / "classes.json"
    file.write_text(json.dumps(records))
    with pytest.raises(
        UserError, match=r"2 of 2 equal names have another index, such as 'cat', 1 in the file and 2 among the names"
    ):
        class_index_for(wnids, ["aunt", "bee", "cat"], file)
    assert class_index_for(wnids, ["aunt", "cat", "bee"], file) == {"n00000001": 0, "n00000002": 1, "n00000003": 2}


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real images at {DATA} (QATLAB_TEST_DATA)")
def test_data_w6_kerass_index_is_read_by_index_where_names_differ():
    names = json.loads((DATA / "lists/imagenet_classnames_openclip.json").read_text())
    rows = class_index_for(DATA / "imagenet1k", names, DATA / "lists/imagenet_class_index.json")
    assert rows == {wnid: row for row, wnid in enumerate(sorted(rows))}
    assert len(rows) == 1000
