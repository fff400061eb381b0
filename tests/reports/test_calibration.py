"""The pictures of a run's ID sets, drawn from its stored predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from matplotlib.figure import Figure

from qatlab.core.checksums import write_table
from qatlab.reports.calibration import draw_calibration, pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Predictions of two stages and two sets, four images each."""
    (tmp_path / "predictions").mkdir()
    for stage, right in (("fp32", [True, True, True, False]), ("quantized", [True, False, True, False])):
        parts = []
        for name in ("birds", "a/b $x$"):
            columns = {"dataset": name, "definition": "d", "confidence": [0.9, 0.8, 0.7, 0.6], "correct": right}
            parts.append(pl.DataFrame({"index": range(4), **columns}))
        write_table(tmp_path / "predictions" / f"{stage}.parquet", pl.concat(parts))
    return tmp_path


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The titles of the figures that were saved."""
    found: list[str] = []
    save = Figure.savefig

    def noting(self: Figure, *arguments: object, **options: object) -> None:
        found.append(self.get_suptitle())
        save(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", noting)
    return lambda: found


DRAWN = {"fp32": "d", "quantized": "d"}


@pytest.mark.usefixtures("rendered")
def test_using_a7_every_id_set_has_its_pictures_and_they_say_of_what_they_are(
    folder: Path, titles: Callable[[], list[str]]
) -> None:
    for name, first in (("birds", True), ("a/b $x$", False)):
        draw_calibration(folder, name, DRAWN, "ptq 0a1b2c3d, tiny W8A8", pictures(folder, name, first))
    assert titles() == ["birds, ptq 0a1b2c3d, tiny W8A8"] * 2 + ["a/b $x$, ptq 0a1b2c3d, tiny W8A8"] * 2
    assert len(list(folder.glob("*.png"))) == len(list(folder.glob("*.csv"))) == 4
    assert pl.read_csv(folder / "reliability.csv")["images"].sum() == 8


def test_using_a7_the_first_set_has_plain_names_and_others_names_that_are_files(tmp_path: Path) -> None:
    assert [path.name for path in pictures(tmp_path, "birds", True)] == ["reliability.png", "bin_shift.png"]
    assert pictures(tmp_path, "imagenet_c-3.5", False).reliability.name == "reliability_imagenet_c-3.5.png"
    odd = {pictures(tmp_path, name, False).reliability for name in ("a/b", "a b", "a_b", "../a")}
    assert len(odd) == 4
    assert {path.parent for path in odd} == {tmp_path}


def test_what_was_drawn_is_told(folder: Path) -> None:
    files = pictures(folder, "birds", True)
    assert draw_calibration(folder, "birds", DRAWN, "a", files) == list(files)
    assert draw_calibration(folder, "birds", {"fp32": "d"}, "b", files) == [files.reliability]
    assert draw_calibration(folder, "birds", {"fp32": "other"}, "c", files) == []
