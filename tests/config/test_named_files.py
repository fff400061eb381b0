"""The files that options name are known by what is in them: runs, what they are finished for, definitions."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save_file

from qatlab.config import Config, compose, load, load_contents
from qatlab.config import named_files as contents
from qatlab.core import contents as hashes
from qatlab.core.errors import UserError
from qatlab.core.signals import StopSignals
from qatlab.evaluation.negatives import described, load_words
from qatlab.results.identity import evaluation_id, identity, run_id
from qatlab.results.run import Run, Took, unfinished_beside
from qatlab.stages.opening import open_experiment
from qatlab.stages.requested import requested_runs


@pytest.fixture
def bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of texts, in the home of the user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "bank.safetensors", 0)
    return tmp_path / "bank.safetensors"


def write(path: Path, value: float) -> None:
    """Files of equal length."""
    save_file({"texts": torch.full((2, 4), float(value))}, path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def config(output: Path, **data: Any) -> Config:
    found = compose("recipe=light_qat_distill", f"output={output}")
    found.data.update(data)
    return found


def in_the_bank(found: Config, written: str) -> None:
    found.data["text_bank"] = written


def in_the_model(found: Config, written: str) -> None:
    found.model.text_features = written


def in_a_quantizer(found: Config, written: str) -> None:
    found.quant.weight["table"] = {"files": ["minmax", written]}


def in_a_rule(found: Config, written: str) -> None:
    found.quant.rules = {"*.c_fc": {"act": {"table": written}}}


@pytest.mark.parametrize("place", [in_the_bank, in_the_model, in_a_quantizer, in_a_rule])
@pytest.mark.parametrize("written", ["~/bank.safetensors:texts", "~/bank.safetensors", "{}", "{}:texts"])
def test_training_f2_other_content_under_the_same_path_is_another_run(
    bank: Path, tmp_path: Path, place: Any, written: str
) -> None:
    named = config(tmp_path)
    place(named, written.format(bank))
    first, alone = run_id(named), identity(named)
    assert alone[f"content of {written.format(bank).removesuffix(':texts')}"] == sha256(bank)
    write(bank, 1)
    assert run_id(named) != first
    write(bank, 0)
    assert run_id(named) == first


def test_training_f2_a_large_file_is_read_once(bank: Path, tmp_path: Path, cold: Path, monkeypatch: Any) -> None:
    """Once it has settled, by whichever process; a rewrite with the time of before is seen by the time of its status."""
    read: list[str] = []
    of = hashes._read
    monkeypatch.setattr(hashes, "_read", lambda path: (read.append(path), of(path))[1])
    named = config(tmp_path, text_bank=str(bank))
    with monkeypatch.context() as later:
        later.setattr(hashes, "YOUNG", 0)
        first = [run_id(named) for _ in range(3)]
        assert read == [str(bank)]
        before = bank.stat()
        time.sleep(0.02)  # a tick of the file system's clock
        write(bank, 1)
        os.utime(bank, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert run_id(named) not in first
    assert read == [str(bank), str(bank)]


def test_training_f2_what_names_no_file_is_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the working folder that is called as a choice is; shards, which are as large as the training data is."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "visual", "float", "auto", "0.tar"):
        (tmp_path / name).write_text("x")
    assert contents.of_model(config(tmp_path, shards=str(tmp_path / "0.tar"))) == {}
    assert (
        contents.of_files_in(["x" * 5000, "a\0b", "~nobody-of-this-name/x", "", ":", {"_target_": "tiny"}, 3, None])
        == {}
    )


# -- runs of earlier releases ----------------------------------------------------------------------------------------


@pytest.fixture
def older(bank: Path, tmp_path: Path) -> Config:
    """The options of a run that an earlier release began, which knew nothing of what the bank held."""
    found = config(tmp_path / "runs", text_bank=str(bank))
    with Run(found, "light_qat_distill") as run:
        run.describe("light_qat_distill")
        (run.folder / "started").touch()
    # As it was: by the id of then, and without the contents.
    theirs = {key: value for key, value in run.identity.items() if not key.startswith("content of ")}
    old = hashlib.sha256(json.dumps(theirs, sort_keys=True).encode()).hexdigest()[:8]
    folder = run.folder.rename(tmp_path / "runs" / f"light_qat_distill-{old}")
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored.pop("contents") == {str(bank): sha256(bank)}
    # OmegaConf quotes an id such as 6949e714, which it would read back as a number.
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({**stored, "run_id": old})))
    return found


def opened(found: Config) -> Run:
    with Run(found, "light_qat_distill") as run:
        run.describe("light_qat_distill")
        (run.folder / "started").touch()
    return run


def test_training_f2_an_older_run_is_continued_and_told_once(
    older: Config, bank: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = opened(older)
    (folder,) = Path(older.output).iterdir()
    assert run.folder == folder
    assert folder.name.endswith(run.id)
    assert run.id != run_id(older)
    assert f"does not say what {bank} held when it was made" in capsys.readouterr().out
    assert load_contents(folder / "config.yaml") == {str(bank): sha256(bank)}
    assert load(folder / "config.yaml")[2] == run.id  # and all the rest is as it was
    assert not any(key.startswith("content of") for key in run.identity)  # as its checkpoints say
    assert opened(older).folder == folder
    assert capsys.readouterr().out == ""


def test_training_f2_and_from_then_on_it_is_known_by_content(older: Config, bank: Path) -> None:
    folder = opened(older).folder
    write(bank, 1)
    other = opened(older)
    assert other.folder != folder
    assert other.id == run_id(older)
    assert opened(older).folder == other.folder
    write(bank, 0)
    assert opened(older).folder == folder


def test_training_f2_force_makes_a_run_of_its_own(older: Config) -> None:
    older.force = True
    assert opened(older).id == run_id(older)


def test_training_f2_the_files_that_ids_knew_before_are_not_asked_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "weights.safetensors", 0)
    found = config(tmp_path / "runs")
    found.model.checkpoint = str(tmp_path / "weights.safetensors")
    run = opened(found)
    stored = yaml.safe_load((run.folder / "config.yaml").read_text())
    del stored["contents"]
    (run.folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(stored)))
    assert opened(found).folder == run.folder
    assert capsys.readouterr().out == ""


def test_training_f2_an_interrupted_run_of_other_content_is_named(bank: Path, tmp_path: Path) -> None:
    found = config(tmp_path / "runs", text_bank=str(bank))
    first, before = opened(found), sha256(bank)
    (first.folder / "checkpoints").mkdir()
    (first.folder / "checkpoints" / "step=1.ckpt").touch()
    write(bank, 1)
    (line,) = unfinished_beside(opened(found), "light_qat_distill")
    assert f"content of {bank}={before} there, {sha256(bank)} here" in line


def test_training_f2_a_stored_run_is_not_scored_with_other_files(bank: Path, tmp_path: Path) -> None:
    found = config(tmp_path / "runs")
    found.model.text_features = str(bank)
    run = opened(found)
    asked = compose("recipe=ptq", f"checkpoint={run.folder}")
    assert requested_runs(asked, "evaluate")[0].run.id == run.id
    write(bank, 1)
    with pytest.raises(UserError, match=rf"{bank} is not what {run.folder} was made with: put the file of then back"):
        requested_runs(asked, "evaluate")
    bank.unlink()  # who reads it says so
    assert requested_runs(asked, "evaluate")[0].run.id == run.id


# -- what is scored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["class_names", "classes", "negatives", "callbacks"])
def test_training_f2_a_run_is_not_finished_for_other_class_files(tmp_path: Path, option: str) -> None:
    found = compose("recipe=ptq", f"output={tmp_path}", f"suite.root={tmp_path}")
    words = tmp_path / ("noun.animal.txt" if option == "negatives" else "words.txt")
    words.write_text("cat\ndog\n")
    if option == "class_names":
        found.suite.class_names = "words.txt"
    elif option == "classes":
        found.suite.sets["id"].classes = "words.txt"
    elif option == "negatives":
        found.suite.negatives = str(tmp_path)
    else:
        found.callbacks["mine"] = {"_target_": "builtins.dict", "words": str(words)}
    with Run(found, "ptq") as run:
        run.finish(Took(1.0, 0))
    first = evaluation_id(found)
    assert Run(found, "ptq").finished() == Took(1.0, 0)
    words.write_text("cat\ncow\n")
    assert evaluation_id(found) != first
    assert Run(found, "ptq").finished() is None
    assert Run(found, "ptq").id == run.id  # the model is the same


def test_training_f2_definitions_go_by_the_files_of_callbacks(small: Callable[..., Config], tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    found = small("fp32", f"output={tmp_path}")
    found.callbacks["mine"] = {"_target_": "builtins.dict", "words": str(words)}
    definitions = []
    for text in ("cat", "cow", "cat"):
        words.write_text(text)
        with Run(found, "fp32") as run, StopSignals() as stop:
            suite = open_experiment(found, run, "fp32", stop).suite
        definitions.append([entry.source.definition for entry in suite.sets])
    assert definitions[0] == definitions[2] != definitions[1]


def test_training_f2_definitions_go_by_the_words_of_a_folder(tmp_path: Path) -> None:
    assert described("imagenet1k") == "imagenet1k"
    (tmp_path / "noun.animal.txt").write_text("cat\ndog\n")
    first = described(str(tmp_path))
    (tmp_path / "noun.animal.txt").write_text("cat\ncow\n")
    assert load_words(str(tmp_path)).nouns == ["cat", "cow"]
    assert described(str(tmp_path)) != first
    assert described(str(tmp_path / "absent")) == str(tmp_path / "absent")  # whoever needs them says so
