"""A run that was stopped, killed or damaged at any point ends with the same weights, to the last bit."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import polars as pl
import pytest
import torch
from brief import BRIEF, with_options
from torch.utils.data import DataLoader

from qatlab.config import Config, compose
from qatlab.core.errors import UserError
from qatlab.data.captions.batches import StreamedBatches
from qatlab.data.embedded.sets import write_caption_shards
from qatlab.fit import fit
from qatlab.results.rows import read_rows
from qatlab.results.run import Run
from qatlab.stages.faults import Faults
from qatlab.training.checkpoints import MADE_WITH, checkpoints
from qatlab.training.student import Student

Fit = Callable[..., Run]
Options = Callable[..., Config]

# Runs the command line, and strikes the process of one rank with a signal where it is told to.
STRIKING = """
import os, signal
from qatlab.training.checkpoints import AtomicCheckpointIO
from qatlab.evaluation.embedding import Embedder
from qatlab.training.student import Student

number, place, step, rank = os.environ["STRIKE"].split(",")

def strike(module):
    if module.global_step != int(step):
        return
    if rank == "group":  # what a terminal does
        os.killpg(0, int(number))
    elif os.environ.get("LOCAL_RANK", "0") == rank:
        os.kill(os.getpid(), int(number))

train, validate, save = Student.training_step, Student.validation_step, Student.on_save_checkpoint
write = AtomicCheckpointIO.save_checkpoint
predict = Embedder.predict_step

def training_step(self, batch, batch_idx):
    if place == "train":
        strike(self)
    return train(self, batch, batch_idx)

def validation_step(self, batch, batch_idx, dataloader_idx=0):
    if place == "probe" and dataloader_idx == 1:
        strike(self)
    return validate(self, batch, batch_idx, dataloader_idx)

def predict_step(self, batch, batch_idx, dataloader_idx=0):
    if place == "quantized" and len(self.encoders) == 2 and dataloader_idx == 1:  # FP32 goes along with it
        strike(self)
    return predict(self, batch, batch_idx, dataloader_idx)

def on_save_checkpoint(self, checkpoint):
    if place == "save":
        strike(self)
    return save(self, checkpoint)

def save_checkpoint(self, checkpoint, path, storage_options=None):
    write(self, checkpoint, path, storage_options)
    if place == "saved" and str(path).endswith(f"step={step}.ckpt"):
        os.kill(os.getpid(), int(number))

Student.training_step, Student.validation_step = training_step, validation_step
AtomicCheckpointIO.save_checkpoint = save_checkpoint
Embedder.predict_step = predict_step
Student.on_save_checkpoint = on_save_checkpoint

if __name__ == "__main__":
    from qatlab.fit import main
    main()
"""
RECIPE = "light_qat_lsq_pc"
LOOPED = ["fit.steps=6", "fit.checkpoint_every=2", "fit.eval_every=3", *BRIEF, "fit.lr=1e-4"]
STREAMED = [*LOOPED, "fit.unique_samples=null"]
Struck = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def command(
    python: str,
    subprocess_environment: dict[str, str],
    small_options: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Struck:
    """``command(output, strike, *options)``: the command line in a process of its own, struck by "signal,place,step,rank".

    The process is forked, or with ``real=True`` started by Python itself.
    """
    program = tmp_path_factory.mktemp("program") / "fit.py"
    program.write_text(STRIKING)

    def run(
        output: Path, strike: str, *options: str, real: bool = False, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        base = [*small_options, "fit.batch_size=8", "fit.unique_samples=16"]
        line = [
            sys.executable if real else python,
            str(program),
            f"recipe={RECIPE}",
            f"output={output}",
            *with_options(base, *options),
        ]
        cache = os.environ["QATLAB_CACHE"]  # a test may have one of its own
        environment = {**subprocess_environment, "QATLAB_CACHE": cache, "STRIKE": strike}
        return subprocess.run(line, env=environment, cwd=output, capture_output=True, text=True, timeout=300, **more)

    return run


NOWHERE = "0,nowhere,0,0"


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def the_run(output: Path) -> Path:
    (folder,) = (path for path in output.iterdir() if (path / "config.yaml").exists())
    return folder


@pytest.fixture(scope="module")
def unstopped(small_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Run]:
    """``unstopped(options)``: that run without a stop, computed once."""
    done: dict[str, Run] = {}

    def get(options: list[str]) -> Run:
        key = " ".join(options)
        if key not in done:
            done[key] = small_fit(RECIPE, tmp_path_factory.mktemp("unstopped"), *options)
        return done[key]

    return get


def same(run: Run, other: Run) -> bool:
    return weights(run.folder) == weights(other.folder) and run.rows() == other.rows()


# -- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)], ids=["int", "term", "usr1"]
)
def test_a_signal_stops_behind_the_step_with_a_checkpoint(
    command: Struck, small_fit: Fit, unstopped: Any, tmp_path: Path, number: int, code: int, capsys: Any
) -> None:
    stopped = command(tmp_path, f"{int(number)},train,4,0", *LOOPED, real=number == signal.SIGINT)
    assert stopped.returncode == code, stopped.stderr
    assert stopped.stderr.strip().splitlines() == [
        f"qatlab: stopped by {signal.Signals(number).name}; the same command goes on from the last checkpoint or finished stage."
    ]
    kept = [path.name for path in checkpoints(the_run(tmp_path) / "checkpoints")]
    assert kept == ["step=5.ckpt", "step=4.ckpt"]
    run = small_fit(RECIPE, tmp_path, *LOOPED)
    assert "training on from step=5.ckpt" in capsys.readouterr().out
    assert same(run, unstopped(LOOPED))
    assert curves(run.folder) == curves(unstopped(LOOPED).folder)


def test_a_second_ctrl_c_stops_at_once(small_fit: Fit, unstopped: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from qatlab.core.signals import Stopped

    step = Student.training_step

    def impatient(self: Student, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Student, "training_step", impatient)
        with pytest.raises(Stopped):
            small_fit(RECIPE, tmp_path, *LOOPED)
    assert [path.name for path in checkpoints(the_run(tmp_path) / "checkpoints")] == ["step=3.ckpt", "step=2.ckpt"]
    assert signal.getsignal(signal.SIGINT) == before
    assert same(small_fit(RECIPE, tmp_path, *LOOPED), unstopped(LOOPED))


def test_a_signal_while_scoring_repeats_that_pass_alone(
    command: Struck, small_fit: Fit, unstopped: Any, tmp_path: Path, capsys: Any, cold: None
) -> None:
    stopped = command(tmp_path, f"{int(signal.SIGTERM)},quantized,0,0", *LOOPED)
    assert stopped.returncode == 75, stopped.stderr
    run = small_fit(RECIPE, tmp_path, *LOOPED)
    said = capsys.readouterr().out
    assert "quantized: scoring" in said
    assert "fp32: scoring" not in said
    assert same(run, unstopped(LOOPED))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_loader_processes_leave_a_signal_to_their_parent(
    command: Struck, tmp_path: Path, number: signal.Signals
) -> None:
    """A terminal's Ctrl-C, and often a scheduler's signal, reaches every process of the group."""
    stopped = command(tmp_path, f"{int(number)},train,4,group", *STREAMED, "fit.workers=2", start_new_session=True)
    assert stopped.returncode == (130 if number == signal.SIGINT else 75), stopped.stderr
    assert len(stopped.stderr.strip().splitlines()) == 1
    assert checkpoints(the_run(tmp_path) / "checkpoints")[0].name == "step=5.ckpt"


@pytest.mark.parametrize("step", [3, 6], ids=["before a probe", "last"])
def test_a_signal_while_a_checkpoint_is_written_is_heeded(
    command: Struck, small_fit: Fit, unstopped: Any, tmp_path: Path, step: int
) -> None:
    stopped = command(tmp_path, f"{int(signal.SIGTERM)},save,{step},0", *LOOPED)
    assert stopped.returncode == 75, stopped.stderr
    folder = the_run(tmp_path)
    assert not (folder / "model.safetensors").exists()
    assert step not in {row["step"] for row in read_rows(folder / "results.jsonl")}
    run = small_fit(RECIPE, tmp_path, *LOOPED)
    assert weights(run.folder) == weights(unstopped(LOOPED).folder)
    assert curves(run.folder) == curves(unstopped(LOOPED).folder)


def curves(folder: Path) -> dict[int, dict[str, float]]:
    """metrics.csv, every value that is there."""
    frame = pl.read_csv(folder / "metrics.csv", infer_schema_length=None)
    rows = ({name: value for name, value in row.items() if value is not None} for row in frame.iter_rows(named=True))
    return {row["step"]: row for row in rows}


# -- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "place", "step"),
    [
        (LOOPED, "train", 1),  # before any checkpoint
        (LOOPED, "train", 5),
        (LOOPED, "probe", 3),  # the probe's rows are made up for
        (STREAMED, "train", 3),
        ([*STREAMED, "fit.workers=2"], "train", 5),
    ],
    ids=["first", "looped", "probe", "streamed", "workers"],
)
def test_a_killed_run_ends_with_the_same_bits(
    command: Struck, small_fit: Fit, unstopped: Any, tmp_path: Path, options: list[str], place: str, step: int
) -> None:
    killed = command(tmp_path, f"{int(signal.SIGKILL)},{place},{step},0", *options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = the_run(tmp_path)
    assert not (folder / "model.safetensors").exists()
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"run_id": "half-wri')
    run = small_fit(RECIPE, tmp_path, *options)
    streamed = "fit.unique_samples=null" in options
    other = unstopped(STREAMED if streamed else LOOPED)  # without workers: they change nothing
    assert weights(run.folder) == weights(other.folder)
    assert [row["metrics"] for row in sorted(run.rows(), key=order)] == [
        row["metrics"] for row in sorted(other.rows(), key=order)
    ]


@pytest.mark.parametrize("step", [2, 3, 6], ids=["between", "before a probe", "last"])
def test_faults_c1_a_kill_behind_a_checkpoint_loses_no_step_of_the_curves(
    command: Struck, small_fit: Fit, unstopped: Any, tmp_path: Path, step: int
) -> None:
    killed = command(tmp_path, f"{int(signal.SIGKILL)},saved,{step},0", *LOOPED)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = small_fit(RECIPE, tmp_path, *LOOPED)
    assert same(run, unstopped(LOOPED))
    assert curves(run.folder) == curves(unstopped(LOOPED).folder)


def order(row: dict[str, Any]) -> Any:
    return row["stage"], row["step"], row["dataset"], row["score"]


@pytest.mark.slow
def test_two_processes_go_on_with_the_same_bits(command: Struck, tmp_path: Path) -> None:
    """One is killed, the other does not live on; then one is told to stop, and both do, after the same step."""
    options = [*STREAMED, "trainer.devices=2", "fit.workers=2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    assert command(whole, NOWHERE, *options).returncode == 0
    killed = command(broken, f"{int(signal.SIGKILL)},train,3,1", *options)
    # Lightning ends the first process too, if that does not find out by itself before.
    assert killed.returncode in (2, -signal.SIGTERM, -signal.SIGKILL), killed.stderr
    if killed.returncode == 2:
        assert "qatlab: another process of this run has ended or cannot be reached (" in killed.stderr
    assert "Traceback" not in killed.stderr
    stopped = command(broken, f"{int(signal.SIGTERM)},train,4,1", *options)
    assert stopped.returncode == 75, stopped.stderr
    assert "training on from step=3.ckpt" in stopped.stdout
    assert stopped.stderr.count("stopped by SIGTERM") == 1
    assert checkpoints(the_run(broken) / "checkpoints")[0].name == "step=5.ckpt"
    assert command(broken, NOWHERE, *options).returncode == 0
    assert weights(the_run(broken)) == weights(the_run(whole))
    assert len(read_rows(the_run(broken) / "results.jsonl")) == len(read_rows(the_run(whole) / "results.jsonl"))


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(command: Struck, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that was killed at step 5: checkpoints of steps 3 and 4."""
    output = tmp_path_factory.mktemp("killed")
    assert command(output, f"{int(signal.SIGKILL)},train,5,0", *LOOPED).returncode == -signal.SIGKILL
    return output


@pytest.fixture
def left(killed: Path, tmp_path: Path) -> Path:
    """A copy of what that run left."""
    return Path(shutil.copytree(killed, tmp_path / "left"))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, empty])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    small_fit: Fit, unstopped: Any, left: Path, damage: Callable[[Path], None], capsys: Any
) -> None:
    last = the_run(left) / "checkpoints" / "step=4.ckpt"
    damage(last)
    run = small_fit(RECIPE, left, *LOOPED)
    said = capsys.readouterr().out
    assert re.search(rf"{re.escape(str(last))} is damaged \(.+\): going on from step=3\.ckpt", said)
    assert "training on from step=3.ckpt" in said
    assert same(run, unstopped(LOOPED))
    assert not (run.folder / "checkpoints").exists()


def test_a_damaged_checkpoint_is_not_one_of_the_two(command: Struck, left: Path) -> None:
    flip_a_bit(the_run(left) / "checkpoints" / "step=4.ckpt")
    assert command(left, f"{int(signal.SIGKILL)},save,6,0", *LOOPED).returncode == -signal.SIGKILL
    kept = [path.name for path in checkpoints(the_run(left) / "checkpoints")]
    assert kept == ["step=4.ckpt", "step=3.ckpt"]
    assert (the_run(left) / "checkpoints" / "step=4.damaged").exists()


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(
    small_fit: Fit, left: Path, monkeypatch: Any
) -> None:
    read = zipfile.ZipFile

    def stale(file: Any, *options: Any, **named: Any) -> Any:
        if str(file).endswith(".ckpt"):  # indexes of tars are zip files too
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(file, *options, **named)

    monkeypatch.setattr("zipfile.ZipFile", stale)
    with pytest.raises(UserError, match=r"step=4\.ckpt cannot be read \(Stale file handle\)"):
        small_fit(RECIPE, left, *LOOPED)
    assert len(checkpoints(the_run(left) / "checkpoints")) == 2


def test_without_a_whole_checkpoint_training_starts_over(
    small_fit: Fit, unstopped: Any, left: Path, capsys: Any
) -> None:
    for path in checkpoints(the_run(left) / "checkpoints"):
        empty(path)
    run = small_fit(RECIPE, left, *LOOPED)
    assert capsys.readouterr().out.count("is damaged") == 2
    assert weights(run.folder) == weights(unstopped(LOOPED).folder)


def test_a_checkpoint_holds_what_is_trained_and_nothing_that_needs_trust(left: Path) -> None:
    path = the_run(left) / "checkpoints" / "step=4.ckpt"
    content = torch.load(path, weights_only=True)
    assert all(name.startswith("visual.") for name in content["state_dict"])  # neither teacher nor text tower
    assert set(json.loads(content[MADE_WITH])) >= {"fit.lr", "quant.weight.bits", "the content of the training data"}
    trained = sum(value.nbytes for value in content["state_dict"].values())
    assert path.stat().st_size < 3.1 * trained  # the weights and two moments each


def test_frozen_weights_are_not_in_a_checkpoint_and_come_back(small: Options) -> None:
    from qatlab.models import clip as clips

    config = small(RECIPE)
    clip = clips.load(config.model)
    module = Student(config, clip, clip.visual)
    for name, parameter in module.visual.named_parameters():
        parameter.requires_grad_("ln_post" in name)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    parameters = dict(module.named_parameters())
    assert {name for name in checkpoint["state_dict"] if name in parameters} == {
        "visual.ln_post.weight",
        "visual.ln_post.bias",
    }
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=True)


def test_a_run_with_rules_goes_on(command: Struck, small_fit: Fit, tmp_path: Path, capsys: Any) -> None:
    options = [*LOOPED, "+quant.rules={*.c_proj: {act: null}}"]
    assert command(tmp_path, f"{int(signal.SIGKILL)},train,3,0", *options).returncode == -signal.SIGKILL
    small_fit(RECIPE, tmp_path, *options)
    assert "training on from step=3.ckpt" in capsys.readouterr().out


def test_a_run_with_outlier_channels_goes_on_with_the_same_bits(
    command: Struck, small_fit: Fit, tmp_path: Path, capsys: Any
) -> None:
    """How many channels a layer keeps is in the files alone: some keep several here, and others none."""
    options = [*LOOPED, "quant/rewrite=outlier_channels", "quant.outliers.budget=0.1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    broken.mkdir()
    assert command(broken, f"{int(signal.SIGKILL)},train,3,0", *options).returncode == -signal.SIGKILL
    run = small_fit(RECIPE, broken, *options)
    assert "training on from step=3.ckpt" in capsys.readouterr().out
    other = small_fit(RECIPE, whole, *options)
    assert weights(run.folder) == weights(other.folder)
    kept = pl.read_csv(run.folder / "layers.csv")["outlier_channels"]
    assert 0 < (kept > 0).sum() < len(kept)


def test_what_was_left_out_is_counted_over_stops(small: Options, tmp_path: Path, monkeypatch: Any) -> None:
    from qatlab.core.signals import Stopped

    shards = tmp_path / "shards"
    write_caption_shards(shards, 64, per_shard=32, seed=0)
    for shard in sorted(shards.glob("*.tar")):
        spoil_images(shard, every=8)
    step, options = Student.training_step, [*STREAMED, "fit.eval_every=0"]

    def stopping(self: Student, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 4 and interrupted:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Student, "training_step", stopping)
    counted = []
    for output in ("whole", "stopped"):
        interrupted = output == "stopped"
        config = small(RECIPE, f"output={tmp_path / output}", *options)
        config.data = {"_target_": "qatlab.data.CaptionShards", "name": "mine", "shards": str(shards)}
        if interrupted:
            with pytest.raises(Stopped):
                fit(config, RECIPE)
            interrupted = False
        with contextlib.redirect_stdout(said := io.StringIO()):
            fit(config, RECIPE)
        counted.append(re.findall(r"skipped and replaced: .*", said.getvalue()))
    assert counted[0] == counted[1] != []


def spoil_images(shard: Path, every: int) -> None:
    """Write the shard anew with every n-th image replaced by something that is none."""
    with tarfile.open(shard) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive.getmembers()]  # type: ignore[union-attr]
    images = [member.name for member, _ in members if not member.name.endswith(".txt")]
    with tarfile.open(shard, "w") as archive:
        for member, content in members:
            written = b"no image" if member.name in images[::every] else content
            member.size = len(written)
            archive.addfile(member, io.BytesIO(written))


def test_other_options_are_refused_and_the_difference_shown(small: Options, small_fit: Fit, left: Path) -> None:
    folder = the_run(left)
    other = [*LOOPED[:-1], "fit.lr=2e-4"]
    folder.rename(folder.with_name(f"{RECIPE}-{Run(small(RECIPE, *other), RECIPE).id}"))
    with pytest.raises(UserError, match=r"step=4\.ckpt belongs to another run: fit\.lr 0\.0001 there and 0\.0002 now"):
        small_fit(RECIPE, left, *other)


def test_an_unfinished_run_beside_is_told_with_what_differs(small_fit: Fit, left: Path, capsys: Any) -> None:
    """Whoever changes an option on the way gets a run of its own, and reads which one it is not."""
    folder = the_run(left)
    small_fit(RECIPE, left, *LOOPED[1:-1], "fit.lr=2e-4", "fit.steps=1")
    line = f"  {folder} is unfinished and another run: fit.steps=6 there, 1 here, fit.lr=0.0001 there, 0.0002 here"
    assert line in capsys.readouterr().out.splitlines()


def test_other_training_data_is_refused(small_fit: Fit, left: Path, monkeypatch: Any) -> None:
    from qatlab.data.captions.source import CaptionShards

    monkeypatch.setattr(CaptionShards, "fingerprint", lambda self: "0" * 8)
    with pytest.raises(UserError, match=r"the training data \w+ there and 00000000 now"):
        small_fit(RECIPE, left, *LOOPED)


def test_data_w1_a_checkpoint_that_knows_its_data_by_name_is_gone_on_from(
    small_fit: Fit, unstopped: Any, left: Path, capsys: Any
) -> None:
    (path,) = (path for path in checkpoints(the_run(left) / "checkpoints") if path.name == "step=4.ckpt")
    content = torch.load(path, weights_only=True)
    made_with = json.loads(content[MADE_WITH])
    del made_with["the content of the training data"]
    content[MADE_WITH] = json.dumps(made_with | {"the training data": "0123456789abcdef"})
    torch.save(content, path)
    run = small_fit(RECIPE, left, *LOOPED)
    told = "step=4.ckpt is of an earlier release, which knew training data by name: it is taken to be the same"
    assert capsys.readouterr().out.count(told) == 1
    assert weights(run.folder) == weights(unstopped(LOOPED).folder)


# -- the machine -----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_named_and_nothing_before_it_lost(
    command: Struck, small_fit: Fit, unstopped: Any, tmp_path: Path
) -> None:
    def limit() -> None:  # a checkpoint is three times as large as the weights, which fit
        resource.setrlimit(resource.RLIMIT_FSIZE, (15 * 2**20, 15 * 2**20))

    full = command(tmp_path, NOWHERE, *LOOPED, preexec_fn=limit)
    assert full.returncode == 2, full.stderr
    (line,) = full.stderr.strip().splitlines()
    assert re.match(r"qatlab: \S+step=2\.ckpt could not be written, the disk or quota is full \(\d+ MiB free\)", line)
    folder = the_run(tmp_path)
    assert list((folder / "checkpoints").iterdir()) == []
    assert (folder / "quantized.safetensors").exists()
    assert same(small_fit(RECIPE, tmp_path, *LOOPED), unstopped(LOOPED))


def test_a_killed_loader_process_is_told(small_fit: Fit, unstopped: Any, tmp_path: Path, monkeypatch: Any) -> None:
    batch = StreamedBatches._batch

    def dying(self: StreamedBatches, step: int) -> Any:
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, step)

    options = [*STREAMED, "fit.workers=2"]
    with monkeypatch.context() as patch:
        patch.setattr(StreamedBatches, "_batch", dying)
        with pytest.raises(
            UserError, match=r"a data-loading process ended unexpectedly .* Lower fit\.workers=2\. The same"
        ):
            small_fit(RECIPE, tmp_path, *options)
    assert weights(small_fit(RECIPE, tmp_path, *options).folder) == weights(unstopped(STREAMED).folder)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), r"unexpectedly \(\[Errno 104\] Connection reset by peer\)"),
        (EOFError(), r"unexpectedly \(its connection was closed\)"),
    ],
    ids=["reset", "end of file"],
)  # fmt: skip
def test_a_loader_process_that_ends_while_it_sends_a_batch_is_told(error: Exception, sentence: str) -> None:
    class Closed:
        def get(self, timeout: float) -> Any:
            raise error

    batches: Any = iter(DataLoader(range(8), num_workers=1))  # type: ignore[arg-type]
    next(batches)
    queue, batches._data_queue = batches._data_queue, Closed()
    with pytest.raises(UserError, match=sentence), Faults(compose(f"recipe={RECIPE}")).named(L.Trainer(logger=False)):
        next(batches)
    batches._data_queue = queue


def test_a_connection_of_anything_else_is_no_matter_of_loaders() -> None:
    with pytest.raises(ConnectionResetError), Faults(compose(f"recipe={RECIPE}")).named(L.Trainer(logger=False)):
        raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize(
    ("method", "error", "sentence"),
    [
        ("training_step", torch.OutOfMemoryError("CUDA out of memory."), r"cpu ran out .* step 0: set fit\.micro_batch=4 "),
        ("training_step", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), r"fit\.micro_batch=4"),
        ("validation_step", torch.OutOfMemoryError("CUDA"), r"while scoring: set suite\.batch_size=32 \(it was 64\)"),
    ],
    ids=["gpu", "cpu", "scoring"],
)  # fmt: skip
def test_memory_that_ran_out_names_the_option(
    small_fit: Fit, tmp_path: Path, monkeypatch: Any, method: str, error: Exception, sentence: str
) -> None:
    def failing(self: Student, *args: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(Student, method, failing)
    with pytest.raises(UserError, match=sentence):
        small_fit(RECIPE, tmp_path, *LOOPED)


def test_memory_that_ran_out_in_a_probe_is_no_matter_of_micro_batches(
    small_fit: Fit, tmp_path: Path, monkeypatch: Any
) -> None:
    score = Student.validation_step

    def failing(self: Student, *args: Any, **more: Any) -> Any:
        if self.views[0].stage == "probe":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(self, *args, **more)

    monkeypatch.setattr(Student, "validation_step", failing)
    with pytest.raises(UserError, match=r"suite\.batch_size=32"):
        small_fit(RECIPE, tmp_path, *LOOPED)


def test_when_not_even_one_image_fits_there_is_nothing_to_lower(
    small_fit: Fit, tmp_path: Path, monkeypatch: Any
) -> None:
    def failing(self: Student, *args: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Student, "training_step", failing)
    with pytest.raises(UserError, match="not even one image at a time fits"):
        small_fit(RECIPE, tmp_path, *LOOPED, "fit.micro_batch=1")
