"""The sweeps of the paper and of its figures: which runs they are, and that they run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from qatlab.config import Config, compose, recipe_files
from qatlab.core.errors import UserError
from qatlab.results.identity import run_id
from qatlab.results.rows import read_rows
from qatlab.results.run import Run, Took
from qatlab.sweep import main
from qatlab.sweeps import local
from qatlab.sweeps.grid import Cell, cells_of
from qatlab.sweeps.state import LEFT, log_of, show, state_of

SWEEPS = [name for name in recipe_files("sweep") if name not in ("paper", "families")]  # these need shards and a suite


@pytest.fixture(scope="module")
def composed() -> dict[str, list[Config]]:
    return {name: [cell.config for cell in cells_of(name, [])] for name in SWEEPS}


def test_the_sweeps_are_those_of_the_figures_and_of_the_weights(composed: dict[str, list[Config]]) -> None:
    assert {name: len(found) for name, found in composed.items()} == {
        "fig3_bits": 18,
        "fig4_steps": 3,
        "fig14_samples": 18,
        "towers": 18,
        "weight_only_bits": 7,
    }
    for name, path in recipe_files("sweep").items():
        first = path.read_text().splitlines()[0]
        assert first.startswith("# ")
        assert "arXiv 2509.21173" in first or not name.startswith("fig")


def test_the_papers_grid_gives_each_method_what_it_has() -> None:
    """FP32 has no bits and no seed, full QAT samples of its own; every cell can be built."""
    given = ["model=vit_b32_openai", "seed=0", "data.shards=/data", "suite.root=/data"]
    cells = cells_of("paper", given)
    assert not [cell.mistake for cell in cells if cell.mistake]
    recipes = [cell.recipe for cell in cells]
    assert recipes.count("fp32") == 1
    assert {recipes.count(name) for name in set(recipes) - {"fp32"}} == {5}
    assert {cell.config.fit.unique_samples for cell in cells if cell.recipe.startswith("qat_lora")} == {None}


@pytest.mark.slow
def test_the_families_are_all_models_of_one_size_but_the_papers() -> None:
    cells = cells_of("families", ["data.shards=/data", "suite.root=/data"])
    assert not [cell.mistake for cell in cells if cell.mistake]
    models = {(cell.config.model.name, cell.config.model.pretrained) for cell in cells}
    assert len(models) == 12
    assert len({run_id(cell.config) for cell in cells}) == len(cells) == 5 * len(models)


def test_every_cell_is_a_run_of_its_own(composed: dict[str, list[Config]]) -> None:
    for found in composed.values():
        assert len({run_id(config) for config in found}) == len(found)


def test_bits_come_in_pairs(composed: dict[str, list[Config]]) -> None:
    pairs = [(8, 8), (6, 8), (6, 6), (4, 8), (4, 6), (4, 4)]
    found = [(config.quant.weight["bits"], config.quant.act["bits"]) for config in composed["fig3_bits"]]
    assert found == pairs * 3
    methods = [str(config.quant.weight["_target_"]).rpartition(".")[2] for config in composed["fig3_bits"]]
    assert methods == ["MinMax"] * 12 + ["LSQ"] * 6
    assert [config.fit.steps for config in composed["fig3_bits"]] == [0] * 6 + [100] * 12


def test_steps_are_seen_by_probes_of_one_run_per_method(composed: dict[str, list[Config]]) -> None:
    for config in composed["fig4_steps"]:
        assert (config.fit.steps, config.fit.batch_size, config.fit.unique_samples) == (8100, 100, None)
        assert (config.fit.lr, config.fit.eval_every) == (5e-5, 100)


def test_weights_alone_go_through_every_number_of_bits(composed: dict[str, list[Config]]) -> None:
    assert [config.quant.weight["bits"] for config in composed["weight_only_bits"]] == [8, 7, 6, 5, 4, 3, 2]
    assert all(config.quant.act is None for config in composed["weight_only_bits"])


def test_each_tower_gets_every_method(composed: dict[str, list[Config]]) -> None:
    """A method is (weight, rewrite); all are at W4A8, and a tower is quantized by itself and beside the other."""
    methods: dict[str, set[tuple[str, str]]] = {}
    for config in composed["towers"]:
        quant = config.quant
        blocks = (quant.weight, quant.rewrite or {"_target_": ".none"})
        assert (quant.weight["bits"], quant.act["bits"], quant.act["observer"]) == (4, 8, "mse")
        method = tuple(str(block["_target_"]).rpartition(".")[2] for block in blocks)
        methods.setdefault(quant.tower, set()).add(method)
    assert set(methods) == {"visual", "text", "both"}
    every = {(weight, rewrite) for weight in ("MinMax", "GPTQ") for rewrite in ("none", "SmoothQuant", "Rotation")}
    assert all(found == every for found in methods.values())


def test_samples_end_in_a_stream(composed: dict[str, list[Config]]) -> None:
    found = [config.fit.unique_samples for config in composed["fig14_samples"]]
    assert found == [10, 30, 100, 300, 1000, None] * 3
    assert {config.fit.steps for config in composed["fig14_samples"]} == {100}


# -- cells that cannot be, and mistakes ---------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "sweep").mkdir()
    return tmp_path


def sweep(own: Path, text: str) -> list[Cell]:
    (own / "sweep" / "mine.yaml").write_text(text)
    return cells_of("mine", [], own)


def test_a_cell_that_cannot_be_built_says_why_at_planning_time(own: Path) -> None:
    cells = sweep(own, "grids: [{recipe: 'ptq,fp32,ptqq', quant.weight.bits: 8}, {recipe: ptq, quant.weight.bits: 99}]")
    assert [cell.recipe for cell in cells if not cell.mistake] == ["ptq"]
    assert "quant.weight" in cells[1].mistake
    assert re.search("ptqq.*did you mean 'ptq'", cells[2].mistake)
    assert "bits=99" in cells[3].mistake
    assert [state_of(cell).kind for cell in cells] == ["new", "impossible", "impossible", "impossible"]


def test_every_recipe_can_be_planned(own: Path) -> None:
    cells = sweep(own, f"grids: [{{recipe: '{','.join(recipe_files())}'}}]")
    assert [cell.mistake for cell in cells] == [""] * len(recipe_files())


def test_the_same_run_in_two_grids_is_one_cell(own: Path) -> None:
    cells = sweep(own, "grids: [{recipe: ptq, quant.weight.bits: '8,4'}, {recipe: ptq, quant.weight.bits: '4,2'}]")
    assert [cell.config.quant.weight["bits"] for cell in cells] == [8, 4, 2]


def test_what_is_given_goes_to_every_cell_and_may_have_several_values() -> None:
    cells = cells_of("weight_only_bits", ["quant.weight.bits=8,3", "seed=range(2)", "suite.images=7"])
    assert [(cell.config.quant.weight["bits"], cell.config.seed) for cell in cells] == [(8, 0), (8, 1), (3, 0), (3, 1)]
    assert {cell.config.suite.images for cell in cells} == {7}


@pytest.mark.parametrize("text", ["", "grids: 3", "grids: []", "grids: [{model: tiny}]", "recipe: ptq"])
def test_a_file_of_another_form_is_told(own: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"mine\.yaml holds no list 'grids' of products"):
        sweep(own, text)
    with pytest.raises(UserError, match=r"sweep=mime is not there \(did you mean 'mine'\?\)"):
        cells_of("mime", [], own)
    with pytest.raises(UserError, match=r"mine\.yaml: "):
        sweep(own, "grids: [")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("pln sweep=mine", "pln is none of plan, run, submit, retry (did you mean 'plan'?): it comes first."),
        ("plan mine", "mine is not known: options are name=value, --help lists the sweeps."),
        ("run --dry sweep=mine", "--dry is not known: options are name=value, --help lists the sweeps."),
        ("run sweep=mine jobs=none", "jobs=none: it takes how many runs go on at a time, from 1 on."),
        ("run sweep=mine jobs=00", "jobs=00: it takes how many runs go on at a time, from 1 on."),
        (
            "run sweep=mine force=true",
            "force= would move the runs aside each time: move those you mean, and run the sweep",
        ),
        (
            "submit sweep=mine trainer.devices=2",
            "trainer.devices=2: on Slurm the job decides, slurm='--nodes=1 --ntasks",
        ),
        ("run sweep=mine slurm=--x", "slurm= goes to sbatch: `submit` the sweep with it, or `run` it here without."),
        (
            "submit sweep=mine slurm='--x",
            "slurm='--x: No closing quotation; it takes sbatch's options as on its command line.",
        ),
        (
            "run sweep=mine suite.imges=3",
            "suite.imges is not an option (did you mean 'suite.images'?); --help lists them.",
        ),
        ("plan", "no sweep given; `python -m qatlab.sweep plan sweep=<name>` with one of"),
    ],
)
def test_a_mistake_on_the_command_line_is_told(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    (own / "sweep" / "mine.yaml").write_text("grids: [{recipe: ptq, quant.weight.bits: '8,4'}]")
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments.split(), "--config-dir", str(own)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"qatlab: {said}")


def test_runs_that_cannot_be_built_are_told_before_the_others_start(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "sweep" / "mine.yaml").write_text("grids: [{recipe: ptq, quant.weight.bits: '8,99'}]")
    started: list[Cell] = []
    monkeypatch.setattr(local, "run", lambda cells, *_: started.extend(cells))
    monkeypatch.setattr(sys, "argv", ["sweep.py", "run", "sweep=mine", f"output={own}", "--config-dir", str(own)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, [cell.config.quant.weight["bits"] for cell in started]) == (2, [8])
    assert "cannot be built: 1, `plan` says which and why; the first: quant.weight.bits=99" in capsys.readouterr().out


def test_using_what_has_no_effect_in_some_runs_is_told_in_one_line(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "sweep" / "mine.yaml").write_text("grids: [{recipe: 'ptq,light_qat', suite.root: /none}]")
    arguments = ["plan", "sweep=mine", "seed=0,1", "fit.lr=1e-5", f"output={own}", "--config-dir", str(own)]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
    with pytest.raises(SystemExit):
        main()
    told = [line for line in capsys.readouterr().out.splitlines() if "without effect" in line]
    assert told == ["without effect: fit.lr in 2 of 4 runs (fit.steps=0 trains nothing)"]


# -- what a cell's folder and log tell ----------------------------------------------------------------------------------


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    config = compose("recipe=ptq", f"output={tmp_path}")
    return Cell(("recipe=ptq",), "ptq", Run(config, "ptq"))


def test_a_cell_is_what_its_folder_and_its_log_say(cell: Cell, tmp_path: Path) -> None:
    assert cell.run is not None
    log = log_of(cell.run)
    assert state_of(cell).kind == "new"
    log.parent.mkdir(parents=True)
    for text, kind, why in (
        ("calibrating\n", "interrupted", ""),  # killed, with whatever had started it
        ("calibrating\n\nexit code -9\n", "failed", "killed by SIGKILL"),
        ("calibrating\n\nexit code 137\n", "failed", "killed by SIGKILL"),
        ("calibrating\n\nexit code -15\n", "interrupted", ""),
        ("qatlab: stopped by SIGTERM; ...\n\nexit code 75\n", "interrupted", ""),
        ("qatlab: no shard.\n\nexit code 2\n", "failed", "no shard."),
        ("Traceback\nValueError: odd\n\nexit code 1\n", "failed", "ValueError: odd"),
        ("qatlab: no shard.\n\nexit code 2\ncalibrating\n", "interrupted", ""),  # given again, and killed
        ("qatlab: no shard.\n\nexit code 2\nValueError: odd\n\nexit code 1\n", "failed", "ValueError: odd"),
        (
            "qatlab: rank 1: no shard.\nqatlab: another process has ended.\nexit code 137\n",
            "failed",
            "rank 1: no shard.",
        ),
        ("qatlab: stopped by SIGUSR1; ...\nValueError: odd\n\nexit code 1\n", "failed", "ValueError: odd"),
        ("qatlab: ptq is in use by process 1.\n\nexit code 2\n", "interrupted", ""),
        ("\nexit code 0\n", "interrupted", ""),  # of another suite: what is asked for now is not finished
    ):
        log.write_text(text)
        assert (state_of(cell).kind, state_of(cell).why.partition(" (")[0]) == (kind, why)
    with cell.run:
        assert state_of(cell).kind == "running"
        (cell.run.folder / "kept").touch()
        cell.run.finish(Took(12.0, 34))
    assert (state_of(cell).kind, state_of(cell).took) == ("finished", (12.0, 34))
    other = compose("recipe=ptq", f"output={tmp_path}", "suite.images=3")
    assert state_of(Cell((), "ptq", Run(other, "ptq"))).kind == "interrupted"


def test_a_cell_that_another_process_runs_is_waited_for(cell: Cell) -> None:
    assert cell.run is not None
    waiting = [cell]
    with cell.run:
        assert local._next(waiting, LEFT) is None
        assert waiting == [cell]
        (cell.run.folder / "kept").touch()
    assert local._next(waiting, LEFT) is cell
    assert waiting == []
    cell.run.finish(Took(1.0, 0))
    waiting = [cell]
    assert local._next(waiting, LEFT) is None  # done by then
    assert waiting == []


def test_jobs_take_turns_with_the_gpus_and_share_the_cores(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    of = [local._environment(cell, slot, 5, 4) for slot in range(5)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in of] == ["0", "1", "2", "3", "0"]
    assert {each["OMP_NUM_THREADS"] for each in of} == {"3"}
    cell.config.trainer.devices = 2
    of = [local._environment(cell, slot, 2, 4) for slot in range(2)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in of] == ["0,1", "2,3"]
    assert {each["OMP_NUM_THREADS"] for each in of} == {"4"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")  # the others are somebody else's
    assert local._environment(cell, 1, 2, 4)["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_what_is_left_is_told_in_time_and_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [
        Cell((f"seed={seed}",), "ptq", Run(compose("recipe=ptq", f"seed={seed}", f"output={tmp_path}"), "ptq"))
        for seed in range(5)
    ]
    for cell in cells[:2]:
        assert cell.run is not None
        cell.run.folder.mkdir()
        (cell.run.folder / "model").write_bytes(bytes(2**20))
        cell.run.finish(Took(600.0, 3 * 2**20))
    show(cells, [state_of(cell) for cell in cells], jobs=2)
    told = capsys.readouterr().out
    assert "5 runs: 2 finished, 3 new" in told
    assert "3 to run: about 15 min, 2 at a time" in told
    assert f"{tmp_path}: about 3 MiB to come" in told
    assert "features-2: about 9 MiB to come" in told
    assert "TOO LITTLE" not in told
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=11 * 2**20))  # one disk: 12 come to it
    show(cells, [state_of(cell) for cell in cells], jobs=2)
    assert capsys.readouterr().out.count("TOO LITTLE") == 2


# -- processes ----------------------------------------------------------------------------------------------------------

BITS = ",".join(f"{{weight:{{bits:{w}}},act:{{bits:{a}}}}}" for w, a in ((8, 8), (4, 6)))
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(python: str, own: Path, tmp_path: Path, subprocess_environment: dict[str, str]) -> Start:
    """``start(word, *options)``: the sweep ``mine`` as a process; it and its runs are forked, or with ``real=True`` started."""
    environment = {**subprocess_environment, "QATLAB_CACHE": str(tmp_path / "cache")}

    def begin(word: str, *options: str, real: bool = False) -> subprocess.Popen[str]:
        program = sys.executable if real else python
        command = [program, "-m", "qatlab.sweep", word, "--config-dir", str(own), "sweep=mine", *options]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return begin


def counted(cells: list[Cell], what: str) -> int:
    """A number of the lines that say what runs took, "images decoded N, ... text tower calls N", over all runs."""
    lines = [line for cell in cells if cell.run is not None for line in log_of(cell.run).read_text().splitlines()]
    return sum(int(re.findall(rf"{what} (\d+)", line)[0]) for line in lines if line.startswith("images decoded"))


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_does_nothing_twice(
    own: Path, tmp_path: Path, start: Start, small_options: list[str]
) -> None:
    """Two times four runs, methods by bits, and one that fails: killed with two runs going, and started again at once."""
    (own / "sweep" / "mine.yaml").write_text(
        f"""grids:
  - {{recipe: 'ptq,smoothquant', quant: '{BITS}'}}
  - {{recipe: 'light_qat,light_qat_lsq', quant: '{BITS}', fit.steps: 2, fit.batch_size: 8, fit.unique_samples: 16}}
  - {{recipe: fp32, model.checkpoint: {tmp_path / "none.pt"}}}
"""
    )
    given = [f"output={tmp_path / 'runs'}", *small_options]
    cells = cells_of("mine", given, own)
    runs = [cell.run for cell in cells if cell.run is not None]
    assert len(cells) == len(runs) == 9
    first = start("run", "jobs=2", *given)
    while not log_of(runs[3]).exists():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    first.kill()
    first.communicate()  # until nobody writes to its output any more
    before = [state_of(cell).kind for cell in cells]
    assert "finished" in before[:3]
    assert set(before[4:]) == {"new"}

    second = start("run", "jobs=2", *given)  # waits for the two that are told to stop
    said, _ = second.communicate(timeout=900)
    assert second.returncode == 2, said
    assert [state_of(cell).kind for cell in cells] == ["finished"] * 8 + ["failed"], said
    assert "none.pt" in state_of(cells[8]).why
    assert "9 runs: 8 finished, 1 failed" in said
    rows = [
        [(row["stage"], row["dataset"], row["score"], row["step"]) for row in read_rows(run.results)]
        for run in runs[:8]
    ]
    assert all(len(of) == len(set(of)) for of in rows)
    assert {frozenset(of) for of in rows[:4]} == {frozenset(rows[0])}
    assert {frozenset(of) for of in rows[4:]} == {frozenset(rows[4])}
    # Three sets, and the one that the temperature is fitted on: every image was decoded by one run, and the texts were
    # encoded by one; probes render theirs anew.
    assert counted(cells, "decoded") == 4 * 32
    assert counted(cells, "tower calls") == 1

    said, _ = start("retry", *given, real=True).communicate(timeout=300)
    assert said.count("failed with exit code 2") == 1


@pytest.mark.slow
def test_two_processes_of_a_cell_never_take_another_cell(
    own: Path, tmp_path: Path, start: Start, small_options: list[str], small_fit: Callable[..., Run]
) -> None:
    """Three cells on two devices each, the first finished before: in the others both ranks train what one alone would."""
    training = ["fit.steps=2", "fit.batch_size=8", "fit.unique_samples=16"]
    (own / "sweep" / "mine.yaml").write_text("grids: [{recipe: light_qat_lsq, seed: '0,1,2', trainer.devices: 2}]")
    given = [f"output={tmp_path / 'runs'}", *training, *small_options]
    cells = cells_of("mine", given, own)
    small_fit("light_qat_lsq", tmp_path / "runs", "seed=0")  # on one device: the same run
    assert [state_of(cell).kind for cell in cells] == ["finished", "new", "new"]
    said, _ = start("run", *given).communicate(timeout=300)
    assert said.count(": finished, ") == 2
    assert [state_of(cell).kind for cell in cells] == ["finished"] * 3
    for cell in cells[1:]:
        alone = small_fit("light_qat_lsq", tmp_path / "alone", f"seed={cell.config.seed}")
        assert cell.run is not None
        assert alone.folder.name == cell.run.folder.name
        losses = [
            pl.read_csv(run.folder / "metrics.csv")["train/loss"].drop_nulls().to_list() for run in (alone, cell.run)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert len(losses[0]) == 2
