"""Planning a sweep: light, quick, and the same runs as by composing every command line on its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest

from qatlab.config import compose
from qatlab.results.identity import run_id
from qatlab.results.run import Run
from qatlab.sweeps import buildable, compositions
from qatlab.sweeps.grid import Cell, cells_of

GIVEN = ["data.shards=/data", "suite.root=/data"]


@pytest.fixture(scope="module")
def paper() -> tuple[list[Cell], int]:
    """The cells of the paper's sweep, and how many compositions they took."""
    calls: list[Any] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return composing(*arguments, **options)

    composing = hydra.compose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compositions.hydra, "compose", counted)
        cells = cells_of("paper", GIVEN)
    return cells, len(calls)


def test_what_cells_choose_is_composed_once(paper: tuple[list[Cell], int]) -> None:
    """FP32 of six models, seven methods of six models; bits and seeds are values."""
    cells, calls = paper
    assert (len(cells), calls) == (636, 6 + 7 * 6)


def require_equal(cells: list[Cell]) -> None:
    for cell in cells:
        whole = compose(*cell.overrides)
        assert cell.run is not None
        assert (cell.config, cell.run.id) == (whole, run_id(whole)), cell.overrides
        assert cell.run._evaluation == Run(whole, cell.recipe)._evaluation


def test_a_cell_has_the_options_and_the_id_of_its_command_line(paper: tuple[list[Cell], int]) -> None:
    require_equal(paper[0][::53])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_cell_has_the_options_and_the_id_of_its_command_line(paper: tuple[list[Cell], int], part: int) -> None:
    """In parts, which several processes of pytest do at once: each composition of its own takes a quarter of a second."""
    require_equal(paper[0][part::4])


@pytest.mark.parametrize(
    "grid",
    [
        # seed is taken into the block by an interpolation, log_scale from optim
        "{recipe: 'raana,rotation', seed: '0,1'}",
        "{recipe: 'light_qat_lsq,lr_qat', optim.log_scale: 'true,false', optim.scale_lr: '1e-3,.5'}",
        "{recipe: pretrain_tiny, fit.steps: '3,4', fit.batch_size: '8,16'}",
        # one option twice, in both orders, and by parts
        "{recipe: ptq, quant.weight.bits: '8,4', quant: '{weight:{bits:3}},{act:{bits:5}}'}",
        "{recipe: ptq, quant: '{weight:{bits:3}},{act:{bits:5}}', quant.weight.bits: 6}",
        # what Hydra's grammar reads: quotes, lists, null, an interpolation, added and deleted options
        "{recipe: light_qat, +quant.rules: '{b:null},{a:{act:null},b:null}', optim.betas: '[0.5,0.9],[0.1,0.2]'}",
        "{recipe: light_qat, fit.unique_samples: 'null,7', wandb.group: \"'a,b','${recipe_name}'\"}",
        "{recipe: ptq, data.seed: '${seed},3', seed: '1,2', ~suite.sets.noise: }",
        "{recipe: ptq, quant/weight: 'lsq,minmax', model: 'tiny,vit_b32_openai', quant.weight.bits: '4,5'}",
        # sets get their types after Hydra: one that is added, and an option that its file leaves out
        "{recipe: ptq, seed: '0,1', suite.sets.noise.reference: 'id,null', +suite.sets.new: '{path:a,role:id}'}",
    ],
)
def test_values_are_read_as_on_the_command_line(tmp_path: Path, grid: str) -> None:
    (tmp_path / "sweep").mkdir()
    grid = grid.replace("${recipe_name}", "${output}")
    (tmp_path / "sweep" / "mine.yaml").write_text(f"grids: [{grid}]")
    cells = cells_of("mine", [], tmp_path)
    assert len(cells) > 1 or "bits: 6" in grid
    require_equal(cells)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("seed: 'abc,1'", "seed=abc: it takes a whole number from 0 to 4294967295."),
        ("seed: '-1,1'", "seed=-1: it takes a whole number from 0 to 4294967295."),
        ("fit.steps: '2,0'", "no objective: give one of objective.contrastive"),
        ("fit.lr: '-1.0,1'", "fit.lr=-1.0: it takes a number from 0 to 1."),
        ("fit.steps: 'many,0'", "fit.steps=many: it takes a whole number from 0 on."),
        (
            "optim.betas: '[0.1,2],[0.1,0.2]'",
            "optim.betas=[0.1, 2.0]: it takes a list of 2, each a number from 0 to below 1.",
        ),
        ("+quant.lucky: '1,2'", "quant.lucky is not an option"),
        ("quant.weight.bits: '99,8'", "quant.weight.bits=99: it takes a whole number from 2 to 8."),
        ("quant.weight._target_: 'no.where,qatlab.quant.MinMax'", "quant.weight._target_=no.where cannot be imported"),
        ("quant.tower: 'attic,text'", "quant.tower=attic is unknown"),
    ],
)
def test_a_value_that_cannot_be_is_told_of_its_cell(tmp_path: Path, option: str, told: str) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(f"grids: [{{recipe: ptq, {option}}}]")
    wrong, right = cells_of("mine", [], tmp_path)
    assert wrong.mistake.startswith(told)
    assert (wrong.recipe, bool(right.mistake)) == ("ptq", "lucky" in option)


LIGHT = """
import sys
from pathlib import Path
from qatlab.sweeps.grid import cells_of
cells = cells_of("mine", [], Path(sys.argv[1]))
print([cell.mistake for cell in cells])
print([name for name in ("torch", "lightning", "open_clip", "torchvision", "torchmetrics") if name in sys.modules])
"""


def test_planning_loads_no_torch_and_one_process_builds_each_block_once(
    tmp_path: Path, subprocess_environment: dict[str, str]
) -> None:
    (tmp_path / "sweep").mkdir()
    grid = "{recipe: 'ptq,light_qat', seed: '0,1', quant.weight.bits: '8,99'}"
    (tmp_path / "sweep" / "mine.yaml").write_text(f"grids: [{grid}]")
    command = [sys.executable, "-c", LIGHT, str(tmp_path)]
    done = subprocess.run(command, env=subprocess_environment, capture_output=True, text=True, check=True)
    mistakes, loaded = map(eval, done.stdout.splitlines())
    assert loaded == []
    assert [bool(mistake) for mistake in mistakes] == [False, True] * 4
    assert all("bits=99" in mistake for mistake in mistakes[1::2])


def test_blocks_that_are_equal_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    monkeypatch.setattr(buildable, "_mistake", lambda config, _: built.append(config) or str(config.quant.weight))
    configs = [compose("recipe=ptq", f"seed={seed}", f"quant.weight.bits={bits}") for seed in (0, 1) for bits in (8, 4)]
    found = buildable.mistakes_of(configs)
    assert [config.quant for config in built] == [config.quant for config in configs[:2]]
    assert found == [str(config.quant.weight) for config in configs]
