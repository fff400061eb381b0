"""Files that were cut off, changed or lost, and disks that do not take any: named, made again, and never other numbers."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from qatlab.config import compose, load
from qatlab.core import damage
from qatlab.core.checksums import (
    read_json,
    read_table,
    read_tensors,
    sealed,
    unsealed,
    write_json,
    write_table,
    write_tensors,
)
from qatlab.core.errors import UserError
from qatlab.core.files import atomic, cache_dir, cache_lock, lock
from qatlab.data.embedded.sets import write_caption_shards
from qatlab.evaluate import evaluate
from qatlab.models.zeroshot import class_features
from qatlab.results.rows import read_rows
from qatlab.results.run import Run, unfinished_beside
from qatlab.training.checkpoints import AtomicCheckpointIO

Fit = Callable[..., Run]
QUICK = ["suite.resamples=0"]
TRAINED = "light_qat_lsq_pc"


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["stage"], row["step"], row["dataset"], row["score"]


def told(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in one order, whatever the order they were written in."""
    return sorted(rows, key=key)


@pytest.fixture(scope="module")
def whole(small_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that is never touched."""
    return small_fit("ptq", tmp_path_factory.mktemp("whole"), *QUICK).folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def again(small_fit: Fit, copy: Path) -> Run:
    """The same command on the run in ``copy``."""
    return small_fit("ptq", copy.parent, *QUICK)


# -- lost rows -------------------------------------------------------------------------------------------------------


def cut(lines: list[bytes]) -> bytes:
    return b"".join(lines)[:-40]


def without_last(lines: list[bytes]) -> bytes:
    return b"".join(lines[:-1])


def of_an_older_release(lines: list[bytes]) -> bytes:
    """An append that a full disk cut in the middle, when rows had no checksum yet."""
    plain = b"".join(json.dumps(unsealed(line)).encode() + b"\n" for line in lines)
    return plain[: len(plain) * 9 // 10]


def without_the_refit(lines: list[bytes]) -> bytes:
    return b"".join(line for line in lines if b"logit_scale_fit" not in line)


@pytest.mark.parametrize("lose", [cut, without_last, of_an_older_release, without_the_refit])
def test_faults_a1_lost_rows_are_scored_again(small_fit: Fit, whole: Path, copy: Path, lose: Any, capsys: Any) -> None:
    file = copy / "results.jsonl"
    file.write_bytes(lose(file.read_bytes().splitlines(keepends=True)))
    run = again(small_fit, copy)
    assert told(run.rows()) == told(read_rows(whole / "results.jsonl"))
    said = capsys.readouterr().out
    assert "embedded 0" in said  # nothing but rows was computed
    assert "scored again by the command that made them" in said
    assert run.finished() is not None
    again(small_fit, copy)
    assert "scored again" not in capsys.readouterr().out


def test_faults_a1_another_command_says_that_rows_were_lost(copy: Path, capsys: Any) -> None:
    (copy / "results.jsonl").write_bytes(b"")
    with Run(compose("recipe=ptq", *QUICK), "ptq", copy):
        assert re.search(r"results\.jsonl has lost rows: it has \d{4,} bytes less than", capsys.readouterr().out)


def test_faults_a1_a_whole_older_run_is_not_scored_again(small_fit: Fit, copy: Path, capsys: Any) -> None:
    file = copy / "results.jsonl"
    rows = read_rows(file)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished = json.loads((copy / "finished.json").read_text())
    (copy / "finished.json").write_text(
        json.dumps({name: of[:2] for name, of in finished.items() if name != "checksum"})
    )
    assert again(small_fit, copy).rows() == rows
    assert "nothing left to compute" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["contexts.jsonl", "results.jsonl"])
def test_faults_a1_an_append_is_undone_by_a_full_disk(whole: Path, copy: Path, monkeypatch: Any, name: str) -> None:
    """Of options that no row was stored with yet, so that both files are added to."""
    run = Run(compose("recipe=ptq"), "ptq", copy)
    before, sync = run.results.read_bytes(), os.fsync

    def full(number: int) -> None:
        if os.path.samestat(os.fstat(number), (copy / name).stat()):
            raise OSError(28, "No space left on device")
        sync(number)

    row = {**run.rows()[0], "dataset": "other"}
    with monkeypatch.context() as patch:
        patch.setattr("qatlab.core.files.os.fsync", full)
        stored = (copy / name).read_bytes()
        with pytest.raises(UserError, match=rf"{name} could not be written, the disk or quota is full"):
            run.append([row, {**row, "score": "msp"}])
        assert (copy / name).read_bytes() == stored
    assert run.results.read_bytes() == before
    run.append([row, {**row, "score": "msp"}])
    assert [(found["score"], found["config"]["suite.images"]) for found in run.rows()[-2:]] == [
        (row["score"], 512),
        ("msp", 512),
    ]


def test_faults_a1_a_sweep_does_not_take_a_run_with_lost_rows_for_finished(small_fit: Fit, copy: Path) -> None:
    run = again(small_fit, copy)
    assert run.finished() is not None
    run.results.write_bytes(without_last(run.results.read_bytes().splitlines(keepends=True)))
    assert run.finished() is None


def test_every_evaluation_says_what_rows_it_gives(small: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Over all roles of the embedded suite: what is expected is what is stored, so that nothing is scored again."""
    from qatlab.stages.score import Scoring

    expected: set[tuple[str, str, str]] = set()
    missing = Scoring.__init__

    def noting(self: Scoring, experiment: Any, views: Any, suite: Any = None) -> None:
        missing(self, experiment, views, suite)
        if suite is None:
            from qatlab.evaluation.evaluation import Evaluation, Pass

            scored = [entry for entry in experiment.suite.sets if entry.source.role != "calibration"]
            images = {entry.source: len(entry.images) for entry in scored}
            every = [view for reading in self.readings for view in reading.views]
            of = Pass(every, list(images), torch.device("cpu"), available=experiment.needs.available)
            for evaluation in experiment.evaluations.by_name.values():
                if isinstance(evaluation, Evaluation):
                    expected.update(
                        (v.stage, s.name, score) for v, s, score in evaluation.expected(of, images) if score
                    )

    monkeypatch.setattr(Scoring, "__init__", noting)
    options = compose(
        "trainer.accelerator=cpu", "suite.images=20", "suite.resamples=0", "fit.workers=0", "wandb.mode=disabled",
        "callbacks.refits.kinds=[temperature,isotonic]", f"output={tmp_path}",
    )  # fmt: skip
    (run,) = evaluate(options, "evaluate")
    stored = {(row["stage"], row["dataset"], row["score"]) for row in run.rows()}
    assert {score for _, _, score in stored} > {"one_vs_all", "refit_isotonic", "msp", "zero_shot"}
    assert expected == {of for of in stored if of[2] != "logit_scale_fit"}


# -- checksums -------------------------------------------------------------------------------------------------------


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1
    path.write_bytes(content)


TABLE = pl.DataFrame(
    {"set": ["a", "b", None], "index": [0, 1, 2], "right": [True, None, False], "nll": [0.5, None, float("nan")]}
)


@pytest.mark.parametrize(
    ("write", "read_back", "content"),
    [
        (write_tensors, lambda path: read_tensors(path)[0]["x"].tolist(), {"x": torch.arange(64.0)}),
        (write_json, read_json, {"logit_scale": 24.13332748413086, "temperature/0a1b2c3d": 31.5}),
        (write_table, lambda path: read_table(path).to_dict(as_series=False), TABLE),
        (lambda path, row: path.write_text(sealed(row)), lambda path: unsealed(path.read_bytes()), {"metrics": {"top1": 0.96875}}),
    ],
    ids=["tensors", "json", "table", "line"],
)  # fmt: skip
def test_no_flipped_bit_gives_other_values(tmp_path: Path, write: Any, read_back: Any, content: Any) -> None:
    from qatlab.core.damage import DAMAGES

    path = tmp_path / "file"
    write(path, content)
    stored, right = path.read_bytes(), read_back(path)
    caught = 0
    for place in range(len(stored)):
        path.write_bytes(stored)
        flipped(path, place)
        try:
            found = read_back(path)
        except (*DAMAGES, OSError):
            caught += 1
        else:  # of what the file says of itself
            assert (
                {name: str(of) for name, of in found.items() if name in right}
                == {name: str(of) for name, of in right.items()}
                if isinstance(right, dict)
                else found == right
            )
    assert caught > len(stored) / 2


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "unmarked"])
def test_faults_a2_a_damaged_text_cache_is_made_again(
    clip: Any, calls: list[int], cold: Path, damage: str, capsys: Any
) -> None:
    right = class_features(clip, ["circle", "star"], ["a {}"]).features
    (file,) = (cold / "text").glob("*.safetensors")
    if damage == "flipped":
        flipped(file, -3)
    elif damage == "unmarked":
        save_file({"features": -right}, file)
    else:
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-40])
    assert torch.equal(class_features(clip, ["circle", "star"], ["a {}"]).features, right)
    assert len(calls) == 2
    assert f"{file} is damaged (" in capsys.readouterr().out
    assert file.with_suffix(".damaged").exists()
    assert torch.equal(class_features(clip, ["circle", "star"], ["a {}"]).features, right)
    assert len(calls) == 2


@pytest.fixture(scope="module")
def clip() -> Any:
    from qatlab.config import ModelConfig
    from qatlab.models import clip as clips

    return clips.load(ModelConfig())


@pytest.fixture(scope="module")
def trained(small_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_fit(TRAINED, tmp_path_factory.mktemp("trained"), *QUICK).folder


def test_faults_a3_a_changed_weight_is_found(small_fit: Fit, trained: Path, tmp_path: Path, capsys: Any) -> None:
    """An exponent bit of the trained model is named, one of the calibrated model is made again."""
    copy = Path(shutil.copytree(trained, tmp_path / trained.name))
    model = read_tensors(copy / "model.safetensors")[0]
    for name in ("model", "quantized"):
        flipped(copy / f"{name}.safetensors", -1)
    for run in (
        lambda: small_fit(TRAINED, tmp_path, *QUICK),
        lambda: evaluate(compose(f"checkpoint={copy}"), "evaluate"),
    ):
        with pytest.raises(UserError, match=r"\.safetensors (is damaged|cannot be read) \(its checksum is wrong\)"):
            run()
    assert "quantized.safetensors is damaged (its checksum is wrong): it is kept as" in capsys.readouterr().out
    assert (copy / "quantized.safetensors").exists()
    (copy / "model.safetensors").unlink()  # as the sentence says
    run = small_fit(TRAINED, tmp_path, *QUICK)
    again = read_tensors(copy / "model.safetensors")[0]
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.items())
    assert told(run.rows()) == told(read_rows(trained / "results.jsonl"))


@pytest.mark.parametrize("lost", ["state_dict", "optimizer_states"])
def test_faults_a4_a_checkpoint_that_lacks_a_tensor_is_refused(
    small_fit: Fit, tmp_path: Path, monkeypatch: Any, lost: str
) -> None:
    save = AtomicCheckpointIO.save_checkpoint

    def stopping(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        save(self, checkpoint, path, storage_options)
        raise UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", stopping)
        with pytest.raises(UserError, match="stopped"):
            small_fit(TRAINED, tmp_path, *QUICK)
    (path,) = tmp_path.glob("*/checkpoints/*.ckpt")
    content = torch.load(path, weights_only=True)
    name = next(iter(content["state_dict"]))
    if lost == "state_dict":
        del content["state_dict"][name]
        del content["tensors"]  # as an older release wrote it
    else:
        name = "exp_avg"
        del content["optimizer_states"][0]["state"][0]["exp_avg"]
    torch.save(content, path)
    with pytest.raises(UserError, match=rf"step=1\.ckpt lacks 1 of \d+ tensors .*{name}"):
        small_fit(TRAINED, tmp_path, *QUICK)


# -- damaged files of a run and of the cache ---------------------------------------------------------------------------

GARBAGE = {
    "finished.json": [b"\xff\x00", b"", b"[1]", b'{"0a1b2c3d": "x"}'],
    "config.yaml": [b": [", b"", b"5"],
    "predictions/quantized.parquet": [b"PAR1", b""],
    "results.jsonl": [b"5\nnull\n[]\n\xff\xfe\n{}\n"],
    "layers.csv": [b"\xff", b""],
    "scales.json": [b"{", b"[]", b'{"logit_scale": "x"}', b'{"logit_scale": NaN}'],
    "metrics.csv": [b"\x00\xff", b"no,curves\n1,2\n", b"step,loss\n1,x\n"],
}


def test_a_file_is_not_damaged_because_memory_is_short(tmp_path: Path) -> None:
    (tmp_path / "state.pt").touch()

    def read(_: Path) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        damage.whole(tmp_path / "state.pt", read)
    assert (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("turn", range(4))
def test_faults_t1_damaged_files_of_a_finished_run_are_named_and_made_again(
    small_fit: Fit, trained: Path, tmp_path: Path, capsys: Any, turn: int
) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / trained.name))
    for name, contents in GARBAGE.items():
        (copy / name).write_bytes(contents[turn % len(contents)])
    run = small_fit(TRAINED, tmp_path, *QUICK)
    said = capsys.readouterr().out
    for name in GARBAGE:
        assert f"{copy / name} " in said, said
    right, found = told(read_rows(trained / "results.jsonl")), told(run.rows())
    assert found == [row for row in right if row["stage"] != "probe"]  # a probe is of a training that is over
    assert read_table(copy / "predictions" / "quantized.parquet").height > 0
    assert load(copy / "config.yaml")[2] == run.id
    assert small_fit(TRAINED, tmp_path, *QUICK).finished() is not None
    assert "nothing left to compute" in capsys.readouterr().out


def test_faults_t1_a_damaged_config_is_named_where_a_run_is_evaluated(copy: Path) -> None:
    changed = (copy / "config.yaml").read_bytes().replace(b"calibration_images: 16", b"calibration_images: 17")
    for content in (b": [", b"\xff", changed):
        (copy / "config.yaml").write_bytes(content)
        with pytest.raises(UserError, match=r"config\.yaml is damaged, or was made by another version"):
            evaluate(compose(f"checkpoint={copy}"), "evaluate")


def test_faults_t1_a_changed_shard_of_the_embedded_world_is_written_again(tmp_path: Path, capsys: Any) -> None:
    paths = write_caption_shards(tmp_path, 8, per_shard=4)
    before = [path.read_bytes() for path in paths]
    for harm in (lambda path: flipped(path, 3000), lambda path: path.write_bytes(b""), Path.unlink):
        harm(paths[1])
        assert [path.read_bytes() for path in write_caption_shards(tmp_path, 8, per_shard=4)] == before
    (tmp_path / "world.json").write_bytes(b"[")
    assert [path.read_bytes() for path in write_caption_shards(tmp_path, 8, per_shard=4)] == before
    assert capsys.readouterr().out.count(f"{paths[1]} is damaged (its checksum is wrong)") == 2


def test_faults_t1_a_cut_copy_of_a_remote_shard_is_fetched_again(tmp_path: Path, cold: Path, capsys: Any) -> None:
    from qatlab.data.storage.tars import load_index

    (shard,) = write_caption_shards(tmp_path / "far", 4)
    url = f"pipe:cat {shard}"
    whole_index = load_index(url)
    (stored,) = (cold / "shards").glob("*.tar")
    stored.write_bytes(stored.read_bytes()[:-3000])
    again = load_index(url)
    assert (again.keys, again.damage) == (whole_index.keys, "")
    assert f"{stored} is damaged (it has " in capsys.readouterr().out
    for index in (cold / "index").glob("*.npz"):
        index.write_bytes(b"PK")
    assert load_index(url).keys == whole_index.keys
    assert "npz is damaged (" in capsys.readouterr().out


def test_faults_t2_a_name_with_a_pattern_in_it_is_a_name(tmp_path: Path, monkeypatch: Any) -> None:
    """polars takes ``*``, ``?`` and brackets in a path for a pattern: it would read the other folder's too."""
    from qatlab.results.curves import merge_curves

    for folder, value in (("r[1]*?", 0.25), ("r1xx", 0.5), ("r[1]*? b", 0.75)):
        (tmp_path / folder / "curves" / "version_0").mkdir(parents=True)
        (tmp_path / folder / "curves" / "version_0" / "metrics.csv").write_text(f"step,loss\n1,{value}\n")
        write_table(tmp_path / folder / "p.parquet", pl.DataFrame({"value": [value]}))
    for folder, value in (("r[1]*?", 0.25), ("r1xx", 0.5)):
        assert read_table(tmp_path / folder / "p.parquet")["value"].to_list() == [value]
        merged = merge_curves(tmp_path / folder)
        assert merged is not None
        assert pl.read_csv(merged.read_bytes())["loss"].to_list() == [value]
    # so is a recipe's, where interrupted runs of it are looked for
    config = compose("recipe=ptq", f"output={tmp_path}")
    (tmp_path / "mine-0a1b2c3d" / "checkpoints").mkdir(parents=True)
    (tmp_path / "mine-0a1b2c3d" / "checkpoints" / "step=1.ckpt").touch()
    assert unfinished_beside(Run(config, "m*e"), "m*e") == []


# -- what a disk and its rights allow ----------------------------------------------------------------------------------


@contextmanager
def plain_user() -> Iterator[None]:
    """Inside this context root too is bound by the rights of files, as any user is (Linux's capabilities are put down)."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    kept, without = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, kept) == 0
    ctypes.memmove(without, kept, ctypes.sizeof(kept))
    without[0] &= ~0b1111  # CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER; effective ones only, which come back
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, kept) == 0


def rights(folder: Path, files: int, folders: int) -> None:
    for path in (*folder.rglob("*"), folder):
        path.chmod(folders if path.is_dir() else files)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("locked", [True, False], ids=["with its lock", "without a lock"])
def test_faults_t3_a_finished_run_is_shown_from_a_disk_that_is_read_only(
    small: Any, small_fit: Fit, copy: Path, capsys: Any, locked: bool
) -> None:
    if not locked:
        (copy / ".lock").unlink()
    rights(copy, 0o444, 0o555)
    before = content_of(copy)
    config = small("ptq", *QUICK, f"checkpoint={copy}")
    with plain_user():
        again(small_fit, copy)
        shown = capsys.readouterr().out
        evaluate(config, "evaluate")
        shown_again = capsys.readouterr().out
        other = small("ptq", *QUICK, "suite.seed=1", f"checkpoint={copy}")
        with pytest.raises(
            UserError, match=r"cannot be written to, and there is something left to compute \(scoring: "
        ):
            evaluate(other, "evaluate")
    for said in (shown, shown_again):
        assert f"{copy} cannot be written to: what it holds is shown" in said
        assert "AUROC" in said
        assert f"reliability            {copy / 'reliability.png'}" in said
    assert content_of(copy) == before
    rights(copy, 0o644, 0o755)


def test_faults_t3_a_cache_that_is_read_only_is_read(clip: Any, calls: list[int], cold: Path) -> None:
    right = class_features(clip, ["circle", "star"], ["a {}"]).features
    rights(cold, 0o444, 0o555)
    with plain_user():
        assert torch.equal(class_features(clip, ["circle", "star"], ["a {}"]).features, right)
        with pytest.raises(
            UserError,
            match=r"cache/\w+/\w+ cannot be written to \(Permission denied\): make room",
        ):
            class_features(clip, ["circle", "leaf"], ["a {}"])
    rights(cold, 0o644, 0o755)


def test_faults_t3_a_cache_that_was_removed_is_made_again(clip: Any, cold: Path) -> None:
    from qatlab.data.storage.decoded import DecodedImages

    class_features(clip, ["circle", "star"], ["a {}"])
    decoded = DecodedImages(clip.preprocess)
    shutil.rmtree(cold)
    pixels = memoryview(bytearray(decoded.size))
    decoded.write("pool", 0, pixels)
    assert decoded.read("pool", 0, pixels)
    assert class_features(clip, ["circle", "star"], ["a {}"]).features.shape == (2, 64)


def test_faults_t3_no_home_is_a_sentence(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.delenv("QATLAB_CACHE")
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    with pytest.raises(UserError, match=r"HOME is not set.*QATLAB_CACHE=FOLDER"):
        cache_dir("text")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/x", "n" * 300], ids=["file", "below", "proc", "long"])
def test_faults_t3_an_output_or_cache_that_cannot_be_is_a_sentence(
    tmp_path: Path, monkeypatch: Any, place: str
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / place
    monkeypatch.setenv("QATLAB_CACHE", str(folder))
    with pytest.raises(UserError, match=r"cannot be made or written \("):
        Run(compose("recipe=ptq", f"output={folder}"), "ptq").__enter__()
    with pytest.raises(UserError, match=r"cannot be written to \("):
        cache_dir("text")


SPEAKING = """
import sys
from pathlib import Path
from qatlab.cli import errors_as_sentences
with errors_as_sentences(None):
    for number in range(20000):
        print("a line of a long table", number)
    print("an error nobody reads", file=sys.stderr)
    Path(sys.argv[1]).write_text("finished")
"""


@pytest.mark.parametrize("stdout", ["| head -1", "> /dev/full", ">&-", "2>&1 | head -1", "> /dev/full 2> /dev/full"])
def test_faults_t3_output_that_nobody_reads_ends_no_run(
    subprocess_environment: dict[str, str], tmp_path: Path, stdout: str
) -> None:
    (tmp_path / "speak.py").write_text(SPEAKING)
    line = f"set -o pipefail; {sys.executable} speak.py done {stdout}"
    ended = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=subprocess_environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "done").read_text() == "finished"
    assert "Exception ignored" not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_training_f6_a_lock_of_another_user_can_be_locked(cold: Path) -> None:
    """One that this process may read only, as others may those that a umask of 077 would have made."""
    before = os.umask(0o077)
    try:
        with cache_lock("name") as file:
            assert lock(file, wait=False) is True
    finally:
        os.umask(before)
    path = cold / "locks" / "name"
    assert path.stat().st_mode & 0o777 == 0o666
    path.chmod(0o444)
    path.parent.chmod(0o555)
    with plain_user(), cache_lock("name") as file, cache_lock("name") as other:
        assert lock(file, wait=False) is True
        assert lock(other, wait=False) is False
    path.parent.chmod(0o755)


@pytest.mark.parametrize("mode", [0o1777, 0o2775, 0o755])
def test_training_f6_the_folders_of_a_cache_are_open_to_whom_it_is(cold: Path, mode: int) -> None:
    cold.mkdir()
    cold.chmod(mode)
    for parts in (("text",), ("locks", "turns"), ("decoded", "0a1b")):
        folder = cache_dir(*parts)
        while folder != cold:
            assert folder.stat().st_mode & 0o7777 == mode
            folder = folder.parent
    with atomic(cache_dir("text") / "file") as temporary:
        temporary.write_text("made")
    assert (cold / "text" / "file").stat().st_mode & 0o777 == 0o644


def test_training_f6_a_folder_that_cannot_be_written_is_a_sentence(cold: Path) -> None:
    cold.mkdir(mode=0o555)
    with plain_user():
        for use in (lambda: cache_dir("text"), lambda: cache_lock("name").close()):
            with pytest.raises(
                UserError, match=rf"{cold}/\w+ cannot be written to \(Permission denied\): make room or rights"
            ):
                use()
    cold.chmod(0o755)


def test_training_f6_decoded_images_of_another_user_are_read_and_added_to(cold: Path, clip: Any) -> None:
    from qatlab.data.storage.decoded import DecodedImages

    cold.mkdir()
    cold.chmod(0o1777)
    pixels = memoryview(bytearray(b"\x05" * (3 * clip.preprocess.size**2)))
    DecodedImages(clip.preprocess).write("pool", 0, pixels)
    (file,) = (cold / "decoded-2").rglob("*.u8")
    assert file.stat().st_mode & 0o777 == 0o666
    file.chmod(0o444)
    with plain_user():
        found = memoryview(bytearray(len(pixels)))
        assert DecodedImages(clip.preprocess).read("pool", 0, found)
        assert found == pixels
        with pytest.raises(UserError, match=r"cannot be written to \(Permission denied\)"):
            DecodedImages(clip.preprocess).write("pool", 1, pixels)
