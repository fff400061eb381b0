from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from qatlab import results
from qatlab.config import Config, FitConfig, SetConfig, compose, later, load
from qatlab.core.errors import UserError
from qatlab.core.files import is_locked
from qatlab.evaluation.evaluation import row
from qatlab.results.identity import evaluation_id, identity, run_id
from qatlab.results.rowfile import Row
from qatlab.results.rows import newest, read_rows
from qatlab.results.run import LOCK, Run, Took, git_commit
from qatlab.suites.source import Source, View

ROOT = Path(__file__).resolve().parents[2]
fork = multiprocessing.get_context("fork")


def scored(dataset: str, score: str = "zero_shot", step: int = 0, stage: str = "quantized", **metrics: float) -> Row:
    """Return a row as a pass leaves it."""
    source = Source(dataset, "id", dataset, "0a1b2c3d")
    prompts = {"step": step, "prompts": "a photo of a {}", "recipe": "ptq"}
    return row(View(stage, 100.0), source, score, 32, metrics or {"top1": 0.5}) | prompts


@pytest.fixture
def config(tmp_path) -> Config:
    return compose("recipe=ptq", f"output={tmp_path}")


@pytest.fixture
def run(config) -> Run:
    run = Run(config, "ptq")
    run.folder.mkdir()
    return run


# -- the id --------------------------------------------------------------------------------------------------------------

BASE = ["recipe=light_qat_lsq", "+quant.rules={a: null, b: {act: null}}"]
SAME = [
    ["suite=folders"],
    ["suite.images=8"],
    ["suite.batch_size=8"],
    ["trainer.devices=8"],
    ["trainer.num_nodes=2"],
    ["trainer.accelerator=cpu"],
    ["trainer.strategy=ddp"],
    ["quant.partial=true"],
    ["fit.workers=0"],
    ["fit.eval_every=3"],
    ["fit.checkpoint_every=7"],
    ["wandb.mode=offline"],
    ["wandb.project=x"],
    ["output=elsewhere"],
    ["force=true"],
    ["callbacks.ood=null"],
    ["fit.steps=100"],  # what the recipe says anyway
    ["quant/weight=lsq"],
]
OTHER = [
    ["model=vit_b32_openai"],
    ["model.checkpoint=x.pt"],
    ["data=cc3m"],
    ["data.seed=2"],
    ["quant/weight=minmax"],
    ["quant.weight.bits=4"],
    ["quant.act.init=mse"],
    ["quant.patch_conv=true"],
    ["quant.calibration_images=8"],
    ["~quant.rules"],
    ["~quant.rules", "+quant.rules={b: {act: null}, a: null}"],  # the first match wins
    ["objective.kl=0.5"],
    ["optim=paper"],
    ["fit.steps=99"],
    ["fit.batch_size=8"],
    ["fit.lr=1e-5"],
    ["fit.unique_samples=null"],
    ["seed=1"],
    ["trainer.precision=bf16-mixed"],
]


def with_overrides(overrides: list[str]) -> Config:
    base = [option for option in BASE if not (option.startswith("+quant.rules") and "~quant.rules" in overrides)]
    return compose(*base, *(option for option in overrides if option != "~quant.rules"))


@pytest.fixture(scope="module")
def base_id() -> str:
    return run_id(compose(*BASE))


@pytest.mark.parametrize("overrides", SAME, ids=" ".join)
def test_where_and_how_a_run_is_watched_leaves_its_id(overrides, base_id):
    assert run_id(with_overrides(overrides)) == base_id


def test_what_decides_the_model_changes_the_id(base_id):
    ids = [base_id, *(run_id(with_overrides(overrides)) for overrides in OTHER)]
    assert len(set(ids)) == len(ids)


def test_the_id_is_eight_hex_digits_and_names_the_folder(config, tmp_path):
    run = Run(config, "ptq")
    assert len(run.id) == 8
    assert int(run.id, 16) >= 0
    assert run.folder == tmp_path / f"ptq-{run.id}"


# -- rows ----------------------------------------------------------------------------------------------------------------


def test_rows_come_back_with_what_every_row_says(run, config):
    run.append([scored("id", top1=0.25), scored("noise", top1=0.125)])
    stored = run.rows()
    assert [(r["dataset"], r["metrics"]) for r in stored] == [("id", {"top1": 0.25}), ("noise", {"top1": 0.125})]
    for found in stored:
        assert found["run_id"] == run_id(config)
        assert found["seed"] == 0
        assert found["config"]["fit.lr"] == 1e-6
        assert found["config"]["quant.weight.bits"] == 8
        assert found["config"]["optim.betas"] == [0.9, 0.999]
        assert "output" not in found["config"]
        assert found["versions"]["torch"]


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "adapted"},
        {"step": 1},
        {"dataset": "noise"},
        {"definition": "ffff"},
        {"score": "msp"},
        {"prompts": "x"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_row_is_unique_by_its_key(run, change):
    run.append([scored("id", top1=0.25), scored("id", top1=0.5)])
    run.append([scored("id", top1=0.75) | {"n": 64}, scored("id") | change])
    assert len(run.rows()) == 2
    run.append([scored("id") | change])
    assert len(run.rows()) == 2
    assert run.rows()[1][next(iter(change))] == next(iter(change.values()))


def test_done_names_the_sets_of_a_stage(run):
    run.append([scored("id"), scored("noise"), scored("fog", stage="adapted")])
    assert run.done("quantized") == {("id", "0a1b2c3d"): {"zero_shot"}, ("noise", "0a1b2c3d"): {"zero_shot"}}
    assert run.done("fp32") == {}


def test_no_file_is_no_rows(tmp_path):
    assert read_rows(tmp_path / "results.jsonl") == []


@pytest.mark.parametrize("kept", [1, 40, -2, -1])
def test_a_half_written_last_line_is_skipped_and_healed_by_the_next_append(run, kept):
    run.append([scored("id"), scored("noise")])
    whole = run.results.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    run.results.write_bytes(whole[: -len(last)] + last[:kept])  # kept = -1 leaves the row, without its line's end
    survivors = ["id", "noise"] if kept == -1 else ["id"]
    assert [r["dataset"] for r in run.rows()] == survivors
    run.append([scored("noise"), scored("fog")])
    assert [r["dataset"] for r in run.rows()] == ["id", "noise", "fog"]
    assert run.results.read_bytes().endswith(b"\n")


def test_only_rank_zero_writes(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run.append([scored("id")])
    run.describe("ptq")
    assert list(run.folder.iterdir()) == []


def append_many(run: Run, name: str) -> None:
    for i in range(20):
        run.append([scored(f"{name}{i}", "msp", **{f"metric{k}": k / 7 for k in range(200)}), scored(f"{name}{i}")])


def test_two_threads_do_not_interleave(run):
    threads = [threading.Thread(target=append_many, args=(run, name)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_both(run)


def test_two_processes_do_not_interleave(run):
    processes = [fork.Process(target=append_many, args=(run, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    check_both(run)


def check_both(run: Run) -> None:
    lines = run.results.read_text().splitlines()
    assert len(lines) == 80
    assert {json.loads(line)["dataset"] for line in lines} == {f"{name}{i}" for name in "ab" for i in range(20)}


def test_the_options_are_written_once(run, config):
    run.describe("ptq")
    stored, recipe, known = load(run.folder / "config.yaml")
    assert known == run.id
    assert (recipe, run_id(stored)) == ("ptq", run.id)
    config.seed = 3
    run.describe("other")
    assert load(run.folder / "config.yaml")[1] == "ptq"


def test_the_commit_is_the_checkouts():
    if not (ROOT / ".git").exists():
        assert git_commit() is None
        return
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commit = git_commit()
    assert commit is not None
    assert head.startswith(commit.rstrip("+"))
    assert len(commit.rstrip("+")) == 12


# -- the lock ------------------------------------------------------------------------------------------------------------


def hold(run: Run, held: Any) -> None:
    with run:
        held.set()
        signal.pause()


@pytest.fixture
def holder(config) -> Callable[[], Any]:
    """``holder()``: another process that has the run's folder."""
    started = []

    def start() -> Any:
        held = fork.Event()
        process = fork.Process(target=hold, args=(Run(config, "ptq"), held), daemon=True)
        process.start()
        started.append(process)
        assert held.wait(30)
        return process

    yield start  # type: ignore[misc]
    for process in started:
        process.kill()
        process.join(30)


def test_a_folder_in_use_names_who_holds_it_until_its_death(holder, config):
    process = holder()
    run = Run(config, "ptq")
    with pytest.raises(UserError, match=rf"ptq-{run.id} is in use by process {process.pid} on ") as caught, run:
        pass
    assert "output=" in str(caught.value)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    with run:
        assert (run.folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_process_forked_from_a_run_does_not_hold_its_folder(config: Config) -> None:
    with Run(config, "ptq") as run:
        run.append([scored("id")])
        loader = os.fork()
        if loader == 0:
            signal.pause()
    try:
        with Run(config, "ptq") as again:
            assert not again.read_only
            again.append([scored("noise")])
    finally:
        os.kill(loader, signal.SIGKILL)
        os.waitpid(loader, 0)


def test_using_b6_what_is_finished_is_read_without_the_lock(holder, config, capsys):
    with Run(config, "ptq") as run:
        run.append([scored("id")])
        run.finish(Took(1.0, 0))
    process = holder()
    with Run(config, "ptq") as run:
        assert [row["dataset"] for row in run.rows()] == ["id"]
        assert f"{run.folder} is in use by process {process.pid}" in capsys.readouterr().out
        with pytest.raises(UserError, match=rf"is in use by process {process.pid} .* rows to add: wait for it"):
            run.append([scored("noise")])
        with pytest.raises(UserError, match=r"is in use by .* and a table is written: wait for it"):
            run.require_writable("a table is written")
    config.force = True
    with pytest.raises(UserError, match="is in use by"), Run(config, "ptq"):
        pass


def test_a_disk_without_locks_is_told(config, monkeypatch, capsys):
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("qatlab.core.files.fcntl.flock", refused)
    with Run(config, "ptq") as run:
        run.append([scored("id")])
    assert len(run.rows()) == 1
    assert f"{run.folder} is on a disk without locks" in capsys.readouterr().out


def test_who_looks_whether_a_folder_is_in_use_does_not_keep_a_run_from_it(config):
    run = Run(config, "ptq")
    run.folder.mkdir(parents=True)
    path = run.folder / LOCK
    path.touch()
    assert not is_locked(path)
    looking = path.open()
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.1, looking.close).start()
    with run:
        assert is_locked(path)


def test_force_does_not_take_a_folder_in_use(holder, config):
    holder()
    config.force = True
    run = Run(config, "ptq")
    with pytest.raises(UserError, match="in use by process"), run:
        pass
    assert [path.name for path in run.folder.parent.iterdir()] == [run.folder.name]


def test_a_folder_is_free_after_the_run_and_kept(config):
    for _ in range(2):
        with Run(config, "ptq") as run:
            run.append([scored("id")])
    assert len(run.rows()) == 1


def test_another_output_folder_is_another_run(holder, config, tmp_path):
    holder()
    config.output = str(tmp_path / "other")
    with Run(config, "ptq") as run:
        assert run.folder.parent == tmp_path / "other"


def test_force_moves_the_earlier_run_aside(config, tmp_path, capsys):
    with Run(config, "ptq") as run:
        run.append([scored("id", top1=0.25)])
    config.force = True
    with Run(config, "ptq") as run:
        assert run.rows() == []
        with pytest.raises(UserError, match="in use"), Run(config, "ptq"):
            pass
        run.append([scored("id", top1=0.5)])
    [aside] = [path for path in tmp_path.iterdir() if path != run.folder]
    assert f"force=true: the earlier run was moved to {aside}" in capsys.readouterr().out
    assert read_rows(aside / "results.jsonl")[0]["metrics"] == {"top1": 0.25}
    assert results.read(tmp_path)["top1"].to_list() == [0.5]
    assert results.read(aside)["top1"].to_list() == [0.25]


def test_force_on_a_first_run_moves_nothing(config, tmp_path, capsys):
    config.force = True
    with Run(config, "ptq") as run:
        (run.folder / "layers.csv").write_text("layer")
    assert list(tmp_path.iterdir()) == [run.folder]
    assert capsys.readouterr().out == ""


def test_a_run_that_computed_nothing_leaves_no_folder(config, tmp_path):
    def mistaken() -> None:
        with Run(config, "ptq") as run:
            run.describe("ptq")
            raise UserError("no such set")

    with pytest.raises(UserError, match="no such set"):
        mistaken()
    assert list(tmp_path.iterdir()) == []


def test_other_weights_under_the_same_path_are_another_run(config, tmp_path):
    config.model.checkpoint = str(tmp_path / "weights.safetensors")
    ids = []
    for content in (b"one", b"other", b"one"):
        (tmp_path / "weights.safetensors").write_bytes(content)
        ids.append(run_id(config))
    assert ids[0] == ids[2] != ids[1]


# -- reading many runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path) -> Path:
    """Three runs on two levels, one with a half-written line."""
    for name, folder in (("ptq", "a"), ("light_qat_lsq", "a/deep"), ("fp32", "b")):
        with Run(compose(f"recipe={name}", f"output={tmp_path / folder}"), name) as run:
            run.append([scored("id", top1=0.5, ece=0.1), scored("near_ood", "msp", auroc=0.9)])
    with run.results.open("a") as file:
        file.write('{"run_id": "0')
    return tmp_path


def test_one_frame_over_many_runs_has_the_metrics_as_columns(tree):
    frame = results.read(tree)
    assert frame.shape[0] == 6
    assert frame["run_id"].n_unique() == 3
    ids = frame.filter(pl.col("dataset") == "id")
    assert ids["top1"].to_list() == [0.5] * 3
    assert ids["auroc"].to_list() == [None] * 3
    assert frame.filter(pl.col("score") == "msp")["auroc"].to_list() == [0.9] * 3
    assert not {"metrics", "config", "versions"} & set(frame.columns)


def test_folders_are_named_one_by_one_and_counted_once(tree):
    assert results.read([tree / "a", tree / "b"]).shape[0] == 6
    assert results.read([tree, tree / "a", str(tree / "b")]).shape[0] == 6
    assert results.read(str(tree / "b")).shape[0] == 2
    assert results.read([]).shape == (0, 0)


def test_data_w1_an_unfinished_newer_evaluation_hides_no_whole_older_one(config, tmp_path):
    whole = [scored("val", stage=stage) for stage in ("fp32", "quantized")]
    for old in whole:
        del old["definition_version"]
    begun = scored("val", stage="fp32") | {"definition": "new"}
    with Run(config, "ptq") as run:
        run.append([*whole, begun])
        read = results.read(tmp_path)
        assert read.select("stage", "definition").rows() == [("fp32", "0a1b2c3d"), ("quantized", "0a1b2c3d")]
        run.append([scored("val", stage="quantized") | {"definition": "new"}])
    read = results.read(tmp_path)
    assert read.select("stage", "definition").rows() == [("fp32", "new"), ("quantized", "new")]


def test_data_w1_rows_of_a_newer_definition_count_and_the_others_on_demand(config, tmp_path):
    """A probe of each step, and a set that is rendered, have rows that no newer ones stand for."""
    new = [
        scored("val") | {"definition": "new"},
        scored("val") | {"stage": "probe", "step": 2},
        scored("id") | {"definition": "new"},
    ]
    named = [scored("val"), scored("other"), *(scored("val") | {"stage": stage} for stage in ("probe", "adapted"))]
    old = [{key: value for key, value in row.items() if key != "definition_version"} for row in named]
    drawn = old[0] | {"dataset": "id", "config": {"suite.sets.id.path": "embedded:id"}}
    assert {row["definition_version"] for row in new} == {2}
    assert newest([*old, *new, drawn]) == [*old[1:], *new, drawn]
    assert newest(old) == old
    with Run(config, "ptq") as run:
        run.append([*old[:2], *new[:2]])
    assert results.read(tmp_path).shape[0] == 3
    assert results.read(tmp_path, every=True).shape[0] == 4


def test_polars_reads_the_folder_with_one_line(tree):
    for file in tree.rglob("results.jsonl"):  # complete lines only, as after every finished run
        file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")))
    frame = pl.concat([pl.read_ndjson(file) for file in tree.rglob("results.jsonl")], how="diagonal_relaxed")
    assert frame["metrics"].struct.field("top1").drop_nulls().to_list() == [0.5] * 3
    together = pl.read_ndjson(sorted(tree.rglob("results.jsonl")), infer_schema_length=None)
    assert together.shape[0] == 6
    contexts = pl.read_ndjson(sorted(tree.rglob("contexts.jsonl")), infer_schema_length=None)
    assert set(together.join(contexts, on="context")["config"].struct.field("fit.steps")) == {0, 100}


def test_using_a11_an_option_added_later_changes_no_id_at_its_default() -> None:
    config = compose("recipe=ptq")

    @dataclass
    class Newer(FitConfig):
        ema: float | None = later(None)

    newer = replace(config, fit=Newer(**asdict(config.fit)))
    assert run_id(newer) == run_id(config)
    newer.fit.ema = 0.9
    assert run_id(newer) != run_id(config)
    # in a set of a suite too, which a dict holds

    @dataclass
    class NewerSet(SetConfig):
        crop: bool = later(False)

    sets = {name: NewerSet(**asdict(entry)) for name, entry in config.suite.sets.items()}
    other = replace(config, suite=replace(config.suite, sets=sets))
    assert evaluation_id(other) == evaluation_id(config)
    sets["id"].crop = True
    assert evaluation_id(other) != evaluation_id(config)


def test_using_a11_a_stored_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose("recipe=ptq", f"output={tmp_path}")
    with Run(config, "ptq") as run:
        run.describe("ptq")
        run.append([scored("id")])
    # A later release may count other options in.
    monkeypatch.setattr("qatlab.results.run.identity", lambda *_: {"of": "another release"})
    assert Run(config, "ptq", run.folder).id == run.id
    # An earlier one stored no id: that of the rows counts, else the folder's name.
    stored = run.folder / "config.yaml"
    lines = stored.read_text().splitlines(keepends=True)
    stored.write_text("".join(line for line in lines if not line.startswith(("run_id", "# checksum"))))
    moved = run.folder.rename(tmp_path / "my-best-run")
    assert Run(config, "ptq", moved).id == run.id
    (moved / "results.jsonl").unlink()
    assert Run(config, "ptq", moved.rename(tmp_path / f"ptq-{run.id}")).id == run.id


def test_faults_s6_limits_other_than_the_defaults_are_another_run() -> None:
    """They decide which samples count as unreadable."""
    config = compose("recipe=ptq")
    assert not any(key.startswith("limits") for key in identity(config))
    other = compose("recipe=ptq", "limits.pixels=1000000")
    assert identity(other) == {**identity(config), "limits.pixels": 1000000}
    assert run_id(other) != run_id(config)
    assert evaluation_id(other) == evaluation_id(config)  # there an image that cannot be read ends the run
