"""The sweeps of the paper's figures: every cell is a run, and Hydra walks them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from qatlab.config import Config, compose, recipe_files
from qatlab.results import Run, read_rows, run_id

SWEEPS = recipe_files("sweep")


def cells(name: str) -> list[Config]:
    """The options of each run of the sweep, as Hydra's own sweeper makes them."""
    stored: Any = OmegaConf.to_container(OmegaConf.load(SWEEPS[name]))
    assert stored["hydra"]["mode"] == "MULTIRUN"
    params = [f"{key}={value}" for key, value in stored["hydra"]["sweeper"]["params"].items()]
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), max_batch_size=None)
    return [compose(f"sweep={name}", *overrides) for overrides in batch]


@pytest.fixture(scope="module")
def composed() -> dict[str, list[Config]]:
    return {name: cells(name) for name in SWEEPS}


def test_the_sweeps_are_those_of_the_figures_and_of_the_weights(composed: dict[str, list[Config]]) -> None:
    assert {name: len(found) for name, found in composed.items()} == {
        "fig3_bits": 18,
        "fig4_steps": 3,
        "fig14_samples": 18,
        "weight_only_bits": 7,
    }
    for path in SWEEPS.values():
        first = path.read_text().splitlines()[0]
        assert first.startswith("# ")
        assert "arXiv 2509.21173, Fig. " in first or not path.stem.startswith("fig")
        assert first.endswith(f"(python -m qatlab.fit sweep={path.stem}).")


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


def test_samples_end_in_a_stream(composed: dict[str, list[Config]]) -> None:
    found = [config.fit.unique_samples for config in composed["fig14_samples"]]
    assert found == [10, 30, 100, 300, 1000, None] * 3
    assert {config.fit.steps for config in composed["fig14_samples"]} == {100}


def test_a_sweep_runs_its_cells_one_after_the_other(
    tmp_path: Path, subprocess_environment: dict[str, str], small_options: list[str]
) -> None:
    line = ["sweep=fig4_steps", f"output={tmp_path / 'runs'}", "fit.steps=2", "fit.batch_size=8", *small_options]
    done = subprocess.run(
        [sys.executable, "-m", "qatlab.fit", *line],
        env=subprocess_environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    folders = {path.name.rpartition("-")[0]: path for path in (tmp_path / "runs").iterdir() if path.is_dir()}
    assert set(folders) == {"light_qat", "light_qat_lsq", "light_qat_distill"}
    for recipe, folder in folders.items():
        config = compose("sweep=fig4_steps", f"recipe={recipe}", *line[1:])
        assert folder.name == Run(config, recipe).folder.name
        assert {row["recipe"] for row in read_rows(folder / "results.jsonl")} == {recipe}
        assert {row["step"] for row in read_rows(folder / "results.jsonl") if row["stage"] == "probe"} == {1, 2}
        assert (folder / "curves.png").exists()
