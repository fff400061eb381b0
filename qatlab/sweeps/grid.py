"""The cells of a sweep: products of options, each the command line of one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import Progress

from qatlab.config import Config, recipe_files
from qatlab.config.explain import explain
from qatlab.core.errors import UserError, nearest
from qatlab.results.run import Run
from qatlab.sweeps.buildable import mistakes_of
from qatlab.sweeps.compositions import Alike, Composition, Line, alike, initialized

MANY = 24  # cells from which on planning shows a progress line; fewer cells are planned in a moment
MISTAKES = (UserError, HydraException, OmegaConfBaseException)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its ``overrides`` and the ``run`` that they make, or the ``mistake`` that prevents it."""

    overrides: Line
    recipe: str = ""
    run: Run | None = None
    mistake: str = ""

    @property
    def config(self) -> Config:
        """Return the options of the run."""
        assert self.run is not None
        return self.run.config


def cells_of(name: str, given: Sequence[str], config_dir: Path | None = None) -> list[Cell]:
    """Return the cells of the sweep called ``name``, each run once, in the order of its grids.

    A sweep file holds ``grids``, a list of products in Hydra's sweeper syntax: an option to its values, separated by
    commas. Arguments ``given`` on the command line go to every cell, in the place of the file's own values, and may
    have several values too. ``config_dir`` is the folder of the user's own choices. Raises UserError for a sweep that
    does not exist or has another form; a cell whose options cannot be built has a ``mistake``.
    """
    named = {argument.lstrip("+~").partition("=")[0] for argument in given}
    # W&B then shows the cells as one group. The cells share decoded images, so only the first cell has to decode them.
    shared = {"wandb.group": name, "suite.cache": True}
    lines = []
    for grid in _grids(name, config_dir):
        options = {key: value for key, value in {**shared, **grid}.items() if key not in named}
        lines += _product([*(f"{key}={_written(value)}" for key, value in options.items()), *given], config_dir)
    # Grids may overlap, so a run counts once: it is known by the name of its folder, which holds its id.
    found: dict[str, Cell] = {}
    for cell in _cells(lines, config_dir):
        found.setdefault(cell.run.folder.name if cell.run else " ".join(cell.overrides), cell)
    return list(found.values())


def _cells(lines: Sequence[Line], config_dir: Path | None) -> list[Cell]:
    """Return the cell of every command line."""
    # There are two passes over all lines, so that one process
    # can check the blocks of all cells that Hydra could compose.
    composed = _composed(lines, config_dir)
    configs = {place: config for place, config in enumerate(composed) if isinstance(config, Config)}
    mistakes = dict(zip(configs, mistakes_of(list(configs.values()), config_dir), strict=True))
    pairs = zip(lines, composed, strict=True)
    return [_cell(line, config, mistakes.get(place, ""), config_dir) for place, (line, config) in enumerate(pairs)]


def _composed(lines: Sequence[Line], config_dir: Path | None) -> list[Config | str]:
    """Return the options that every command line makes, or the sentence on why it makes none."""
    found: list[Config | str] = [""] * len(lines)
    # The progress goes to stderr, so that the plan can be piped,
    # and is transient, so that none of it stays above the table.
    progress = Progress(console=Console(stderr=True), transient=True, disable=len(lines) < MANY)
    with initialized(config_dir), progress:
        task = progress.add_task("planning", total=len(lines))
        for group in alike(lines, config_dir):
            for place, config in zip(group.places, _composed_alike(group, config_dir), strict=True):
                found[place] = config
                progress.advance(task)
    return found


def _composed_alike(group: Alike, config_dir: Path | None) -> Iterator[Config | str]:
    """Yield the options of each line of a group, or the sentence on why it makes none, in their order."""
    try:
        composition = Composition(group.common)
    except MISTAKES as error:
        yield from [explain(error, config_dir) or str(error)] * len(group.places)
        return
    for values in group.values:
        try:
            yield composition.with_values(values)
        except MISTAKES as error:
            yield explain(error, config_dir) or str(error)


def _cell(overrides: Line, config: Config | str, mistake: str, config_dir: Path | None) -> Cell:
    """Return the cell of a command line; ``config`` is its options or the sentence on why there are none."""
    recipe = next((argument.partition("=")[2] for argument in overrides if argument.startswith("recipe=")), "")
    if isinstance(config, str) or mistake:
        return Cell(overrides, recipe, mistake=mistake or str(config))
    # A Run computes its id from the files that options name, so a mistake in these files shows up here.
    try:
        return Cell(overrides, recipe, Run(config, recipe))
    except UserError as error:
        return Cell(overrides, recipe, mistake=explain(error, config_dir) or str(error))


def _grids(name: str, config_dir: Path | None) -> list[dict[str, Any]]:
    """Return the grids of the sweep file ``name``, {option: values}; raises UserError for another form."""
    files = recipe_files("sweep", config_dir)
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
    # null, true and lists are written alike in JSON and Hydra; a text already has the commas between several values.
    return value if isinstance(value, str) else json.dumps(value)


def _product(options: list[str], config_dir: Path | None) -> list[Line]:
    """Return the command lines of the product of ``options``, each with one of its values."""
    # Hydra's own sweeper is used, so that ranges, globs and quoted commas mean in a file what they mean after -m.
    try:
        (cells,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(options), max_batch_size=None)
    except HydraException as error:
        raise UserError(explain(error, config_dir) or str(error)) from error
    return [tuple(overrides) for overrides in cells]
