"""The cells of a sweep: products of options, each the command line of one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import track

from qatlab.blocks import check_blocks
from qatlab.config import Config, as_config, recipe_files
from qatlab.errors import UserError, nearest
from qatlab.mistakes import explain
from qatlab.quantized import check_quantizers
from qatlab.results import Run

MANY = 24  # cells from which on processes that compose them are worth their start


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its ``overrides``, and what they make, or ``mistake``, why they make nothing."""

    overrides: tuple[str, ...]
    recipe: str = ""
    run: Run | None = None
    mistake: str = ""

    @property
    def config(self) -> Config:
        """Return the options of the run."""
        assert self.run is not None
        return self.run.config


def cells_of(name: str, given: Sequence[str], own: Path | None = None) -> list[Cell]:
    """Return the cells of the sweep called ``name``, each run once, in the order of its grids.

    A sweep file holds ``grids``, a list of products in Hydra's sweeper syntax: an option to its values, separated by
    commas. What is ``given`` on the command line goes to every cell, in the place of the file's own values, and may have
    several values too. ``own`` is the folder of the user's own choices. Raises UserError for a sweep that is not there or
    not of this form; an option that a cell cannot be built with is its ``mistake``.
    """
    named = {argument.lstrip("+~").partition("=")[0] for argument in given}
    # W&B shows the cells together, and the second of them finds the images decoded.
    shared = {"wandb.group": name, "suite.cache": True}
    lines = []
    for grid in _grids(name, own):
        options = {key: value for key, value in {**shared, **grid}.items() if key not in named}
        lines += _product([*(f"{key}={_written(value)}" for key, value in options.items()), *given], own)
    found: dict[str, Cell] = {}
    for cell in _composed(lines, own):
        found.setdefault(cell.run.folder.name if cell.run else " ".join(cell.overrides), cell)
    return list(found.values())


def _composed(lines: Sequence[tuple[str, ...]], own: Path | None) -> Iterator[Cell]:
    """Compose the command lines, half a second each, on all cores where there are many."""
    if len(lines) < MANY:
        yield from (_cell(overrides, own) for overrides in lines)
        return
    with ProcessPoolExecutor() as pool:
        cells = pool.map(partial(_cell, own=own), lines, chunksize=8)
        yield from track(cells, "planning", total=len(lines), transient=True, console=Console(stderr=True))


def _grids(name: str, own: Path | None) -> list[dict[str, Any]]:
    files = recipe_files("sweep", own)
    if name not in files:
        raise UserError(f"sweep={name} is not there{nearest(name, files)}; there are {', '.join(files)}.")
    try:
        stored = yaml.safe_load(files[name].read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{files[name]}: {' '.join(str(error).split())}.") from error
    grids = stored.get("grids") if isinstance(stored, dict) else None
    if (
        not grids
        or not isinstance(grids, list)
        or not all(isinstance(grid, dict) and "recipe" in grid for grid in grids)
    ):
        raise UserError(
            f"{files[name]} holds no list 'grids' of products, each with a recipe: see recipes/sweep/paper.yaml."
        )
    return grids


def _written(value: Any) -> str:
    """Return a value of a file as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _product(options: list[str], own: Path | None) -> list[tuple[str, ...]]:
    try:
        (cells,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(options), max_batch_size=None)
    except HydraException as error:
        raise UserError(explain(error, own) or str(error)) from error
    return [tuple(overrides) for overrides in cells]


def _cell(overrides: tuple[str, ...], own: Path | None = None) -> Cell:
    recipe = next((argument.partition("=")[2] for argument in overrides if argument.startswith("recipe=")), "")
    where = (
        initialize_config_dir(str(own.resolve()), version_base="1.3") if own else initialize(None, version_base="1.3")
    )
    try:
        with where:
            config = as_config(compose("qatlab", overrides=[*overrides]))
        check_blocks(config)
        check_quantizers(config.quant)
        return Cell(overrides, recipe, Run(config, recipe))
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return Cell(overrides, recipe, mistake=explain(error, own) or str(error))
