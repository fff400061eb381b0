"""What suite.check says: found, missing and where it was looked for, not as expected, images against the published."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from qatlab.config import SetConfig, SuiteConfig, compose
from qatlab.core.errors import UserError
from qatlab.suites.check import check_suite


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """``cifar``: three of CIFAR-10's class folders, two images each; ``flat``: four images."""
    for name in ("cat", "dog", "ship"):
        (tmp_path / "cifar" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "cifar" / name / f"{i}.png").write_bytes(b"never decoded")
    (tmp_path / "flat").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / "flat" / f"{i}.png")
    return tmp_path


SETS = {
    "cifar": SetConfig(["no/cifar", "cifar"], "id", classes="cifar10", images=10_000),
    "half": SetConfig("cifar", "calibration", pick="1::2"),
    "flat": SetConfig("flat", "far_ood", images=4),
    "ten": SetConfig("embedded:id", "id"),
}


def test_a_complete_suite(root: Path) -> None:
    said = check_suite(SuiteConfig(root=str(root), sets=SETS, images=16))
    assert said.complete
    lines = [" ".join(line.split()) for line in said.text.splitlines()]
    assert lines == [
        f"4 of 4 sets are there (suite.root={root}):",
        f"cifar id folders 6 images (published: 10000) 3 of 10 classes of cifar10 {root / 'cifar'}",
        f"half calibration folders 6 images, 3 picked 3 of 10 classes of cifar10 {root / 'cifar'}",
        f"flat far_ood folders 4 images as published no classes {root / 'flat'}",
        "ten id rendered 16 images the 16 class names",
    ]


def test_what_is_missing_says_where_it_was_looked_for(root: Path) -> None:
    sets = {
        **SETS,
        "gone": SetConfig(["gone", "lost/gone"], "far_ood"),
        "hanging": SetConfig("flat", "near_ood", reference="other"),
        "other": SetConfig("vanished", "id", classes="cifar100"),
    }
    said = check_suite(SuiteConfig(root=str(root), sets=sets))
    assert not said.complete
    assert said.text.startswith("4 of 7 sets are there")
    assert said.text.endswith(
        f"""3 missing:
  gone: looked for gone, lost/gone below {root}
  other: looked for vanished below {root}
  hanging: its reference other is not there"""
    )


def test_what_cannot_be_read_is_told_with_the_rest(root: Path) -> None:
    (root / "cifar" / "lorry").mkdir()
    (root / "cifar" / "lorry" / "0.png").touch()
    (root / "list.txt").write_text("flat/0.png 3\nflat/9.png 4\n")
    sets = {**SETS, "listed": SetConfig("list.txt", "shifted")}
    said = check_suite(SuiteConfig(root=str(root), sets=sets))
    assert not said.complete
    assert said.text.startswith("2 of 5 sets are there")
    broken = said.text.split("3 there, but not as expected:\n")[1].splitlines()
    assert [line.split(":")[0].strip() for line in broken] == ["cifar", "half", "listed"]
    assert "'lorry'" in broken[0]
    assert "flat/9.png (image 2 of the list), which is not there" in broken[2]


def test_with_nothing_there(tmp_path: Path) -> None:
    said = check_suite(SuiteConfig(root=str(tmp_path), sets={"x": SetConfig("x", "id", classes="cifar10")}))
    assert said.text.splitlines() == [
        f"0 of 1 sets are there (suite.root={tmp_path}):",
        "1 missing:",
        f"  x: looked for x below {tmp_path}",
    ]


def test_the_text_tables_names_are_the_classes_where_none_are_given(root: Path) -> None:
    config = SuiteConfig(root=str(root), sets={"cifar": SetConfig("cifar", "id")})
    assert "3 of 3 classes of the 3 class names" in check_suite(config, ["ship", "dog", "cat"]).text


def test_folders_are_the_classes_where_nothing_names_any(root: Path) -> None:
    config = SuiteConfig(root=str(root), sets={"cifar": SetConfig("cifar", "id")})
    assert "3 of 3 classes of the 3 folders of cifar" in check_suite(config).text


def test_some_of_the_text_tables_classes_are_asked_about(root: Path) -> None:
    config = SuiteConfig(root=str(root), sets={"cifar": SetConfig("cifar", "id")})
    names = ["ship", "dog", "cat", "horse"]
    asked = check_suite(config, names)
    assert "suite.sets.cifar has 3 class folders" in asked.text
    assert not asked.complete
    for word, told in {"all": "3 of 4 classes of the 4 class names", "folders": "(3 of the 4 class names's 4)"}.items():
        config.sets["cifar"].class_names = word
        assert told in check_suite(config, names).text


def test_a_suite_that_no_data_could_mend_is_refused() -> None:
    with pytest.raises(UserError, match=r"suite\.sets\.x\.role=ood is unknown.*; there are id, shifted"):
        compose("recipe=ptq", "+suite.sets.x={path: flat, role: ood}")
