"""The one reader of text: encodings that a mark or UTF-8 itself tells, and a sentence for the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qatlab.core.errors import UserError
from qatlab.data.textfiles import read_json, read_lines, read_text

TEXT = "café\nÅngström\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_data_t2_text_is_read_as_its_mark_says(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(TEXT.encode(encoding))
    assert read_text(file) == TEXT
    file.write_bytes(TEXT.replace("\n", "\r\n").encode(encoding))
    assert read_text(file) == TEXT
    file.write_bytes(json.dumps(["café", 1]).encode(encoding))
    assert read_json(file) == ["café", 1]


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
def test_data_t2_utf_16_of_either_order(tmp_path: Path, mark: bytes) -> None:
    order = "utf-16-le" if mark == b"\xff\xfe" else "utf-16-be"
    (tmp_path / "x").write_bytes(mark + TEXT.encode(order))
    assert read_text(tmp_path / "x") == TEXT
    (tmp_path / "x").write_bytes(TEXT.encode(order))
    with pytest.raises(UserError, match=r"x, line 1.*(NUL|is no UTF-8)"):
        read_text(tmp_path / "x")


def test_data_t2_other_encodings_are_named_and_not_guessed(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(b"cat\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"x\.txt, line 2: the byte 0xe9 is no UTF-8; save the file as UTF-8"):
        read_text(file)
    file.write_bytes(b"cat\nd\0og\n")
    with pytest.raises(UserError, match=r"x\.txt, line 2, holds a NUL"):
        read_text(file)
    file.write_bytes(b"\xff\xfec\x00a")
    with pytest.raises(UserError, match=r"x\.txt, line 1: the byte 0x61 is no UTF-16"):
        read_text(file)
    with pytest.raises(UserError, match=r"y\.txt cannot be read: No such file"):
        read_text(tmp_path / "y.txt")


def test_data_w5_lines_keep_their_numbers(tmp_path: Path) -> None:
    """Only line feeds end lines: a next-line or form-feed character in a name does not."""
    (tmp_path / "x").write_text(" a \n\nb\x85c\x0cd\n\n\n", encoding="utf-8")
    assert read_lines(tmp_path / "x") == ["a", "", "b\x85c\x0cd"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["a",]', r"it is no JSON at line 1, column \d \(.*; a comma before the closing bracket\?\)"),
        ('{"a": 1,\n}', r"it is no JSON at line \d, column \d .*; a comma before the closing bracket\?\)"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ("1" * 5000, "digits"),
        ("", "it is no JSON at line 1"),
    ],
)
def test_faults_t4_json_that_cannot_be_read_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=f"x\\.json is not understood: .*{message}"):
        read_json(tmp_path / "x.json")
