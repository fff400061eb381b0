"""How rows lie on the disk: what they have in common stands once, lines are added, and files of earlier releases are read."""

from __future__ import annotations

import json
import math
import statistics
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_values
import pytest
from polars.testing import assert_frame_equal

from qatlab import results
from qatlab.config import compose
from qatlab.core.checksums import sealed, unsealed
from qatlab.core.files import folder_locked
from qatlab.results import contexts, rowfile
from qatlab.results.contexts import SHARED
from qatlab.results.rowfile import Row, RowFile
from qatlab.results.rows import read_rows
from qatlab.results.run import Run

GOLDEN: list[Row] = golden_values.stored("rows")["light_qat_lsq"]
OPTIONS = {"fit.lr": 1e-6, "suite.sets.id.path": "embedded:id", "quant.rules": {}}


def made(count: int = len(GOLDEN), **config: Any) -> list[Row]:
    """Rows as a run hands them to its file."""
    shared = {"config": OPTIONS | config, "versions": {"torch": "2.10"}, "commit": "0123456789ab"}
    return [row | shared for row in GOLDEN[:count]]


def write_old(path: Path, rows: list[Row], mark: bool = True) -> None:
    """As earlier releases did: all in every row, with a checksum or, before that, without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((sealed(row) if mark else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


# -- sizes and contents ---------------------------------------------------------------------------------------------------


def test_rows_are_small_and_options_stand_once(small_fit: Callable[..., Run], tmp_path: Path) -> None:
    run = small_fit("light_qat_lsq", tmp_path)
    sizes = [len(line) for line in run.results.read_bytes().splitlines()]
    assert statistics.mean(sizes) <= 1600
    assert max(sizes) <= 2500
    lines = (run.folder / "contexts.jsonl").read_bytes().splitlines()
    assert [unsealed(line)["config"]["fit.steps"] for line in lines] == [2]
    assert all(row["config"]["fit.steps"] == 2 and row["versions"]["torch"] for row in run.rows())


def test_a_later_evaluation_has_options_of_its_own(path: Path) -> None:
    RowFile(path).append(made(30))
    RowFile(path).append(made(40, **{"suite.images": 7}))
    assert [row["config"].get("suite.images") for row in read_rows(path)] == [None] * 30 + [7] * 10
    assert len(path.with_name("contexts.jsonl").read_bytes().splitlines()) == 2


@pytest.mark.parametrize("mark", [True, False], ids=["with checksums", "without"])
def test_files_of_earlier_releases_give_the_same(tmp_path: Path, mark: bool) -> None:
    rows = made()
    write_old(tmp_path / "old" / "results.jsonl", rows, mark)
    (tmp_path / "new").mkdir()
    RowFile(tmp_path / "new" / "results.jsonl").append(rows)
    old, new = (read_rows(tmp_path / name / "results.jsonl") for name in ("old", "new"))
    assert old == new == rows
    assert [list(row) for row in new] == [list(row) for row in rows]
    for every in (False, True):
        found = [results.read(tmp_path / name, every=every) for name in ("old", "new")]
        assert_frame_equal(*found)
    assert "context" not in found[0].columns


def test_a_file_that_an_earlier_release_began_is_gone_on_with(path: Path) -> None:
    rows = made()
    write_old(path, rows[:20])
    before = path.read_bytes()
    RowFile(path).append(rows)
    assert path.read_bytes().startswith(before)
    assert read_rows(path) == rows


def test_another_config_inside_a_row_is_no_end_of_it(path: Path) -> None:
    rows = [row | {"metrics": {"a": 1}, "note": {"b": 1, "config": {"c": 2}}, "last": 3} for row in GOLDEN[:2]]
    write_old(path, rows)
    assert read_rows(path) == rows


def test_many_rows_become_one_frame_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    RowFile(tmp_path / "run" / "results.jsonl").append(made())
    whole = results.read(tmp_path, every=True)
    monkeypatch.setattr("qatlab.results.rows.PART", 7)
    assert_frame_equal(results.read(tmp_path, every=True), whole)
    assert len(whole) == len(GOLDEN)


# -- nothing is parsed or read twice --------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [True, False], ids=["of earlier releases", "of now"])
def test_options_are_parsed_once_and_rows_share_them(path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    if old:
        write_old(path, made())
    else:
        RowFile(path).append(made())
    parsed: list[str] = []
    for module, name in ((json, "loads"), (rowfile, "_json")):
        read = getattr(module, name)
        monkeypatch.setattr(module, name, lambda text, read=read: (parsed.append(text), read(text))[1])
    rows = read_rows(path)
    assert len(rows) == len(GOLDEN)
    assert len(parsed) == len(GOLDEN) + 1
    assert sum("fit.lr" in text for text in parsed) == 1
    assert len({id(row["config"]) for row in rows}) == 1


def test_numbers_come_back_to_the_last_bit(path: Path) -> None:
    (row, *_), numbers = made(), [0.1, 5e-324, -1.7976931348623157e308, 1e22, 2**53 + 1, float("inf")]
    row["metrics"] = {**{f"m{place}": number for place, number in enumerate(numbers)}, "none": float("nan")}
    RowFile(path).append([row])
    found = read_rows(path)[0]["metrics"]
    assert math.isnan(found.pop("none"))
    assert [repr(number) for number in found.values()] == [repr(number) for number in numbers]


def test_a_run_that_goes_on_reads_only_what_was_added(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []
    verified = rowfile.verified
    monkeypatch.setattr(rowfile, "verified", lambda line: (read.append(line), verified(line))[1])
    stored, rows = RowFile(path), made()
    for start in range(0, 12, 3):
        stored.append(rows[start : start + 3])
    assert len(read) == 12
    RowFile(path).append(rows[:13])  # another process
    read.clear()
    stored.append(rows[:14])
    assert len(read) == 2
    assert read_rows(path) == rows[:14]


# -- what is lost is named ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The run of rows whose options were then lost."""
    with Run(compose("recipe=ptq", f"output={tmp_path}"), "ptq") as run:
        run.append([{key: value for key, value in row.items() if key not in ("run_id", "seed")} for row in GOLDEN])
    (run.folder / "contexts.jsonl").unlink()
    return run


def test_rows_without_their_options_are_read_and_named(run: Run, tmp_path: Path) -> None:
    told = rf"{len(GOLDEN)} rows lack what stands there \(model, weights, seed, commit\), the first in line 1"
    with pytest.warns(UserWarning, match=told):
        frame = results.read(tmp_path, every=True)
    assert len(frame) == len(GOLDEN)
    assert frame["score"].to_list() == [row["score"] for row in GOLDEN]
    assert not {*SHARED} & {*frame.columns}


def test_a_run_scores_again_what_lost_its_options(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.rows() == []
    assert run.done("fp32") == {}
    with run:
        assert "has damaged lines (1, 2, 3, 4, 5) whose options contexts.jsonl has lost" in capsys.readouterr().out
        run.append([{key: value for key, value in row.items() if key not in ("run_id", "seed")} for row in GOLDEN[:3]])
    assert len(run.rows()) == 3
    assert len((run.folder / "results.damaged").read_text().splitlines()) == len(GOLDEN)


@pytest.mark.parametrize("kept", [0, 1, 100, -2, -1])
def test_a_context_that_was_cut_off_is_written_again(path: Path, kept: int) -> None:
    """Killed before its rows were written; or cut off later, and given again by the next rows of the same options."""
    rows, beside = made(), path.with_name("contexts.jsonl")
    RowFile(path).append(rows[:5])
    stored = beside.read_bytes()
    beside.write_bytes(stored[:kept])
    (path).unlink()
    RowFile(path).append(rows)
    assert read_rows(path) == rows
    assert beside.read_bytes().endswith(stored)


def test_changed_options_are_noticed(path: Path) -> None:
    RowFile(path).append(made(3))
    beside = path.with_name("contexts.jsonl")
    beside.write_bytes(beside.read_bytes().replace(b'"fit.lr": 1e-06', b'"fit.lr": 2e-06'))
    assert (read_rows(path), RowFile(path).bare_lines) == ([], [1, 2, 3])


def test_the_name_of_a_context_is_a_hash_of_it(path: Path) -> None:
    RowFile(path).append(made(1))
    row = unsealed(path.read_bytes().splitlines()[0])
    shared = {key: made(1)[0][key] for key in SHARED if key in made(1)[0]}
    assert row["context"] == contexts.digest(json.dumps(shared))[:12]
    assert not {*SHARED} & {*row}


# -- a line that is being written -----------------------------------------------------------------------------------------


def test_a_reader_waits_for_the_line_that_is_being_written(path: Path) -> None:
    RowFile(path).append(made(3))
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    found: list[RowFile] = []
    reader = threading.Thread(target=lambda: found.append(RowFile(path)))
    with folder_locked(path.parent):
        reader.start()
        reader.join(0.2)
        assert reader.is_alive()
        with path.open("ab") as file:
            file.write(whole[-200:])
    reader.join(30)
    assert (found[0].rows, found[0].damaged) == (made(3), [])


@pytest.mark.parametrize("kept", [1, 50, -2])
def test_what_a_kill_left_of_a_line_is_set_aside_by_the_next(path: Path, kept: int) -> None:
    RowFile(path).append(made(3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:kept])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="damaged lines are left out, the first is 3"):
            results.read(path.parent)
    RowFile(path).append(made(5))
    assert read_rows(path) == made(5)
    assert path.with_suffix(".damaged").read_bytes() == lines[2][:kept] + b"\n"
