"""Class names as a user gives them: in YAML, in text and in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qatlab.core.errors import UserError
from qatlab.data.images.names import read_names


@pytest.mark.parametrize(
    "given",
    [
        ["cat", "dog"],
        {0: "cat", 1: "dog"},
        {"1": "dog", "0": "cat"},
        [{"index": 1, "name": "dog"}, {"index": 0, "name": "cat", "wnid": "n1"}],
    ],
)
def test_data_t2_names_in_label_order(tmp_path: Path, given: Any) -> None:
    assert read_names(given, "suite.class_names", tmp_path) == ["cat", "dog"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "x.json").write_bytes(json.dumps(given).encode(encoding))
        assert read_names("x.json", "suite.class_names", tmp_path) == ["cat", "dog"]
        (tmp_path / "x.txt").write_bytes("cat\r\ndog\r\n\r\n".encode(encoding))
        assert read_names("x.txt", "suite.class_names", tmp_path) == ["cat", "dog"]


def test_data_t2_digits_are_names(tmp_path: Path) -> None:
    """MNIST's and SVHN's, as YAML reads them."""
    assert read_names([0, 1, 2], "suite.class_names", tmp_path) == ["0", "1", "2"]
    assert read_names(None, "suite.class_names", tmp_path) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "holds no class names; expected a list"),
        ({}, "holds no class names"),
        (5, "holds no class names"),
        (["cat", True], r"the name of class 1 is True, expected text; YAML takes yes, no, on and off for that"),
        (["cat", None], r"the name of class 1 is None, expected text"),
        (["cat", 0.5], r"the name of class 1 is 0\.5"),
        ([["cat"]], r"the name of class 0 is \['cat'\]"),
        ({"cat": 0, "dog": 1}, r"the 2 classes need the numbers 0 to 1, each once, and 'cat' is no number"),
        ({0: "cat", 2: "dog"}, r"need the numbers 0 to 1, each once, and there are \[0, 2\]"),
        ([{"index": 0, "name": None}, {"index": 1, "name": "dog"}], r"the name of class 0 is None"),
        ([{"index": 0, "name": "cat"}, {"index": 0, "name": "dog"}], r"need the numbers 0 to 1, each once"),
        ([{"index": 0}], r"a record without name \({'index': 0}\)"),
    ],
)
def test_data_t2_what_is_no_name_for_each_label_is_told(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"suite.class_names.*{message}"):
        read_names(given, "suite.class_names", tmp_path)
    if not isinstance(given, dict) or all(isinstance(key, str) for key in given):
        (tmp_path / "x.json").write_text(json.dumps(given))
        with pytest.raises(UserError, match=f"x\\.json.*{message}"):
            read_names("x.json", "suite.class_names", tmp_path)


@pytest.mark.parametrize("name", ["c.csv", "c.yaml", "c.npy", "folder", ""])
def test_data_t2_other_files_are_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"suite\.class_names={name} is no \.txt or \.json file"):
        read_names(name, "suite.class_names", tmp_path)


def test_data_w5_a_blank_line_of_names_is_told_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("very nearby\nnearby\nnear\n\ndistant\n")
    with pytest.raises(UserError, match=r"x\.txt, line 4, is blank, and a class's line is its label"):
        read_names("x.txt", "suite.class_names", tmp_path)
    (tmp_path / "x.json").write_text('["near", "", "distant"]')
    assert read_names("x.json", "suite.class_names", tmp_path) == ["near", "", "distant"]
