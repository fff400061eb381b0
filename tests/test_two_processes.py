"""The same numbers, to the last bit, on one process and on two that share the images unevenly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from qatlab.config import Config
from qatlab.results.identity import run_id
from qatlab.results.rows import read_rows
from qatlab.results.run import Run

Options = Callable[..., Config]
Command = Callable[..., tuple[Path, str]]


@pytest.fixture(scope="module")
def command(python: str, subprocess_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Command:
    """``command(module, devices, *options)``: the command line on so many processes; its run folder and what it said.

    They are forked, or with ``real=True`` started by Python itself.
    """

    def run(module: str, devices: int, *overrides: str, real: bool = False, torchrun: bool = False) -> tuple[Path, str]:
        output = tmp_path_factory.mktemp("output")
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(devices)] if torchrun else []
        program = [sys.executable if real or torchrun else python, *launcher, "-m", f"qatlab.{module}"]
        line = [*program, f"output={output}", f"trainer.devices={devices}", *overrides]
        done = subprocess.run(line, env=subprocess_environment, cwd=output, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
        made = (path for path in output.iterdir() if path.is_dir() and (path / "results.jsonl").exists())
        return next(made, output), done.stdout

    return run


@pytest.fixture(scope="module")
def evaluated(command: Command, small_options: list[str]) -> dict[int, tuple[Path, str]]:
    options = [option for option in small_options if not option.startswith("quant.")]  # nothing is quantized here
    return {devices: command("evaluate", devices, *options, "suite.images=33") for devices in (1, 2)}


def numbers(folder: Path) -> dict[tuple[Any, ...], Any]:
    return {
        tuple(row[key] for key in ("stage", "step", "dataset", "score")): (row["metrics"], row["n"], row["logit_scale"])
        for row in read_rows(folder / "results.jsonl")
    }


def test_every_metric_is_equal_to_the_last_bit(evaluated: dict[int, tuple[Path, str]]) -> None:
    one, two = (numbers(evaluated[devices][0]) for devices in (1, 2))
    assert len(one) == 24
    assert {n for _, n, _ in one.values()} == {33}
    assert two == one


def test_so_is_every_image(evaluated: dict[int, tuple[Path, str]]) -> None:
    for stage in ("fp32", "temperature"):
        one, two = (pl.read_parquet(evaluated[n][0] / "predictions" / f"{stage}.parquet") for n in (1, 2))
        assert len(one) == 3 * 33
        assert two.equals(one)


def test_two_processes_speak_once(evaluated: dict[int, tuple[Path, str]]) -> None:
    for _, said in evaluated.values():
        assert said.count("fp32, temperature: scoring 99 images") == 1
        assert said.count("after temperature") == 1
        assert said.count(": fp32, tiny (tiny, gelu)") == 1


@pytest.mark.parametrize(
    "starts", ["forked", *(pytest.param(name, marks=pytest.mark.slow) for name in ("python", "torchrun"))]
)
def test_two_processes_train_one_run_whoever_starts_them(
    command: Command, small_options: list[str], small: Options, starts: str
) -> None:
    options = [*small_options, "fit.steps=2", "fit.batch_size=8", "fit.unique_samples=16"]
    folder, said = command(
        "fit", 2, "recipe=light_qat_lsq", *options, real=starts == "python", torchrun=starts == "torchrun"
    )
    config = small("light_qat_lsq", f"output={folder.parent}")
    assert folder.name == f"light_qat_lsq-{run_id(config)}"
    rows = read_rows(folder / "results.jsonl")
    assert {row["run_id"] for row in rows} == {run_id(config)}
    assert {row["stage"] for row in rows} == {"fp32", "quantized", "adapted", "temperature", "probe"}
    assert len(numbers(folder)) == len(rows)
    assert said.count("training: 2 steps x 8 images") == 1
    assert (folder / "model.safetensors").exists()


def test_two_processes_train_the_columns_of_outlier_channels(command: Command, small_options: list[str]) -> None:
    """Layers that keep no channel have nothing to train beside their weight, for whose gradient the processes would wait."""
    options = [*small_options, "fit.steps=2", "fit.batch_size=8", "fit.unique_samples=16"]
    rewrite = ["quant/rewrite=outlier_channels", "quant.outliers.budget=0.1"]
    folder, said = command("fit", 2, "recipe=light_qat_lsq", *options, *rewrite)
    assert (folder / "model.safetensors").exists()
    assert said.count("keep input channels in full precision") == 1
    one, _ = command("fit", 1, "recipe=light_qat_lsq", *options, *rewrite)
    kept = [pl.read_csv(each / "layers.csv")["outlier_channels"].to_list() for each in (one, folder)]
    assert kept[0] == kept[1]
    assert 0 < sum(count > 0 for count in kept[0]) < len(kept[0])


@pytest.mark.parametrize("name", ["fp8_e4m3", "nvfp4"])
def test_two_processes_round_to_a_format_as_one_does(
    command: Command, small_options: list[str], small_fit: Callable[..., Run], tmp_path: Path, name: str
) -> None:
    options = [f"quant/weight={name}", f"quant/act={name}", "fit.steps=2", "fit.batch_size=8", "fit.unique_samples=16"]
    folder, _ = command("fit", 2, "recipe=light_qat", *small_options, *options)
    run = small_fit("light_qat", tmp_path / "one", *options)
    for file, exact in (("quantized.safetensors", True), ("model.safetensors", False)):
        one, two = load_file(run.folder / file), load_file(folder / file)
        for key, expected in one.items():
            tolerance = 0 if exact or key.endswith(".step") else 1e-4
            torch.testing.assert_close(two[key], expected, rtol=tolerance, atol=tolerance)


def test_two_processes_score_a_finished_run_on_more_images(
    command: Command, small_options: list[str], small_fit: Callable[..., Run], tmp_path: Path
) -> None:
    """They meet though the run is finished: for the suite it was made with, not for this one."""
    run = small_fit("ptq", tmp_path)
    assert run.finished() is not None
    options = [option for option in small_options if not option.startswith(("quant.", "data.", "suite.images"))]
    _, said = command("evaluate", 2, f"checkpoint={run.folder}", *options, "suite.images=48")
    assert said.count("scoring 144 images") == 1
    found = [row["n"] for row in run.rows() if row["stage"] == "quantized" and row["dataset"] == "id"]
    assert set(found) == {32, 48}


def test_two_processes_with_other_options_find_out() -> None:
    """Rank 1 of a group that was started with another command names both runs and stops."""
    from types import SimpleNamespace

    from qatlab.callbacks import Results
    from qatlab.core.errors import UserError

    trainer = SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda _: "11111111"), global_rank=1)
    with pytest.raises(UserError, match=r"rank 1 is run 22222222, rank 0 is run 11111111"):
        Results(SimpleNamespace(id="22222222")).setup(trainer, None, "validate")  # type: ignore[arg-type]
