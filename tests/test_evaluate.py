"""Scoring models side by side: what is computed, what is read back, and what is left on the terminal and on disk."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from qatlab import results
from qatlab.config import Config, SetConfig, compose
from qatlab.core.errors import UserError
from qatlab.core.files import FEATURES
from qatlab.data.embedded.sets import EmbeddedSet
from qatlab.evaluate import evaluate
from qatlab.evaluation.embedding import Encoder
from qatlab.models import zeroshot
from qatlab.reports.table import table_lines
from qatlab.results.rows import read_rows
from qatlab.results.run import Run
from qatlab.stages.score import Scoring

IMAGES = 32
SETS = ("id", "calibration", "noise", "near_ood")
QUICK = ["callbacks.predictions=null", "callbacks.refits=null"]
PLAIN = [*QUICK, "callbacks.temperature=null"]
OTHER = "suite.seed=1"  # images that no run has been scored on
Evaluate = Callable[..., list[Run]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it."""
    monkeypatch.setenv("QATLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def base(small_options: list[str]) -> Config:
    """The options of an evaluation of the unquantized model that takes a second; composed once, for that takes another."""
    kept = [option for option in small_options if not option.startswith(("quant.", "data.", "fit.eval"))]
    return compose(*kept, "suite.resamples=20")


@pytest.fixture
def evaluated(base: Config, tmp_path: Path) -> Evaluate:
    """``evaluated("key=value", ..., sets={name: SetConfig})``: the runs that these options, and sets instead, complete."""

    def run(*options: str, sets: dict[str, SetConfig] | None = None) -> list[Run]:
        config = copy.deepcopy(base)
        for option in (f"output={tmp_path / 'runs'}", *options):
            key, value = option.split("=", 1)
            *path, last = key.split(".")
            at: Any = config
            for part in path:
                at = at[part] if isinstance(at, dict) else getattr(at, part)
            (at.__setitem__ if isinstance(at, dict) else at.__setattr__)(last, yaml.safe_load(value))
        config.suite.sets = config.suite.sets if sets is None else sets
        return evaluate(config, "evaluate")

    return run


@dataclass
class Work:
    """What was computed: images rendered by (kind, number), images through each encoder by key, calls of the text tower."""

    rendered: Counter[tuple[str, int]] = field(default_factory=Counter)
    encoded: Counter[str] = field(default_factory=Counter)
    texts: list[int] = field(default_factory=list)

    @property
    def nothing(self) -> bool:
        """Whether neither an image nor a text was."""
        return not (self.rendered or self.encoded or self.texts)

    def forget(self) -> None:
        """Count from zero."""
        for counted in (self.rendered, self.encoded, self.texts):
            counted.clear()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    done = Work()
    items, call, encode = EmbeddedSet.__getitems__, Encoder.__call__, zeroshot.encode_text

    def rendering(self: EmbeddedSet, indices: list[int]) -> Any:
        done.rendered.update((self.name, index) for index in indices)
        return items(self, indices)

    def encoding(self: Encoder, images: Any, keys: Any) -> Any:
        done.encoded[self.key] += len(images)
        return call(self, images, keys)

    def texting(clip: Any, texts: list[str], *more: Any) -> Any:
        done.texts.append(len(texts))
        return encode(clip, texts, *more)

    monkeypatch.setattr(EmbeddedSet, "__getitems__", rendering)
    monkeypatch.setattr(Encoder, "__call__", encoding)
    monkeypatch.setattr(zeroshot, "encode_text", texting)
    return done


def counted(said: str) -> list[str]:
    return re.findall(r"images decoded .*", said)


def by_name(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {(row["stage"], row["dataset"], row["score"]): row for row in rows}


# -- once ------------------------------------------------------------------------------------------------------------


def test_each_image_and_each_class_is_encoded_once_and_never_again(
    evaluated: Evaluate, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = evaluated()
    assert work.rendered == {(name, i): 1 for name in SETS for i in range(IMAGES)}
    assert list(work.encoded.values()) == [4 * IMAGES]
    assert work.texts == [16]
    assert counted(capsys.readouterr().out) == ["images decoded 128, embedded 128 (128 by encoder); text tower calls 1"]
    assert {row["stage"] for row in run.rows()} == {"fp32", "temperature"}
    assert {row["dataset"] for row in run.rows()} == {"id", "noise", "near_ood", "calibration"}

    stored, rows = run.results.read_bytes(), run.rows()
    work.forget()
    assert evaluated()[0].rows() == rows
    assert work.nothing
    assert run.results.read_bytes() == stored
    said = capsys.readouterr().out
    assert f"{run.folder} was finished before" in " ".join(said.split())
    assert "nothing left to compute" in said
    assert counted(said) == []


def test_another_score_never_runs_the_encoder(
    evaluated: Evaluate, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = evaluated(*QUICK, "callbacks.ood.scores=[msp,mcm]")
    before = by_name(run.rows())
    work.forget()
    evaluated(*QUICK, "callbacks.ood.scores=[msp,entropy]")
    assert work.nothing
    assert counted(capsys.readouterr().out)[1:] == ["images decoded 0, embedded 0 (0 by encoder); text tower calls 0"]
    definitions = {row["definition"] for row in before.values()}
    after = by_name([row for row in run.rows() if row["definition"] not in definitions])
    assert {key for key in after if key[2] == "entropy"} == {
        (stage, name, "entropy") for stage in ("fp32", "temperature") for name in ("noise", "near_ood")
    }
    for key in {*before, *after}:
        if key[2] not in ("mcm", "entropy"):
            assert after[key]["metrics"] == before[key]["metrics"]


def test_a_class_list_is_encoded_once_for_each_set_of_templates(evaluated: Evaluate, base: Config, work: Work) -> None:
    second = SetConfig("embedded:fog", "id")
    evaluated(*PLAIN, sets={**base.suite.sets, "second": second})
    assert work.texts == [16]  # two heads of the same classes in the same prompts
    evaluated(*PLAIN, OTHER, "suite.images=16", sets={**base.suite.sets, "second": second})
    assert work.texts == [16]
    evaluated(*PLAIN, sets={**base.suite.sets, "second": replace(second, ood_prompts="sun2")})
    assert work.texts == [16, 32]


def test_patch_scores_of_several_references_are_told_apart(evaluated: Evaluate, work: Work) -> None:
    """Of the same classes or of others, and whatever they are called."""
    references = {
        "id": SetConfig("embedded:id", "id"),
        "second-id": SetConfig("embedded:fog", "id"),
        "third-id": SetConfig("embedded:gray", "id", prompts="sun2"),
    }
    near = {name: SetConfig("embedded:near_ood", "near_ood", name) for name in references}
    options = [*PLAIN, "callbacks.ood.scores=[gl_mcm]"]
    (run,) = evaluated(*options, sets=references | {f"near {name}": entry for name, entry in near.items()})
    assert work.rendered == {(kind, i): 1 for kind in ("id", "fog", "gray", "near_ood") for i in range(IMAGES)}
    assert list(work.encoded.values()) == [4 * IMAGES]
    beside = by_name(run.rows())
    for name, entry in references.items():
        (alone,) = evaluated(
            *options, f"output={run.folder.parent / name}", sets={name: entry, f"near {name}": near[name]}
        )
        key = "fp32", f"near {name}", "gl_mcm"
        assert by_name(alone.rows())[key]["metrics"] == beside[key]["metrics"]
    assert len({str(beside["fp32", f"near {name}", "gl_mcm"]["metrics"]) for name in references}) == 3


# -- runs side by side -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(small_fit: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two runs, of 8 and of 4 bits, and of their cache."""
    folder, plain = tmp_path_factory.mktemp("made"), [*QUICK, "suite.resamples=20"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QATLAB_CACHE", str(folder / "cache"))
        runs = [small_fit("ptq", folder, *plain, f"quant.weight.bits={bits}") for bits in (8, 4)]
    return [*(run.folder for run in runs), folder / "cache"]


@pytest.fixture
def pair(made: list[Path], tmp_path: Path) -> list[Path]:
    """Copies of the two."""
    return [Path(shutil.copytree(folder, tmp_path / "runs" / folder.name)) for folder in made[:2]]


def together(*folders: Path | str) -> str:
    return f"checkpoint=[{','.join(map(str, folders))}]"


def test_runs_side_by_side_share_every_decoded_image_and_the_fp32_model(
    evaluated: Evaluate, work: Work, pair: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = evaluated(together(*pair), OTHER, *PLAIN)
    assert [run.folder for run in runs] == pair
    assert work.rendered == {(name, i): 1 for name in SETS if name != "calibration" for i in range(IMAGES)}
    assert list(work.encoded.values()) == [3 * IMAGES] * 3  # FP32 and the two
    said = capsys.readouterr().out
    assert counted(said) == ["images decoded 96, embedded 288 (96, 96, 96 by encoder); text tower calls 1"]
    assert all(f"ptq {run.id}" in said for run in runs)


def test_each_run_has_its_rows_and_the_quantized_are_paired_with_fp32(evaluated: Evaluate, pair: list[Path]) -> None:
    definitions = {row["definition"] for row in read_rows(pair[0] / "results.jsonl")}
    runs = evaluated(together(*pair), OTHER, *PLAIN)
    found = [by_name([row for row in run.rows() if row["definition"] not in definitions]) for run in runs]
    assert found[0].keys() == found[1].keys()
    for run, rows in zip(runs, found, strict=True):
        assert {row["run_id"] for row in rows.values()} == {run.id}
        assert {stage for stage, _, _ in rows} == {"fp32", "quantized"}
        for (stage, dataset, score), row in rows.items():
            assert bool(row["paired"]) == (stage == "quantized")
            for metric, difference in row["paired"].items():
                fp32 = rows["fp32", dataset, score]["metrics"][metric]
                assert difference["value"] == pytest.approx(row["metrics"][metric] - fp32, abs=1e-12)
        assert set(rows["quantized", "id", "zero_shot"]["paired"]) == {"top1", "ece", "nll"}
        assert "auroc" in rows["quantized", "near_ood", "msp"]["paired"]
    eight, four = found
    for key in eight:
        assert (eight[key]["metrics"] == four[key]["metrics"]) == (key[0] == "fp32")
    assert [rows["quantized", "id", "zero_shot"]["weight_bits"] for rows in found] == [8, 4]


def test_scored_together_and_one_by_one_are_the_same_numbers(evaluated: Evaluate, pair: list[Path]) -> None:
    def numbers(folder: Path) -> dict[Any, Any]:
        return {key: (row["metrics"], row["intervals"], row["paired"]) for key, row in rows_of(folder).items()}

    def rows_of(folder: Path) -> dict[Any, Any]:
        return by_name([row for row in read_rows(folder / "results.jsonl") if row["definition"] not in known])

    known = {row["definition"] for row in read_rows(pair[1] / "results.jsonl")}
    before = (pair[1] / "results.jsonl").read_bytes()
    evaluated(together(*pair), OTHER, *PLAIN)
    beside = numbers(pair[1])
    (pair[1] / "results.jsonl").write_bytes(before)
    evaluated(f"checkpoint={pair[1]}", OTHER, *PLAIN)
    assert numbers(pair[1]) == beside != {}


def test_calibration_images_too_are_decoded_once_for_all_runs(
    evaluated: Evaluate, work: Work, pair: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(together(*pair), OTHER, *QUICK)
    assert work.rendered == {(name, i): 1 for name in SETS for i in range(IMAGES)}
    assert sorted(work.encoded.values()) == [3 * IMAGES, 4 * IMAGES, 4 * IMAGES]  # FP32 is not refitted
    (line,) = counted(capsys.readouterr().out)
    assert line.startswith("images decoded 128, embedded 352 (")


def test_what_one_of_the_runs_lacks_is_counted(
    evaluated: Evaluate, work: Work, pair: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(f"checkpoint={pair[0]}", OTHER, *PLAIN)
    work.forget()
    capsys.readouterr()
    evaluated(together(*pair), OTHER, *PLAIN)
    assert list(work.encoded.values()) == [3 * IMAGES]
    said = capsys.readouterr().out
    assert counted(said) == ["images decoded 96, embedded 96 (0, 96 by encoder); text tower calls 0"]
    assert f"{pair[0]} was finished before" in " ".join(said.split())


def test_what_fit_embedded_is_not_embedded_again(
    evaluated: Evaluate, work: Work, made: list[Path], pair: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that is read back from its file is the one that was quantized, for the feature store too."""
    monkeypatch.setenv("QATLAB_CACHE", str(made[2]))
    runs = evaluated(together(*pair), "callbacks.ood.scores=[msp,entropy]", *QUICK)
    assert work.nothing
    assert all("entropy" in {row["score"] for row in run.rows()} for run in runs)


def test_a_run_that_is_named_twice_is_scored_once(
    evaluated: Evaluate, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = pair[0].relative_to(tmp_path)
    runs = evaluated(together(first, f"./{first}", first), OTHER, *PLAIN)
    assert [run.folder.resolve() for run in runs] == pair[:1]
    runs = evaluated(together(first, pair[0], f"{pair[1].relative_to(tmp_path)}/../{pair[0].name}"), OTHER, *PLAIN)
    assert [run.folder.resolve() for run in runs] == pair[:1]


def test_a_run_that_is_not_finished_is_named(evaluated: Evaluate, work: Work, pair: list[Path]) -> None:
    (pair[1] / "quantized.safetensors").unlink()
    left = sorted(path.name for path in pair[1].iterdir())
    with pytest.raises(UserError, match=rf"^{pair[1]} has no quantized\.safetensors: the run is not finished"):
        evaluated(together(*pair), OTHER, *PLAIN)
    assert sum(work.encoded.values()) == 0
    assert sorted(path.name for path in pair[1].iterdir()) == left


def test_a_folder_that_is_no_run_is_named(evaluated: Evaluate, pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/config\.yaml is not there: checkpoint= wants the folder of a run"):
        evaluated(together(pair[0], tmp_path / "none"), OTHER)
    assert not (tmp_path / "none").exists()


# -- what is on disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def trees(tmp_path: Path) -> dict[str, Any]:
    """Options and sets of a suite of folders: two of the embedded classes, every other image to calibrate, noise as OOD."""
    draw, root = np.random.default_rng(0), tmp_path / "trees"
    for folder in ("shapes/circle", "shapes/star", "noise"):
        (root / folder).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(root / folder / f"{i}.png")
    sets = {
        "shapes": SetConfig("shapes", "id", pick="0::2", images=16),
        "odd": SetConfig("shapes", "calibration", pick="1::2", images=15),
        "noise": SetConfig("noise", "far_ood"),
    }
    return {"options": [f"suite.root={root}", "suite.class_names=[circle,star]"], "sets": sets}


GONE = {"gone": SetConfig(["gone", "far/gone"], "far_ood")}


def test_a_check_of_a_whole_suite_says_so_and_leaves_nothing(
    evaluated: Evaluate, trees: dict[str, Any], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(*trees["options"], "suite.check=true", sets=trees["sets"]) == []
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert " ".join(lines[0]).startswith("3 of 3 sets are there")
    assert [line[:5] for line in lines[1:]] == [
        ["shapes", "id", "folders", "16", "images"],
        ["odd", "calibration", "folders", "16", "images"],
        ["noise", "far_ood", "folders", "8", "images"],
    ]
    assert lines[1][5:9] == ["as", "published,", "8", "picked"]
    assert lines[2][5:9] == ["(published:", "15),", "8", "picked"]
    assert [path.name for path in tmp_path.iterdir()] == ["trees"]
    assert not cache.exists()


def test_a_check_of_a_suite_with_a_set_missing_names_it_and_ends_with_2(
    evaluated: Evaluate, trees: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluated(*trees["options"], "suite.check=true", sets=trees["sets"] | GONE)
    assert ended.value.code == 2
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("3 of 4 sets are there")
    assert said[-2:] == ["1 missing:", f"  gone: looked for gone, far/gone below {tmp_path / 'trees'}"]
    assert [path.name for path in tmp_path.iterdir()] == ["trees"]


def test_a_missing_set_ends_it_or_is_left_out_by_name(
    evaluated: Evaluate, trees: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, sets = trees["options"], trees["sets"] | GONE
    with pytest.raises(UserError, match=r"suite\.sets\.gone: gone is not there \(nor far/gone\).*suite\.skip_missing"):
        evaluated(*options, sets=sets)
    (run,) = evaluated(*options, "suite.skip_missing=true", sets=sets)
    assert {row["dataset"] for row in run.rows()} == {"shapes", "noise", "calibration"}
    said = capsys.readouterr().out
    assert f"left out: gone: looked for gone, far/gone below {tmp_path / 'trees'}" in said
    assert counted(said) == ["images decoded 24, embedded 24 (24 by encoder); text tower calls 1"]


def test_data_w1_rows_by_names_and_sizes_stay_and_those_by_content_are_added_once(
    evaluated: Evaluate, trees: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, sets = [*trees["options"], "callbacks.temperature=null"], trees["sets"]
    (run,) = evaluated(*options, sets=sets)
    told = "sets are known by the content of their images now"
    assert told not in capsys.readouterr().out
    new = run.rows()
    assert {row["definition_version"] for row in new} == {2}
    # As an earlier release left it: other definitions, and no word of how they were made.
    old = [row | {"definition": f"old {row['definition']}"} for row in new]
    for row in old:
        del row["definition_version"]
    run.results.write_text("".join(f"{json.dumps(row)}\n" for row in old))
    assert results.read(tmp_path / "runs").shape[0] == len(old)  # shown where there is nothing newer
    evaluated(*options, sets=sets)
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if told in line] == [f"  {told}: rows are added once of shapes, noise"]
    rows = run.rows()
    assert rows[: len(old)] == old
    assert by_name(rows[len(old) :]) == by_name(new)
    evaluated(*options, sets=sets)
    assert told not in capsys.readouterr().out
    assert run.rows() == rows
    shown = results.read(tmp_path / "runs")
    assert shown["definition_version"].to_list() == [2] * len(new)
    assert results.read(tmp_path / "runs", every=True).shape[0] == len(old) + len(new)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_every_number_is_in_the_file(evaluated: Evaluate, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = evaluated(f"format={form}", *QUICK)
    path = run.folder / f"table.{form}"
    assert f"table {path}" in " ".join(capsys.readouterr().out.split())
    table = pl.read_csv(path, infer_schema_length=None) if form == "csv" else pl.read_parquet(path)
    assert len(table) == len(run.rows())
    for row, line in zip(run.rows(), table.iter_rows(named=True), strict=True):
        assert (line["stage"], line["dataset"], line["score"]) == (row["stage"], row["dataset"], row["score"])
        assert {name: line[name] for name in row["metrics"]} == pytest.approx(row["metrics"])
        for name, (low, high) in row["intervals"].items():
            assert (line[f"{name}_low"], line[f"{name}_high"]) == pytest.approx((low, high))
        for name, difference in row["paired"].items():
            assert line[f"{name}_p"] == pytest.approx(difference["p_value"])


def test_using_a4_the_table_is_written_where_the_user_says(
    evaluated: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "paper" / "results.tex"
    (run,) = evaluated("format=latex", f"file={path}", *QUICK)
    assert f"table                  {path}" in capsys.readouterr().out
    assert not list(run.folder.glob("table.*"))
    top1 = by_name(run.rows())["fp32", "id", "zero_shot"]["metrics"]["top1"]
    line = next(line for line in path.read_text().splitlines() if line.startswith(" id"))
    cells = [cell.strip() for cell in line.removesuffix(r"\\").split("&")]
    assert cells[:5] == ["id", str(IMAGES), "tiny", "32", "FP32"]
    assert cells[5].startswith(f"{100 * top1:.1f} [")
    # The options of one call are no options of the run.
    stored = (run.folder / "config.yaml").read_text()
    assert "\nfile:" not in stored
    assert "\ntable:" not in stored


def test_using_a7_every_id_set_has_pictures(evaluated: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    sets = {name: SetConfig(path=f"embedded:{name}", role="id") for name in ("id", "gray")}
    few = [f"callbacks.{name}=null" for name in ("ood", "refits", "temperature")]
    (run,) = evaluated(*few, sets=sets)
    said = capsys.readouterr().out
    for what, name in (("reliability of id", "reliability.png"), ("reliability of gray", "reliability_gray.png")):
        assert f"{what:22} {run.folder / name}" in said
        assert (run.folder / name).exists()
    assert "mean of" not in said
    assert said.count("│ gray") == 1
    assert re.search(rf"^FP32: accuracy [\d.]+ %.* on id \(n = {IMAGES}\), ECE", said, re.MULTILINE)
    assert "python -m qatlab.fit" not in said  # that is said after a fit


def test_the_printed_table_is_short_or_whole(evaluated: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    def lines(*options: str) -> list[str]:
        evaluated(*QUICK, *options)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]

    brief, full = lines(), lines("table=full")
    assert len(brief) == 3 + 2 + 2  # id; noise; near_ood
    assert len(full) > len(brief)
    assert any("OOD, MaxLogit" in line for line in full)


def test_using_a8_models_beside_each_other_keep_their_own_fp32(evaluated: Evaluate, tmp_path: Path) -> None:
    """The embedded model, and two more whose weights lay under one path one after the other."""
    state = load_file(str(files("qatlab") / "assets" / "tiny.safetensors"))
    other = tmp_path / "other.safetensors"
    options = [*PLAIN, "callbacks.ood=null"]
    runs = evaluated(*options)
    for factor in (0.5, 0.25):
        save_file(state | {"visual.proj": state["visual.proj"] * torch.linspace(factor, 1, 192)[:, None]}, other)
        runs += evaluated(*options, f"model.checkpoint={other}")
    rows = [row for run in runs for row in run.rows()]
    columns, lines = table_lines(rows)
    known = [run.rows()[0]["fp32_id"] for run in runs]
    assert len(set(known)) == 3
    assert [column.removesuffix("\nFP32") for column in columns] == [
        "tiny",
        f"tiny {other} gelu {known[1]}",
        f"tiny {other} gelu {known[2]}",
    ]
    nll = next(line for line in lines if (line.dataset, line.label) == ("id", "NLL"))
    expected = [by_name(run.rows())["fp32", "id", "zero_shot"]["metrics"]["nll"] for run in runs]
    assert len(set(expected)) == 3
    assert [cell.text.strip() for cell in nll.cells] == [f"{value:.3f}" for value in expected]


def test_an_unknown_format_ends_it_before_anything_is_made(evaluated: Evaluate, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"format=markdwn is unknown \(did you mean 'markdown'\?\); there are csv, "):
        evaluated("format=markdwn")
    assert list(tmp_path.iterdir()) == []


# -- interruptions ---------------------------------------------------------------------------------------------------


def test_struck_between_embedding_and_scoring_nothing_is_embedded_again(
    evaluated: Evaluate, work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def store(self: Scoring) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Scoring, "store", store)
        with pytest.raises(KeyboardInterrupt):
            evaluated(*QUICK)
    assert sum(work.encoded.values()) == 4 * IMAGES
    (folder,) = (tmp_path / "runs").iterdir()
    assert {row["stage"] for row in read_rows(folder / "results.jsonl")} == {"temperature"}  # the refit alone
    work.forget()
    (run,) = evaluated(*QUICK)
    assert work.nothing
    assert {row["stage"] for row in run.rows()} == {"fp32", "temperature"}
    assert len(by_name(run.rows())) == len(run.rows())


def test_a_full_disk_is_named_and_the_same_command_goes_on(
    evaluated: Evaluate, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = Path.write_bytes, []

    def filling(self: Path, data: bytes) -> int:
        if len(written) == 2:
            with Path("/dev/full").open("wb") as device:
                return device.write(data)
        written.append(self)
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", filling)
        with pytest.raises(UserError, match=r"\.safetensors could not be written, the disk or quota is full"):
            evaluated(*PLAIN)
    work.forget()
    (run,) = evaluated(*PLAIN)
    assert list(work.encoded.values()) == [IMAGES]  # two of three sets were written
    assert {row["dataset"] for row in run.rows()} == {"id", "noise", "near_ood"}


def test_a_feature_file_cut_short_is_named_and_its_images_embedded_again(
    evaluated: Evaluate, work: Work, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = evaluated(*PLAIN, "callbacks.ood.scores=[msp]")
    before, file = by_name(run.rows()), sorted((cache / FEATURES).rglob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-9])
    work.forget()
    capsys.readouterr()
    evaluated(*PLAIN, "callbacks.ood.scores=[msp,entropy]")
    assert list(work.encoded.values()) == [IMAGES]
    said = capsys.readouterr().out
    assert f"{file} is damaged" in " ".join(said.split())
    definitions = {row["definition"] for row in before.values()}
    after = by_name([row for row in run.rows() if row["definition"] not in definitions])
    assert all(after[key]["metrics"] == row["metrics"] for key, row in before.items())


# -- what is counted and told apart ----------------------------------------------------------------------------------


def test_calls_of_a_quantized_text_tower_are_counted_as_they_are(
    small_fit: Any, work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_fit("ptq", tmp_path / "runs", "quant.tower=both", "suite.resamples=0", *PLAIN)
    (line,) = counted(capsys.readouterr().out)
    assert line.endswith(f"text tower calls {len(work.texts)}")
